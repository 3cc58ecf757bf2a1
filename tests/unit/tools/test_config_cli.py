"""The commands of tools/config_cli.py, typed in the repository's root."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, output and errors of a command line."""
    monkeypatch.chdir(ROOT)
    main = runpy.run_path(str(ROOT / "tools/config_cli.py"))["main"]

    def command(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def config(text: str, name: str = "written.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return config


def test_explain_names_every_writer_and_the_winner(run, write):
    mine = write("defaults: [sft, _self_]\npolicy: {optimizer: {lr: 1.0e-4}}\n")
    code, out, _ = run("explain", "policy.optimizer.lr", mine, "policy.optimizer.lr=3e-4")
    assert (code, out.splitlines()[0]) == (0, "policy.optimizer.lr = 0.0003")
    lines = [" ".join(line.split()) for line in out.splitlines()[1:]]
    assert lines[0].endswith("default (schema)")
    assert lines[1] == "5e-06 configs/sft.yaml:8"
    assert lines[2] == f"0.0001 {mine}:2"
    assert lines[3] == "0.0003 command line: policy.optimizer.lr=3e-4"


def test_explain_of_a_section_shows_what_is_written_in_it(run):
    out = run("explain", "policy.optimizer", "configs/sft.yaml")[1]
    assert "policy.optimizer.adam_eps = 1e-05" in out and "adam_beta1" not in out


def test_explain_of_a_misspelt_key_suggests_another(run):
    code, _, errors = run("explain", "policy.optimiser.lr", "configs/sft.yaml")
    assert code == 2 and "did you mean policy.optimizer.lr?" in errors


@pytest.mark.parametrize("key", ["policy.dtensor_cfg.lora_cfg.dim", "policy.generation_batch_size"])
def test_explain_of_a_key_that_is_absent_says_why(run, key):
    code, _, errors = run("explain", key, "configs/sft.yaml")
    assert code == 2 and "is absent on purpose: " in errors


def test_explain_with_the_file_before_the_key_says_the_order(run):
    errors = run("explain", "configs/sft.yaml", "policy.optimizer.lr")[2]
    assert "explain policy.optimizer.lr configs/sft.yaml" in errors


def test_compare_shows_the_keys_that_differ_and_only_those(run, write):
    one = write("defaults: [sft, _self_]\nsft: {seed: 1}\n", "one.yaml")
    other = write("defaults: [sft, _self_]\nsft: {seed: 2}\n", "other.yaml")
    code, out, _ = run("compare", one, other, "--algorithm", "sft")
    assert code == 1
    assert [line for line in out.splitlines() if "checkpoint_dir" not in line] == [
        "sft.seed: 1 -> 2"
    ]
    assert run("compare", one, one)[:2] == (0, "")


def test_minimize_drops_what_is_inherited_and_keeps_the_rest_as_it_is_written(run, write):
    mine = write(
        "defaults: [sft, _self_]\n"
        "sft: {seed: 42, max_num_steps: 7}\n"
        "policy: {optimizer: {adam_eps: 1.0e-5}, max_total_sequence_length: 1024}\n"
        "data: {max_input_seq_length: '${policy.max_total_sequence_length}'}\n"
    )
    code, out, errors = run("minimize", mine)
    assert code == 0
    assert out.splitlines() == [
        "defaults:",
        "- sft",
        "- _self_",
        "sft:",
        "  max_num_steps: 7",
        "data:",
        "  max_input_seq_length: ${policy.max_total_sequence_length}",
    ]
    assert "policy.optimizer.adam_eps is what it inherits" in errors
    assert run("minimize", "--check", mine)[0] == 1
    again = write(out, "again.yaml")
    assert run("minimize", "--check", again)[0] == 0
    assert run("expand", again, "checkpointing.checkpoint_dir=x") == run(
        "expand", mine, "checkpointing.checkpoint_dir=x"
    )


def test_import_writes_a_file_that_expands_and_says_what_is_left_out(run, write, tmp_path):
    write("grpo: {seed: 7}\npolicy: {max_grad_norm: 1.0}\n", "base.yaml")
    theirs = write(
        "defaults: base.yaml\npolicy: {dtensor_cfg: {lora_cfg: {enabled: true}}}\n", "theirs.yaml"
    )
    ours = tmp_path / "ours.yaml"
    code, out, errors = run("import", theirs, "--out", str(ours))
    assert (code, out) == (2, "")  # another run: all weights would be trained
    text = ours.read_text()
    assert text.startswith("# From theirs.yaml of NeMo-RL.\n# Written out, as defaults differ:\n")
    assert text.endswith(
        "# Left out:\n"
        "# policy.dtensor_cfg.lora_cfg.enabled = true: absent on purpose: "
        "LoRA is not built: all weights are trained\n"
        "grpo:\n  seed: 7\ndata:\n  bad_rows: drop\n"
    )
    assert "3 keys:" in errors and "absent: policy.dtensor_cfg.lora_cfg.enabled" in errors
    assert f"wrote {ours}. Decide what is named above" in errors
    assert f"uv run examples/run_grpo.py --config {ours} recipes/tiny=grpo" in errors
    assert "seed: 7" in run("expand", str(ours))[1]
    code, _, errors = run("import", theirs, "--out", str(ours))
    assert code == 2 and "--force" in errors and ours.read_text() == text
    assert "wrote" in run("import", theirs, "--out", str(ours), "--force")[2]


@pytest.mark.parametrize("key", ["bogus: {a: 1}", "policy: {optimizer: {name: my.Optimizer}}"])
def test_import_of_what_would_learn_something_else_ends_with_2(run, write, key):
    assert run("import", write(f"grpo: {{max_num_steps: 5}}\n{key}\n"))[0] == 2


def test_import_of_what_is_only_slower_here_ends_with_0(run, write):
    slower = "policy: {megatron_cfg: {moe_grouped_gemm: true}}"
    code, _, errors = run("import", write(f"grpo: {{max_num_steps: 5}}\n{slower}\n"))
    assert code == 0 and "absent: policy.megatron_cfg.moe_grouped_gemm" in errors


def test_import_of_what_does_not_run_as_it_is_writes_it_and_says_so(run, write):
    theirs = write("sft: {seed: 1}\ndata: {train: {dataset_name: some_chats}}\n")
    code, out, errors = run("import", theirs)
    assert code == 2 and "seed: 1" in out
    assert "data.train.dataset_name = some_chats" in errors and "owner/name" in errors
    assert "1 problem to decide before it runs." in errors and "nothing was started" not in errors


def test_import_of_a_file_that_can_not_be_read_says_where_and_why(run, write, tmp_path):
    assert "(line 2)" in run("import", write("sft:\n  seed: [1,"))[2]
    assert run("import", str(tmp_path))[2].endswith(": is a directory\n")
    code, _, errors = run("import", write("sft: {}"), "--out", str(tmp_path / "no" / "x.yaml"))
    assert code == 2 and errors.endswith("no/x.yaml: no such file or directory\n")


def test_a_file_that_is_not_there_is_an_error_of_one_line(run):
    code, _, errors = run("expand", "nowhere.yaml")
    assert code == 2 and errors.count("\n") == 1 and "nowhere.yaml" in errors
