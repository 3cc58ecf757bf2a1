r"""Makes a checkpoint of Hugging Face weights and of optimizer state that another program saved.

A run starts from it with `checkpointing.start_from=OUT/step_0`, on any layout:

    uv run tools/import_optimizer.py --weights model/ --out results/imported \
        --state muon.pt adamw.pt --names muon.txt adamw.txt

A state is what `torch.save(optimizer.state_dict(), file)` wrote. Which optimizers are understood
stands in `tools/foreign.py`. `--names` has one file of parameter names, a line for each,
per state; it is left out where the optimizer was made of `named_parameters()`. The program that
saved the state can write it:

    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    Path("muon.txt").write_text("\n".join(order))

Experts may be apart, as on the hub, or all in one tensor, as transformers hold them.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_like.backends.hf_models import hub_shapes, load_hf_config, new_hf_model
from nemo_like.checkpoint import rng
from nemo_like.checkpoint.checkpoints import Checkpoints, RunIdentity
from nemo_like.checkpoint.hf_import import read_hf
from nemo_like.checkpoint.layout import MODEL, OPTIMIZER
from nemo_like.checkpoint.manifest import RunLayout
from nemo_like.checkpoint.store import StateWriter
from nemo_like.config.run import CheckpointingConfig
from nemo_like.errors import CheckpointError, ConfigError
from nemo_like.ops.experts import apart
from tools.command_line import Parser, run
from tools.foreign import read_foreign


def main(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="a Hugging Face model folder")
    parser.add_argument("--state", type=Path, nargs="+", required=True, help="saved state_dicts")
    parser.add_argument("--names", type=Path, nargs="+", help="their parameters' names, in order")
    parser.add_argument("--out", type=Path, required=True, help="a new folder of checkpoints")
    return run(parser, argv, _import)


def _import(options: argparse.Namespace) -> int:
    names = options.names or [None] * len(options.state)
    if len(names) != len(options.state):
        raise ConfigError(
            f"--names takes one file per --state: found {len(names)} for {len(options.state)}"
        )
    made = make_checkpoint(
        options.weights, list(zip(options.state, names, strict=True)), out=options.out
    )
    print(f"wrote {made}; start from it with checkpointing.start_from={made}")
    return 0


def make_checkpoint(
    weights: Path, states: Sequence[tuple[Path, Path | None]], *, out: Path
) -> Path:
    """The folder of a checkpoint of step 0, in which no data have been read yet."""
    config = load_hf_config(weights, {}, backend_key="megatron_cfg")  # which has every family
    shapes = hub_shapes(config)
    held = new_hf_model(config, device="meta").named_parameters()
    known = shapes | {name: tuple(parameter.shape) for name, parameter in held}
    tree, owners = _read_states(states, known)
    if missing := sorted(shapes.keys() - owners.keys()):
        raise CheckpointError(
            f"the states lack {len(missing)} parameters of {weights}: {', '.join(missing[:5])}"
        )
    identity = RunIdentity(
        model=config.to_dict(),
        routing=owners,
        config_yaml=f"# imported from {', '.join(str(path) for path, _ in states)}\n",
        layout=RunLayout(world_size=1, threads_per_worker=torch.get_num_threads(), device="cpu"),
    )
    whole = dict(read_hf(weights, shapes, tied=config.tie_word_embeddings))
    model = {
        "weights": {name: tensor.float() for name, tensor in whole.items()},
        "progress": {"step": 0, "skipped_steps": 0},
    }
    kept = CheckpointingConfig(checkpoint_dir=str(out), keep_top_k=None)
    with Checkpoints(kept, identity) as checkpoints, StateWriter(asynchronous=False) as writer:
        folder = checkpoints.begin(0)
        writer.save(folder, {MODEL: model, OPTIMIZER: tree})
        rng.save(folder, rank=0, world_size=0)  # nobody's: each rank keeps that of its seed
        return checkpoints.commit(0, metrics={}, data={"data": None})


def _read_states(
    states: Sequence[tuple[Path, Path | None]], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Any], dict[str, str]]:
    tree: dict[str, Any] = {"state": {}, "steps": {}}
    owners: dict[str, str] = {}
    for path, names in states:
        saved = _load(path)
        listed = None if names is None else names.read_text(encoding="utf-8").split()
        try:
            part, part_owners = read_foreign(saved, shapes, listed)
            part, part_owners = _by_hub_names(part, part_owners)
            if twice := sorted(owners.keys() & part_owners.keys()):
                raise CheckpointError(f"{twice[0]} is in another state too")
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        tree = {kind: tree[kind] | part[kind] for kind in tree}
        owners |= part_owners
        counts = Counter(part_owners.values())
        print(f"{path}: " + ", ".join(f"{count} of {name}" for name, count in counts.items()))
        for group in saved["param_groups"]:
            print("  " + ", ".join(f"{k}={v}" for k, v in group.items() if k[:5] != "param"))
    return tree, owners


def _load(path: Path) -> Any:
    """What is in a file of `torch.save`, without executing it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} can not be read safely: {reason}") from error


def _by_hub_names(
    tree: Mapping[str, Any], owners: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The same in fp32, with the state of each expert by itself."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    whole_of: dict[str, str] = {}
    for whole, tensors in tree["state"].items():
        for key, tensor in tensors.items():
            for name, block in apart([(whole, tensor.float())]):
                if whole_of.setdefault(name, whole) != whole:
                    raise CheckpointError(f"{name} is there by itself and in {whole}")
                state.setdefault(name, {})[key] = block
    steps = {n: tree["steps"][w] for n, w in whole_of.items() if w in tree["steps"]}
    return {"state": state, "steps": steps}, {n: owners[w] for n, w in whole_of.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
