"""CPU-seconds of one optimizer step: ours, against torch.optim.Muon with fused AdamW.

    OMP_NUM_THREADS=1 python tools/benchmarks/muon.py [--repeats 7] [--models tiny small]

Weights and gradients of a Qwen2-shaped model are fixed; what is timed is `step()` alone. Both sides
use the coefficients of `simple`, five steps, bf16, and the scale `match_rms_adamw`; repeats are
interleaved. Printed are median, least and most of the CPU time, and how far both sides' first
updates are apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nemo_like.config.optimizer import OptimizerConfig
from nemo_like.optim.build import build_optimizer

MODELS = {"tiny": (256, 4, 768), "small": (512, 8, 1408)}
VOCABULARY = 2048
LR, DECAY = 1e-3, 0.1


def parameters_of(model: str) -> dict[str, nn.Parameter]:
    """A tied Qwen2-shaped model with half as many key-value heads, by name, with gradients."""
    hidden, layers, inner = MODELS[model]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(layers):
        shapes |= {
            f"layers.{i}.q_proj.weight": (hidden, hidden),
            f"layers.{i}.k_proj.weight": (hidden // 2, hidden),
            f"layers.{i}.v_proj.weight": (hidden // 2, hidden),
            f"layers.{i}.o_proj.weight": (hidden, hidden),
            f"layers.{i}.gate_proj.weight": (inner, hidden),
            f"layers.{i}.up_proj.weight": (inner, hidden),
            f"layers.{i}.down_proj.weight": (hidden, inner),
            f"layers.{i}.input_layernorm.weight": (hidden,),
            f"layers.{i}.post_attention_layernorm.weight": (hidden,),
        }
    torch.manual_seed(0)
    made = {name: nn.Parameter(0.02 * torch.randn(shape)) for name, shape in shapes.items()}
    for p in made.values():
        p.grad = 1e-3 * torch.randn_like(p)
    return made


def ours(name: str, parameters: dict[str, nn.Parameter]) -> Callable[[], object]:
    """The step of our optimizer."""
    config = OptimizerConfig(
        optimizer=name,
        lr=LR,
        weight_decay=DECAY,
        muon_coefficient_type="simple",
        muon_use_nesterov=True,
    )
    return build_optimizer(parameters.items(), config)[0].step


def torch_muon(parameters: dict[str, nn.Parameter]) -> Callable[[], object]:
    """The steps of torch.optim.Muon and torch.optim.AdamW(fused=True), one after the other."""
    hidden = [p for name, p in parameters.items() if "proj" in name]
    rest = [p for name, p in parameters.items() if "proj" not in name]
    muon = torch.optim.Muon(hidden, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=LR, weight_decay=DECAY, fused=True)
    return lambda: (muon.step(), adamw.step())


def torch_adamw(parameters: dict[str, nn.Parameter]) -> Callable[[], object]:
    """The step of torch.optim.AdamW(fused=True)."""
    return torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=DECAY, fused=True).step


def cpu_ms(step: Callable[[], object], calls: int) -> float:
    """CPU milliseconds of one call, averaged over several."""
    start = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - start) / calls * 1e3


def first_update(
    make: Callable[[dict[str, nn.Parameter]], Callable[[], object]], model: str
) -> Tensor:
    """What the first step changes, of all parameters in one vector."""
    parameters = parameters_of(model)
    before = torch.cat([p.detach().flatten() for p in parameters.values()])
    make(parameters)()
    return torch.cat([p.detach().flatten() for p in parameters.values()]) - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"load average {os.getloadavg()[0]:.1f}, one thread, CPU ms per step: median (least-most)"
    )
    for model in options.models:
        sides = {
            "ours muon": lambda p: ours("muon", p),
            "torch Muon + AdamW": torch_muon,
            "ours adamw": lambda p: ours("adam", p),
            "torch AdamW fused": torch_adamw,
        }
        steps = {name: make(parameters_of(model)) for name, make in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(2 + options.repeats):
            for name, step in steps.items():
                spent = cpu_ms(step, 3 if "uon" in name else 20)
                if repeat >= 2:
                    times[name].append(spent)
        for name, values in times.items():
            middle = statistics.median(values)
            print(f"{model:6} {name:20} {middle:9.2f} ({min(values):.2f}-{max(values):.2f})")
        mine, theirs = first_update(sides["ours muon"], model), first_update(torch_muon, model)
        print(f"{model:6} first updates differ by {(mine - theirs).norm() / theirs.norm():.2%}")


if __name__ == "__main__":
    main()
