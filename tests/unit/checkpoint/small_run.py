"""A small run with everything that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_like.checkpoint import layout, rng
from nemo_like.checkpoint.checkpoints import Checkpoints, RunIdentity
from nemo_like.checkpoint.hf_export import write_hf
from nemo_like.checkpoint.manifest import RunLayout
from nemo_like.checkpoint.store import StateWriter

IDENTITY = RunIdentity(
    model={"hidden_size": 8, "layer_types": ("full", "full")},
    routing={"w": "muon", "embed": "adamw"},
    config_yaml="seed: 1\n",
    layout=RunLayout(world_size=1, threads_per_worker=1, device="cpu"),
)


def states_of(seed: int, width: int = 8) -> dict[str, Any]:
    """A model, and an optimizer like the real one: fp32 states by parameter name, plain groups."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        layout.MODEL: {"w": tensor(width, 6), "embed": tensor(5, width).bfloat16()},
        layout.OPTIMIZER: {
            "state": {
                "w": {"momentum": tensor(width, 6)},
                "embed": {
                    "exp_avg": tensor(5, width),
                    "exp_avg_sq": tensor(5, width),
                    "step": torch.tensor(3.0),
                },
            },
            "groups": {
                "muon": {"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "names": ["w"], "foreach": None}
            },
            "last_step": seed,
        },
    }


def write_step(checkpoints: Checkpoints, step: int, *, width: int = 8, **metrics: float) -> Path:
    """A whole checkpoint of this step; everything in it depends on the step."""
    folder = checkpoints.begin(step)
    states = states_of(step, width)
    with StateWriter(asynchronous=False) as writer:
        writer.save(folder, states)
    torch.manual_seed(step)
    rng.save(folder, rank=0, world_size=1)
    write_hf(folder / layout.HF, states[layout.MODEL].items(), config={"a": step}, tokenizer=None)
    return checkpoints.commit(
        step,
        metrics={name.replace("__", ":"): v for name, v in metrics.items()},
        data={"row": step},
    )
