"""NeMo-RL's `{name: torch.optim.AdamW, kwargs: {...}}` and its lists of schedulers, flattened."""

from __future__ import annotations

from typing import Any

from nemo_like.config.draft import Draft, split
from nemo_like.config.optimizer import OptimizerConfig

BLOCK, SCHEDULE = "policy.optimizer", "policy.scheduler"

Arguments = dict[str, tuple[str, ...]]
_SHARED: Arguments = {"lr": ("lr",), "weight_decay": ("weight_decay",)}
ADAM = _SHARED | {"eps": ("adam_eps",), "betas": ("adam_beta1", "adam_beta2")}
SGD = _SHARED | {"momentum": ("sgd_momentum",)}
MUON = _SHARED | {
    "momentum": ("muon_momentum",),
    "nesterov": ("muon_use_nesterov",),
    "ns_steps": ("muon_num_ns_steps",),
    "adjust_lr_fn": ("muon_scale_mode",),
}
DEFAULT_NAME = "torch.optim.AdamW"
OPTIMIZERS: dict[str, tuple[str, Arguments]] = {
    DEFAULT_NAME: ("adam", ADAM),
    "torch.optim.adamw.AdamW": ("adam", ADAM),
    "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam": ("adam", ADAM),
    "torch.optim.SGD": ("sgd", SGD),
    "torch.optim.Muon": ("muon", MUON),
}
"""Dotted class -> our name, and our names of what its arguments hold."""

KERNEL_CHOICES = ("foreach", "fused", "capturable", "differentiable", "master_weights")
"""Arguments that choose among kernels of equal results; master weights are always kept."""


def translate_optimizer(draft: Draft) -> None:
    """Flatten `policy.optimizer.{name, kwargs}`, which may also be given in parts by overrides."""
    has_name, name = draft.find(f"{BLOCK}.name")
    has_kwargs, kwargs = draft.find(f"{BLOCK}.kwargs")
    if not has_name and not has_kwargs:
        return
    if has_name and name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        draft.refuse(f"{BLOCK}.name", f"is not one of {known}; or use policy.optimizer.optimizer")
    elif has_kwargs and not isinstance(kwargs, dict):
        draft.refuse(f"{BLOCK}.kwargs", "must be a mapping of arguments")
    else:
        ours, names = OPTIMIZERS[name if has_name else DEFAULT_NAME]
        if has_name:
            draft.put(f"{BLOCK}.optimizer", ours, draft.origin(f"{BLOCK}.name"))
        for key in list(kwargs or {}):
            _translate_argument(draft, key, names)
    for part in ("name", "kwargs"):
        if draft.find(f"{BLOCK}.{part}")[0]:
            draft.take(f"{BLOCK}.{part}")


def _translate_argument(draft: Draft, key: str, names: Arguments) -> None:
    path = (*split(f"{BLOCK}.kwargs"), key)
    value, origin = draft.find(path)[1], draft.origin(path)
    if key in KERNEL_CHOICES:
        return
    ours = names.get(key, ())
    values = [value] if len(ours) == 1 else value
    if not ours:
        draft.refuse(path, f"the arguments that have an equal here are {', '.join(names)}")
    elif not isinstance(values, list) or len(values) != len(ours):
        draft.refuse(path, f"must be a list of {len(ours)}: {' and '.join(ours)}")
    else:
        for name, one in zip(ours, values, strict=True):
            draft.put(f"{BLOCK}.{name}", one, origin)


def targets(path: str, optimizer: Any) -> tuple[str, ...]:
    """The keys that an argument of an optimizer becomes, by their paths; nothing for others."""
    block, _, key = path.rpartition(".")
    _, names = OPTIMIZERS.get(optimizer, OPTIMIZERS[DEFAULT_NAME])
    return tuple(f"{BLOCK}.{name}" for name in names.get(key, ()) if block == f"{BLOCK}.kwargs")


def translate_scheduler(draft: Draft) -> None:
    """Flatten a list of torch schedulers: a linear warm-up, then one constant or one decay."""
    found, stages = draft.find(SCHEDULE)
    if isinstance(stages, dict) and "name" in stages:
        stages = [stages]
    if not found or not isinstance(stages, list):
        return
    has_lr, lr = draft.find(f"{BLOCK}.lr")
    try:
        fields = _flatten(stages, float(lr if has_lr else OptimizerConfig().lr))
    except (KeyError, TypeError, ValueError) as error:
        names = "use the names of --help policy.scheduler instead"
        draft.refuse(SCHEDULE, f"this list has no equal here ({error}); {names}")
        return
    origin = draft.origin(SCHEDULE)
    draft.take(SCHEDULE)
    draft.origins.pop(("policy", "scheduler"), None)
    for path, value in fields.items():
        draft.put(path, value, origin)


def _flatten(stages: list[Any], lr: float) -> dict[str, Any]:
    """Our keys for a warm-up (if there is one) and the stage after it (if there is one)."""
    parts = [(s["name"].rpartition(".")[2], s.get("kwargs") or {}) for s in stages if "name" in s]
    milestones = [m for s in stages for m in s.get("milestones", ())]
    fields: dict[str, Any] = {}
    warmup = 0
    if parts and _is_warm_up(*parts[0]):
        kwargs = parts.pop(0)[1]
        warmup = kwargs.get("total_iters", 5)
        fields[f"{SCHEDULE}.lr_warmup_iters"] = warmup
        fields[f"{SCHEDULE}.lr_warmup_init"] = kwargs.get("start_factor", 1 / 3) * lr
        if milestones not in ([], [warmup]):
            raise ValueError(f"the warm-up ends at {warmup}, not at {milestones}")
    if len(parts) > 1:
        raise ValueError("after the warm-up there is one stage")
    return fields | (_decay(*parts[0], lr, warmup) if parts else {})


def _is_warm_up(name: str, kwargs: dict[str, Any]) -> bool:
    rises = kwargs.get("start_factor", 1 / 3) < kwargs.get("end_factor", 1.0) == 1
    return name == "LinearLR" and rises


def _decay(name: str, kwargs: dict[str, Any], lr: float, warmup: int) -> dict[str, Any]:
    if name == "ConstantLR" and kwargs.get("factor", 1 / 3) == 1:
        return {f"{SCHEDULE}.lr_decay_style": "constant"}
    if name == "CosineAnnealingLR":
        style, length, end = "cosine", kwargs["T_max"], kwargs.get("eta_min", 0.0)
    elif name == "LinearLR" and kwargs.get("start_factor", 1 / 3) == 1:
        style, length, end = "linear", kwargs["total_iters"], kwargs["end_factor"] * lr
    else:
        raise ValueError(f"{name} with {kwargs}")
    return {
        f"{SCHEDULE}.lr_decay_style": style,
        f"{SCHEDULE}.lr_decay_iters": warmup + length,
        f"{BLOCK}.min_lr": end,
    }
