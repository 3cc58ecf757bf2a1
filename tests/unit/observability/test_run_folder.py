import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import yaml

from nemo_like.errors import DataError
from nemo_like.observability.records import Answer, Table, collect_facts
from nemo_like.observability.run_folder import RunFolder, append_line, read_lines, truncate_after


def test_folders_are_numbered_from_one_and_past_999(tmp_path):
    assert RunFolder.create(tmp_path / "logs").path.name == "exp_001"
    assert RunFolder.create(tmp_path / "logs").path.name == "exp_002"
    (tmp_path / "logs" / "exp_999").mkdir()
    (tmp_path / "logs" / "exp_draft").mkdir()
    assert RunFolder.create(tmp_path / "logs").path.name == "exp_1000"


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(RunFolder.create(tmp_path).path))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 16


def test_a_torn_last_line_is_left_out_and_then_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "train/lo')
    assert read_lines(path) == [{"step": 1}]
    truncate_after(path, 5)
    append_line(path, {"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_kill_while_lines_are_written_leaves_a_readable_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from nemo_like.observability.run_folder import append_line\n"
        "print('ready', flush=True)\n"
        "for step in range(10**9):\n"
        "    append_line(Path(sys.argv[1]), {'step': step, 'text': 'x' * 5000})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"ready\n"
    while not path.exists() or path.stat().st_size < 100_000:
        assert writer.poll() is None
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    steps = [record["step"] for record in read_lines(path)]
    assert len(steps) >= 19
    assert steps == list(range(len(steps)))


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nwhat is this\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_lines(path)


def test_a_reopened_folder_forgets_the_steps_that_are_done_again(tmp_path):
    folder = RunFolder.create(tmp_path)
    for step in range(5):
        append_line(folder.metrics, {"step": step})
        folder.append_answers([Answer(step, "2+2=", "4")])
    again = RunFolder.reopen(folder.path, step=2)
    assert again == folder
    assert [r["step"] for r in read_lines(folder.metrics)] == [0, 1, 2]
    assert [r["step"] for r in read_lines(folder.samples)] == [0, 1, 2]


def test_a_deleted_log_folder_does_not_stop_a_resumed_run(tmp_path):
    folder = RunFolder.reopen(tmp_path / "logs" / "exp_007", step=10)
    assert folder.path.is_dir()
    assert read_lines(folder.metrics) == []


def test_no_file_of_the_folder_holds_a_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "value-of-the-token")
    monkeypatch.setattr(sys, "argv", ["run_sft.py", "x.password=value-of-the-password"])
    folder = RunFolder.create(tmp_path)
    folder.write_config({"env_vars": {"HF_TOKEN": "another-value-of-it"}, "sft": {"seed": 1}})
    folder.write_facts(collect_facts(note="value-of-the-token"))
    folder.write_tables([Table("t", ("a",), (("value-of-the-token",),))])
    folder.append_answers([Answer(1, "say", "value-of-the-token")])
    for path in folder.path.iterdir():
        assert "value-of-" not in path.read_text(), path
    assert yaml.safe_load(folder.config.read_text())["sft"] == {"seed": 1}
    assert json.loads(folder.facts.read_text())["command"] == "run_sft.py x.password=<redacted>"


def test_facts_name_the_versions_that_matter():
    facts = collect_facts(workers="2")
    assert facts["torch"].startswith("2.") and facts["workers"] == "2"


def test_facts_leave_the_gpu_to_the_workers():
    """The driver has none to spare, and asking torch for one would take memory of it."""
    code = (
        "from nemo_like.observability.records import collect_facts; collect_facts(); import sys; "
    )
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
