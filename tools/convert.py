"""Makes a folder that `transformers` loads of a checkpoint that either backend saved on any layout.

    uv run tools/convert.py results/my_run/step_20 my-model
    uv run tools/convert.py results/my_run my-model --dtype float32        the latest of a folder

For checkpoints without an `hf/` of their own (`checkpointing.model_save_format=null`), or to have
it in another dtype or in smaller files. Every byte of the checkpoint is verified first, one file of
the result is in memory at a time, and what was written is read again and compared.

There is no way back, since none is needed: `policy.model_name=FOLDER` trains from such a folder.
Nor one to the other backend: both read the same checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_like.checkpoint import layout, manifest
from nemo_like.checkpoint.files import read_json, remove_tree
from nemo_like.checkpoint.hf_export import write_hf
from nemo_like.checkpoint.hf_import import read_hf
from nemo_like.checkpoint.store import read_tensors, stored_tensors
from nemo_like.config.policy import TokenizerConfig
from nemo_like.data.tokenizer import load_tokenizer
from nemo_like.errors import CheckpointError, ConfigError
from nemo_like.weight_sync.digest import tensor_digest
from tools.checkpoint import config_of, steps_of
from tools.command_line import Parser, run

WEIGHTS = "weights/"
"""How the names of the model's own tensors begin in a checkpoint."""
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a step_N, or a folder of them: its latest")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: the run's policy.precision"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="name or folder; default: the tokenizer of the run"
    )
    parser.add_argument(
        "--max-file-gb", type=float, default=5.0, help="of a file with weights; default: 5"
    )
    return run(parser, argv, _convert)


def _convert(options: argparse.Namespace) -> int:
    out: Path = options.out
    if out.exists():
        raise ConfigError(f"{out} exists already; expected the name of a new folder")
    if options.max_file_gb <= 0:
        raise ConfigError(f"--max-file-gb {options.max_file_gb:g}: expected a number above 0")
    step = steps_of(options.checkpoint)[-1]
    policy = config_of(step).get("policy", {})
    tokenizer = _tokenizer(policy, options.tokenizer, step)
    manifest.verify(step)
    print(f"{step} is whole")

    written = Written()
    draft = out.with_name(f"tmp_{out.name}")  # it gets its name when it is whole
    config = read_json(step / layout.STATE)["model"]
    try:
        write_hf(
            draft,
            written.noted(_weights(step / layout.MODEL, options.dtype or policy.get("precision"))),
            config=config,
            tokenizer=tokenizer,
            max_shard_bytes=int(options.max_file_gb * 1e9),
        )
        count = written.compare(draft, tied=bool(config.get("tie_word_embeddings")))
        draft.rename(out)
    finally:
        if draft.exists():
            remove_tree(draft)
    print(f"wrote {count} tensors to {out}, and read them again; policy.model_name={out}")
    return 0


@dataclass
class Written:
    """What was written, remembered by shapes and digests."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def noted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, remembered as they pass."""
        for name, tensor in weights:
            self.shapes[name], self.digests[name] = tuple(tensor.shape), tensor_digest(tensor)
            yield name, tensor

    def compare(self, folder: Path, *, tied: bool) -> int:
        """How many tensors a folder has, all of them as they were.

        Raises:
            CheckpointError: one is missing, or another than it was.
        """
        names = []
        for name, tensor in read_hf(folder, self.shapes, tied=tied):
            if tensor_digest(tensor) != self.digests[name]:
                raise CheckpointError(f"{name} came back from {folder} other than it was written")
            names.append(name)
        return len(names)


def _tokenizer(policy: dict[str, Any], name: str | None, step: Path) -> Any:
    if name is None and not policy:
        raise ConfigError(f"{step} does not say which tokenizer it was trained with: --tokenizer")
    settings = TokenizerConfig(**policy.get("tokenizer", {}) | ({"name": name} if name else {}))
    try:
        return load_tokenizer(settings, policy.get("model_name", ""))
    except ConfigError as error:
        raise ConfigError(f"{error} (or name one by --tokenizer)") from error


def _weights(folder: Path, dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by Hugging Face name, one in memory."""
    names = [name for name in stored_tensors(folder) if name.startswith(WEIGHTS)]
    for name, tensor in read_tensors(folder, names):
        kept = tensor if dtype is None else tensor.to(getattr(torch, dtype))
        yield name.removeprefix(WEIGHTS), kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
