"""The command line of an entry point: `argv` in, one validated `Invocation` out."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn

from nemo_like.config import compat, compose
from nemo_like.config.draft import COMMAND_LINE, Draft, Origin, Problem
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.help import help_text
from nemo_like.config.layers import Files, as_yaml, shown
from nemo_like.config.report import nearest_choice, report, unknown_key
from nemo_like.config.schema import defaults, known_paths
from nemo_like.config.sft import SFTTree
from nemo_like.config.tree import RunTree
from nemo_like.config.validate import Tree, validate
from nemo_like.errors import ConfigError

CHECKPOINT_DIR = "checkpointing.checkpoint_dir"
AUTO = "auto"
NOT_THE_RUN = (
    "train_micro_batch_size",
    "logprob_batch_size",
    "logprob_chunk_size",
    "dynamic_batching",
    "sequence_packing",
    "make_sequence_length_divisible_by",
)
"""Fields of the policy that say how its steps are computed, not which steps they are."""
ENGINES = {"vllm_cfg", "colocated", "mismatch", "max_num_seqs", "num_cpu_engines"}
"""The same of the rollouts."""
Mode = Literal["run", "dry_run", "print_config", "help"]
OPTIONS = {
    "--config": "FILE     the configuration (from here, from the repository, or from its configs/)",
    "--dry-run": "         show what would happen, and start nothing",
    "--device": "NAME     with --dry-run: forecast memory, traffic and time on h100-80gb, ...",
    "--json": "            with --dry-run: print what was found as JSON",
    "--print-config": "    print the whole resolved configuration as YAML",
    "--multirun": "        run every combination of a=1,2 b=x,y one after the other",
    "--help": "[KEY]      every key with type and default; or those of one block",
}


@dataclass(frozen=True)
class Asked:
    """What else a dry run is asked for: a forecast for a device, and the form of the answer."""

    device: str | None = None
    as_json: bool = False


PLAIN = Asked()
"""Nothing else."""


@dataclass(frozen=True)
class Invocation(Generic[Tree]):
    """What the user asked for.

    `sweep` holds the tree of every combination under `--multirun` (else `tree` alone); each has a
    checkpoint folder of its own. `output` is what the modes `print_config` and `help` print.
    """

    tree: Tree
    mode: Mode
    config_path: Path
    overrides: tuple[str, ...]
    sweep: tuple[Tree, ...]
    notes: tuple[str, ...] = ()
    output: str = ""
    asked: Asked = PLAIN


def parse(argv: Sequence[str], *, tree: type[Tree], default_config: Path) -> Invocation[Tree]:
    """The invocation that a command line means.

    Raises:
        ConfigError: with everything that is wrong, in files and overrides, as one report.
    """
    options, rest = _parser().parse_known_args(list(argv))
    path = compose.find_config(options.config or str(default_config))
    mode: Mode = "help" if options.help else "print_config" if options.print_config else "run"
    if mode == "run" and options.dry_run:
        mode = "dry_run"
    if mode == "help":
        wanted = [word for word in rest if "=" not in word]
        known = known_paths(tree)
        unknown = [word for word in wanted if not any(word in key for key in known)]
        if unknown:
            problems = [Problem(unknown_key(word, known), (word,)) for word in unknown]
            raise ConfigError(report(problems))
        text = help_text(tree, wanted, options=OPTIONS)
        return Invocation(tree(), mode, path or default_config, (), (), output=text)

    problems = [_no_such_option(word) for word in rest if word.startswith("-")]
    asked = Asked(options.device, options.json)
    if asked != PLAIN and not options.dry_run:
        problems.append(Problem("--device and --json say what a dry run shows: add --dry-run"))
    if path is None:
        problems.append(_no_such_file(options.config or str(default_config)))
    texts = [word for word in rest if not word.startswith("-")]
    combinations, bad = compose.parse_overrides(texts, multirun=options.multirun)
    problems += bad
    if path is None:
        raise ConfigError(report(problems))
    trees, notes = _trees(path, combinations, tree, problems, to_run=mode == "run")
    return Invocation(
        tree=trees[0],
        mode=mode,
        config_path=path,
        overrides=tuple(texts),
        sweep=tuple(trees),
        notes=tuple(dict.fromkeys(notes)),
        output="---\n".join(to_yaml(t) for t in trees) if mode == "print_config" else "",
        asked=asked,
    )


def to_yaml(tree: Tree) -> str:
    """The whole tree as a file that `--config` reads as the same tree."""
    return as_yaml(tree.model_dump(mode="json"))


def _trees(
    path: Path,
    combinations: list[compose.Overrides],
    tree: type[Tree],
    problems: list[Problem],
    *,
    to_run: bool,
) -> tuple[list[Tree], list[str]]:
    """The tree of every combination, and notes."""
    schema = compose.Schema(known_paths(tree), defaults(tree))
    files: dict[tuple[str, ...], Files] = {}
    trees: list[Tree] = []
    notes: list[str] = []
    for index, overrides in enumerate(combinations):
        if overrides.groups not in files:
            files[overrides.groups] = _read(path, overrides.groups, problems)
            _refuse_other(files[overrides.groups], path, tree)
        draft = compose.apply(files[overrides.groups], overrides.values, schema)
        compat.translate(draft)
        draft.problems[:0] = problems
        node, found = validate(draft, tree, schema.known, to_run=to_run)
        _, folder, origin = draft.seen(CHECKPOINT_DIR)
        if node is not None:
            own = _named_after(node, path) if folder == AUTO else folder
            if len(combinations) > 1:
                own = _own_checkpoints(own, index, overrides.swept)
            if own != folder:
                draft.put(CHECKPOINT_DIR, own, origin)  # also where `auto` itself was written
                node, found = validate(draft, tree, schema.known, to_run=to_run)
        if node is None:
            raise ConfigError(report(found, draft))
        trees.append(node)
        notes += [*draft.notes, *_idle_keys(node, draft)]
    return trees, notes


def _refuse_other(files: Files, path: Path, tree: type[Tree]) -> None:
    """Refuse the configuration of another algorithm, instead of its keys one by one."""
    for other in (SFTTree, GRPOTree):
        blocks = set(other.model_fields) - set(tree.model_fields)
        if any(key[0] in blocks for key in files.origins):
            message = (
                f"is a configuration of {other.algorithm.upper()}: "
                f"uv run examples/run_{other.algorithm}.py --config {shown(path)}"
            )
            raise ConfigError(report([Problem(message, origin=Origin(0, str(shown(path))))]))


def _idle_keys(node: RunTree, draft: Draft) -> list[str]:
    """Notes on what was typed and has no effect; a file may well carry it."""
    policy = node.policy
    typed = sorted(
        ".".join(path)
        for path, origin in draft.origins.items()
        if origin.text.startswith(COMMAND_LINE)
        and draft.find(path)[0]
        and not isinstance(draft.find(path)[1], dict)
    )
    muon = [key for key in typed if key.rpartition(".")[2].startswith("muon_")]
    name = policy.active_optimizer.optimizer
    notes = [
        f"{key} has no effect under optimizer={name}; Muon is optimizer=muon"
        for key in (muon if not policy.active_optimizer.is_muon else ())
    ]
    active = policy.backend_key
    idle = "dtensor_cfg" if active == "megatron_cfg" else "megatron_cfg"
    notes += [
        f"{key} has no effect: policy.{active} trains; the other backend is "
        f"policy.{idle}.enabled=true policy.{active}.enabled=false"
        for key in typed
        if key.startswith(f"policy.{idle}.") and key not in (f"policy.{idle}.enabled", *muon)
    ]
    reward = node.env.custom.reward if isinstance(node, GRPOTree) else None
    if reward is not None and "custom" not in node.data.judges:
        notes.append(
            f"env.custom.reward={reward} judges nothing: no rows have "
            "env_name=custom; for all of them it is data.default.env_name=custom"
        )
    return notes


def _read(path: Path, groups: tuple[str, ...], problems: list[Problem]) -> Files:
    try:
        return compose.read_files(path, groups)
    except ConfigError as error:
        raise ConfigError(report([*problems, Problem(str(error))])) from error


def _named_after(node: RunTree, path: Path) -> str:
    """A checkpoint folder for this model, data, seed and start: each configuration has its own."""
    how = {"env_vars", "activation_checkpointing", "cpu_offload"}
    shared: dict[str, Any] = {"policy": True, "data": True, "checkpointing": {"start_from"}}
    what = node.model_dump_json(
        include={**shared, **node.identity},
        exclude={
            "policy": {"dtensor_cfg": how, "megatron_cfg": how, "generation": ENGINES}
            | dict.fromkeys(NOT_THE_RUN, True),
            "data": {"num_workers", "bad_rows", "max_bad_rows"},
        },
    )
    return f"results/{path.stem}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"


def _own_checkpoints(folder: str, index: int, swept: Sequence[str]) -> str:
    """A folder for one run of a sweep: they must not resume from each other."""
    if any(text.startswith(CHECKPOINT_DIR) for text in swept):
        return folder
    pairs = (text.partition("=") for text in swept)
    name = ",".join(f"{key_path.rpartition('.')[2]}={value}" for key_path, _, value in pairs)
    return f"{folder}/{index}_{re.sub(r'[^A-Za-z0-9_.=,+-]+', '_', name)}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(report([Problem(f"{message} (see --help)")]))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return parser


def _no_such_option(word: str) -> Problem:
    guess = nearest_choice(word, OPTIONS)
    message = "there is no such option" + (f"; did you mean {guess}?" if guess else "")
    return Problem(message, origin=Origin(0, COMMAND_LINE + word))


def _no_such_file(name: str) -> Problem:
    known = [str(p.relative_to(compose.ROOT)) for p in compose.CONFIGS.rglob("*.yaml")]
    guess = nearest_choice(name, known)
    message = "there is no such file, neither from here nor in the repository"
    message += f"; did you mean {guess}?" if guess else ""
    return Problem(message, origin=Origin(0, f"{COMMAND_LINE}--config {name}"))
