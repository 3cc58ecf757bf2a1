"""What one step of Muon costs and how exact it is: ours, torch's, pytorch_optimizer's; and AdamW.

    OMP_NUM_THREADS=1 uv run tools/benchmarks/muon.py [--models tiny small qwen2.5-7b] [--repeats 7]
    OMP_NUM_THREADS=1 uv run --with pytorch_optimizer tools/benchmarks/muon.py
    uv run tools/benchmarks/muon.py --device cuda
    uv run tools/benchmarks/muon.py --precision

`tiny` and `small` are whole Qwen2-shaped models with fp32 weights; the others are one layer of the
model of that name. Gradients are fixed, and `step()` alone is timed: CPU time of one thread, or
seconds of the GPU. Repeats of all sides are interleaved, and a ratio is the median of the ratios to
torch's Muon of the same repeat. Where nothing else is said, Newton-Schulz is in bf16 with the five
steps of `simple`, which is what the others use.

Errors are of the first update, over all matrices up to a size, and up to the factor that fits best:
`to fp64` is the distance to the same steps in fp64, `to polar` that to the exact polar factor, both
relative. `--precision` prints the first for each schedule on matrices of known condition instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nemo_like.config.optimizer import CoefficientType, OptimizerConfig
from nemo_like.optim.build import build_optimizer
from nemo_like.optim.newton_schulz import Polynomial, coefficients, polar

Parameters = dict[str, nn.Parameter]
Step = Callable[[], object]
Make = Callable[[Parameters], Step]

# hidden, key-value rows, inner, layers, vocabulary
MODELS = {
    "tiny": (256, 128, 768, 4, 2048),
    "small": (512, 256, 1408, 8, 2048),
    "qwen2.5-0.5b": (896, 128, 4864, 1, 0),
    "qwen2.5-1.5b": (1536, 256, 8960, 1, 0),
    "qwen2.5-7b": (3584, 512, 18944, 1, 0),
}
LR = 1e-3
SCHEDULES: dict[CoefficientType, int] = {
    "simple": 5,
    "minimax": 4,
    "quintic": 5,
    "polar_express": 5,
    "cans": 5,
    "cubic5": 5,
}
LARGEST_CHECKED = 4e9
"""Rows x columns x the smaller of them, up to which a matrix is compared with fp64."""


def parameters_of(model: str, device: str) -> Parameters:
    """The weights of a tied model, or of one layer, by name, with gradients."""
    hidden, narrow, inner, layers, vocabulary = MODELS[model]
    shapes: dict[str, tuple[int, ...]] = {}
    if vocabulary:
        shapes["embed_tokens.weight"] = (vocabulary, hidden)
    for i in range(layers):
        shapes |= {
            f"layers.{i}.q_proj.weight": (hidden, hidden),
            f"layers.{i}.k_proj.weight": (narrow, hidden),
            f"layers.{i}.v_proj.weight": (narrow, hidden),
            f"layers.{i}.o_proj.weight": (hidden, hidden),
            f"layers.{i}.gate_proj.weight": (inner, hidden),
            f"layers.{i}.up_proj.weight": (inner, hidden),
            f"layers.{i}.down_proj.weight": (hidden, inner),
            f"layers.{i}.input_layernorm.weight": (hidden,),
            f"layers.{i}.post_attention_layernorm.weight": (hidden,),
        }
    torch.manual_seed(0)
    made = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    for p in made.values():
        p.data, p.grad = p.data.to(device), 1e-3 * torch.randn(p.shape).to(device)
    return made


def ours(schedule: CoefficientType, **settings: object) -> Make:
    """The step of our Muon."""
    config = OptimizerConfig.model_validate(
        {
            "optimizer": "muon",
            "lr": LR,
            "weight_decay": 0.1,
            "muon_coefficient_type": schedule,
            "muon_num_ns_steps": SCHEDULES[schedule],
            "muon_use_nesterov": True,
        }
        | settings
    )
    return lambda parameters: build_optimizer(parameters.items(), config)[0].step


def torch_muon(parameters: Parameters) -> Step:
    """The steps of torch.optim.Muon and torch.optim.AdamW(fused=True), one after the other."""
    hidden, rest = split(parameters)
    muon = torch.optim.Muon(hidden, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=LR, weight_decay=0.1, fused=True)
    return lambda: (muon.step(), adamw.step())


def pytorch_optimizer_muon(parameters: Parameters) -> Step:
    """The step of pytorch_optimizer's Muon, which has an AdamW of its own."""
    from pytorch_optimizer import Muon

    hidden, rest = split(parameters)
    groups = [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}]
    return Muon(groups, lr=LR, weight_decay=0.1, nesterov=True, use_adjusted_lr=True).step


def torch_adamw(parameters: Parameters) -> Step:
    """The step of torch.optim.AdamW(fused=True)."""
    return torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.1, fused=True).step


def split(parameters: Parameters) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Muon's parameters, and AdamW's."""
    hidden = [p for name, p in parameters.items() if "proj" in name]
    return hidden, [p for name, p in parameters.items() if "proj" not in name]


def sides() -> dict[str, tuple[Make, tuple[Polynomial, ...] | None]]:
    """What is compared, and the polynomials that each side's Newton-Schulz should follow."""
    simple, quintic = coefficients("simple", 5), coefficients("quintic", 5)
    found = {
        "torch Muon + AdamW fused": (torch_muon, simple),
        "ours": (ours("simple"), simple),
        "ours, quintic": (ours("quintic"), quintic),
        "ours, minimax": (ours("minimax"), coefficients("minimax", 4)),
        "torch AdamW fused": (torch_adamw, None),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        found["pytorch_optimizer Muon"] = (pytorch_optimizer_muon, simple)
    return found


def milliseconds(step: Step, device: str, calls: int) -> float:
    """CPU time of one call, or on a GPU the time until it is done; averaged over several."""
    clock = time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
        clock = time.perf_counter
    start = clock()
    for _ in range(calls):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / calls * 1e3


def errors(make: Make, rows: tuple[Polynomial, ...], model: str, device: str) -> tuple[float, ...]:
    """Distances of the first update to the same steps in fp64, and to the exact polar factor."""
    parameters = parameters_of(model, device)
    make(parameters)()
    found: list[tuple[float, float]] = []
    seen: set[torch.Size] = set()
    for p in split(parameters)[0]:
        if p.shape not in seen and p.numel() * min(p.shape) <= LARGEST_CHECKED:
            seen.add(p.shape)
            assert p.grad is not None  # the weight was zero before
            G, update = p.grad.double(), -p.detach().double()
            exact = polar(G, rows=rows, dtype=torch.float64)
            left, _, right = torch.linalg.svd(G, full_matrices=False)
            found.append((apart(update, exact), apart(update, left @ right)))
    return tuple(statistics.mean(column) for column in zip(*found, strict=True))


def apart(found: Tensor, wanted: Tensor) -> float:
    """The distance of two matrices relative to the second, at the best factor of the first."""
    factor = (found * wanted).sum() / found.square().sum()
    return ((factor * found - wanted).norm() / wanted.norm()).item()


def compare(model: str, device: str, repeats: int) -> Iterator[str]:
    """Lines of the table of one model."""
    compared = sides()
    steps = {name: make(parameters_of(model, device)) for name, (make, _) in compared.items()}
    calls = dict.fromkeys(steps, 1)
    for name, step in steps.items():
        step()
        calls[name] = max(1, round(200 / milliseconds(step, device, 1)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(milliseconds(step, device, calls[name]))
    first = times[next(iter(times))]
    for name, (make, rows) in compared.items():
        ratio = statistics.median(t / r for t, r in zip(times[name], first, strict=True))
        line = f"| {model} | {name} | {statistics.median(times[name]):.2f} | {ratio:.3f} |"
        if rows is not None:
            to_fp64, to_polar = errors(make, rows, model, device)
            yield f"{line} {to_fp64:.2%} | {to_polar:.1%} |"
        else:
            yield f"{line} | |"


def precision() -> Iterator[str]:
    """Lines of the table of errors against fp64, by schedule, type and condition."""
    conditions = (1e1, 1e2, 1e3, 1e5)
    yield "| schedule | type | Gaussian | " + " | ".join(f"{c:.0e}" for c in conditions) + " |"
    yield "|---|---|---|" + "---|" * len(conditions)
    torch.manual_seed(0)
    rows, columns = 256, 1024
    left, right = (torch.linalg.qr(torch.randn(n, rows).double())[0] for n in (rows, columns))
    matrices = [torch.randn(rows, columns).double()]
    for condition in conditions:
        values = torch.logspace(0, -torch.tensor(condition).log10().item(), rows).double()
        matrices.append(left * values @ right.T)
    for schedule, count in SCHEDULES.items():
        polynomials = coefficients(schedule, count)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            cells = []
            for X in matrices:
                exact = polar(X, rows=polynomials, dtype=torch.float64)
                found = polar(X.float(), rows=polynomials, dtype=dtype).double()
                cells.append(f"{((found - exact).norm() / exact.norm()).item():.1e}")
            yield f"| {schedule} | {str(dtype)[6:]} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "small"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.precision:
        print("\n".join(precision()))
        return
    warm_allocator()
    print(f"load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {options.device}\n")
    print("| model | step | ms | ratio | to fp64 | to polar |\n|---|---|---|---|---|---|")
    for model in options.models:
        for line in compare(model, options.device, options.repeats):
            print(line, flush=True)


def warm_allocator() -> None:
    """Leave the C library's allocator as a training step does, which frees large activations.

    Until it has seen one it gives large blocks back to the system at once, and both sides would be
    timed faulting in their temporary pages again and again.
    """
    held = [torch.ones(2**21) for _ in range(4)]
    del held


if __name__ == "__main__":
    main()
