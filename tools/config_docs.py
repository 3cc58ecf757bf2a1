"""Write docs/configuration.md from the schema; `--check` only says whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_like.config.absent import ABSENT, IGNORED
from nemo_like.config.base import Node
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.help import value_text
from nemo_like.config.schema import Key, keys, known_paths
from nemo_like.config.sft import SFTTree

DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

This page is generated from the schema by `tools/config_docs.py`; do not edit it.

```
uv run examples/run_sft.py                                        # the embedded default
uv run examples/run_sft.py --config configs/sft.yaml              # a file
uv run examples/run_sft.py policy.optimizer.lr=1e-4 sft.seed=7    # overrides; the later one wins
uv run examples/run_sft.py policy/optimizer=muon                  # a file of a config group
uv run examples/run_sft.py policy.optimizer.lr=1e-4,3e-4 --multirun
uv run examples/run_sft.py --help policy.optimizer                # the keys of one block
uv run examples/run_sft.py --print-config > mine.yaml             # everything, resolved
uv run examples/run_sft.py --config mine.yaml --dry-run           # what would happen
```

Files are sparse: every default lives in the schema, and is listed below. `--config` is looked for
from where you are, then in the repository, then in its `configs/`. A file inherits others by
`defaults: [sft, _self_]` (names from its own folder or from `configs/`), and may interpolate other
keys, whether written or default: `${policy.train_micro_batch_size}`, `${mul:2,${sft.val_period}}`
(also `add`, `div`, `max` and `oc.env`).

`key=value`, `+key=value` and `++key=value` are the same. `~key` returns a key to its default,
`~key=value` only if it has that value. Everything that is wrong is reported at once, with the file
and line or the override it comes from, before anything is started; the exit code is 2.

`policy.optimizer` and `policy.scheduler` serve both backends. What is set under
`policy.megatron_cfg.optimizer` and `policy.megatron_cfg.scheduler` overrides them field by field
when that backend trains.
"""

GRPO = """
## GRPO and DAPO

`examples/run_grpo.py` has the keys above, without the block `sft`, and these. It is DAPO with
`grpo.use_dynamic_sampling` or `grpo.reward_shaping.enabled`.

"""

COMPATIBILITY = """
## Configs written for NeMo-RL

They have the same keys. `policy.optimizer: {name: torch.optim.AdamW, kwargs: {...}}`, lists of
torch schedulers, `_override_: true` in a section and short names of data sets are understood. Files
that they inherit from by a path (`defaults: ../base.yaml`) are not: `tools/config_cli.py import`
makes one file of them ([Coming from NeMo-RL](migrating.md#nemo-rl)). These keys are absent on
purpose: saying "off" (false, 0, null, none, or `enabled: false`) is allowed, anything else is
refused with the reason.

| key | why |
|---|---|
"""

NOTED = """
And these are ignored, with a note:

| key | why |
|---|---|
"""


def document() -> str:
    """The whole page."""
    absent, ignored = (
        "".join(f"| `{path}` | {reason} |\n" for path, reason in table.items())
        for table in (ABSENT, IGNORED)
    )
    tables = f"{markdown(SFTTree)}{GRPO}{markdown(GRPOTree, besides=SFTTree)}"
    return f"{INTRODUCTION}\n{tables}{COMPATIBILITY}{absent}{NOTED}{ignored}"


def markdown(tree: type[Node], *, besides: type[Node] | None = None) -> str:
    """One table per section, of the keys that `besides` does not have in the same words."""
    elsewhere = known_paths(besides) if besides is not None else {}
    tables: list[tuple[Key, list[Key]]] = []
    for key in keys(tree):
        if key.section:
            tables.append((key, []))
        elif elsewhere.get(key.path) != key:
            tables[-1][1].append(key)
    lines: list[str] = []
    for section, rows in tables:
        if rows or section.path not in elsewhere:
            level = "#" * (section.path.count(".") + 2)
            lines += ["", f"{level} `{section.path}`", "", section.line, ""]
            lines += ["| key | type | default | |", "|---|---|---|---|"]
        for key in rows:
            cells = (key.path.rpartition(".")[2], key.type, value_text(key.default))
            code = " | ".join(f"`{_escape(cell)}`" for cell in cells)
            lines.append(f"| {code} | {_escape(key.line)} |")
    return "\n".join(lines).strip() + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """The exit code: 1 if `--check` finds the page out of date."""
    if "--check" in sys.argv[1:]:
        return int(DOCUMENT.read_text() != document())
    DOCUMENT.write_text(document())
    return 0


if __name__ == "__main__":
    sys.exit(main())
