"""One torch optimizer whose parameter groups each say which algorithm updates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from nemo_like.errors import CheckpointError, ConfigError
from nemo_like.optim.muon import MuonRule
from nemo_like.optim.norm import local, local_squares, total_over_shards

STATE_TENSORS = {
    "muon": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}
"""What an algorithm remembers about a parameter, in tensors that are laid out like it."""


class CombinedOptimizer(Optimizer):
    """AdamW, SGD and Muon side by side, each on the parameter groups that name it.

    A group is `{"algorithm", "params": [(name, parameter), ...], "lr", "weight_decay", ...}` with
    the algorithm's own settings: `rule` (a `MuonRule`) for muon; `betas` and `eps` for adamw;
    `momentum` for sgd. State exists from the beginning, so that a checkpoint of step 0 has the
    shape of every other, in the type of the weights (fp32). Parameters may be DTensors of any
    placements. A parameter without a gradient is left alone; gradients are only read.

    Raises:
        ConfigError: a parameter is held in half precision, or twice.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(list(groups), defaults={})
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.dtype not in (torch.float32, torch.float64):
                    raise ConfigError(
                        f"{name} is held in {parameter.dtype}, expected fp32 master weights, since "
                        "small steps would be rounded away; policy.precision is for computation"
                    )
                state = self.state[parameter]
                for key in STATE_TENSORS[group["algorithm"]]:
                    state[key] = torch.zeros_like(parameter, requires_grad=False)
                if group["algorithm"] == "adamw":
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        self._stepped: dict[str, _Stepped] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped = {}
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                done = _Stepped(group, parameters, group["lr"])
                STEPS[group["algorithm"]](done, self.state)
                self._stepped[group["algorithm"]] = done
        return loss

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Root mean square of the last update, and its size relative to the weights, per algorithm.

        Decay is not counted. It costs a pass over the parameters and one wait for the device, and
        is a collective when they are sharded: ask on every rank, and not more often than you look
        at it.
        """
        names: list[str] = []
        values: list[Tensor] = []
        for algorithm, done in self._stepped.items():
            update = total_over_shards(done.update_squares(self.state), done.parameters)
            weights = total_over_shards(local_squares(done.parameters), done.parameters)
            count = sum(p.numel() for p in done.parameters)
            names += [f"{algorithm}/update_rms", f"{algorithm}/update_to_weight"]
            values += [done.lr * (update / count).sqrt(), done.lr * (update / weights).sqrt()]
        return dict(zip(names, torch.stack(values).tolist(), strict=True)) if values else {}

    def state_tree(self) -> dict[str, Any]:
        """The state by parameter name: `{"state": {name: {key: tensor}}, "steps": {name: int}}`.

        The tensors are the live ones, laid out like the parameters; `steps` counts the updates of
        AdamW.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        counters: dict[str, Tensor] = {}
        for group, name, parameter in self._entries():
            state = self.state[parameter]
            tensors[name] = {key: state[key] for key in STATE_TENSORS[group["algorithm"]]}
            if "step" in state:
                counters[name] = state["step"]
        counts = torch.stack(list(counters.values())).tolist() if counters else []
        return {"state": tensors, "steps": dict(zip(counters, map(int, counts), strict=True))}

    @torch.no_grad()
    def load_state_tree(self, tree: Mapping[str, Any]) -> None:
        """Take a tree of `state_tree`'s shape as the new state, bit for bit.

        Raises:
            CheckpointError: names, kinds or shapes are not those of this optimizer.
        """
        own = self.state_tree()
        problems = _differences(own, tree)
        if problems:
            raise CheckpointError(
                "the optimizer state does not fit this run: " + "; ".join(problems[:5])
            )
        for name, tensors in own["state"].items():
            for key, tensor in tensors.items():
                if tree["state"][name][key] is not tensor:
                    tensor.copy_(tree["state"][name][key])
        for _, name, parameter in self._entries():
            if name in own["steps"]:
                self.state[parameter]["step"].fill_(tree["steps"][name])

    def _entries(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        return [
            (group, name, parameter)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]


def _differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    found = []
    for name in sorted(own["state"].keys() | other["state"].keys()):
        mine, theirs = own["state"].get(name), other["state"].get(name)
        if mine is None or theirs is None:
            found.append(f"{name} is {'unknown here' if mine is None else 'missing'}")
        elif mine.keys() != theirs.keys():
            found.append(f"{name} has {', '.join(theirs)}, expected {', '.join(mine)}")
        elif any(mine[key].shape != theirs[key].shape for key in mine):
            found.append(f"{name} has another shape")
    if not found and own["steps"].keys() != other["steps"].keys():
        found.append("the step counts are of other parameters")
    return found


class _Stepped:
    """What one group did in the last step, kept for metrics to be worked out when asked for."""

    def __init__(self, group: dict[str, Any], parameters: list[Tensor], lr: float) -> None:
        self.group, self.parameters, self.lr = group, parameters, lr
        self.norms: list[Tensor] | None = None

    def update_squares(self, states: Mapping[Tensor, dict[str, Tensor]]) -> Tensor:
        """The sum of squares of this rank's part of each update, for a learning rate of one."""
        if self.norms is not None:
            return torch.stack(self.norms).double().square_()
        if self.group["algorithm"] == "sgd":
            return local_squares([states[p]["momentum_buffer"] for p in self.parameters])
        norms = [self._adamw_norm(states[p]) for p in self.parameters]
        return torch.stack(norms).double().square_()

    def _adamw_norm(self, state: Mapping[str, Tensor]) -> Tensor:
        """The norm of AdamW's last update of one parameter: a function of what it remembers."""
        beta1, beta2 = self.group["betas"]
        step = state["step"].double()  # in fp32, 1 - 0.999^step is good to 4 digits only
        ratio = local(state["exp_avg_sq"]).sqrt()
        ratio.div_((1 - beta2**step).sqrt()).add_(self.group["eps"])
        torch.div(local(state["exp_avg"]), ratio, out=ratio)
        return ratio.norm() / (1 - beta1**step)


States = Mapping[Tensor, dict[str, Tensor]]


def _step_muon(done: _Stepped, states: States) -> None:
    rule: MuonRule = done.group["rule"]
    momenta = [states[p]["momentum_buffer"] for p in done.parameters]
    done.norms = rule.step(
        done.parameters, momenta, lr=done.lr, weight_decay=done.group["weight_decay"]
    )


def _step_adamw(done: _Stepped, states: States) -> None:
    """One step of AdamW by torch's fused kernel, on this rank's parts.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, by `torch.optim.adamw`.
    """
    beta1, beta2 = done.group["betas"]
    adamw(
        [local(p) for p in done.parameters],
        [local(p.grad) for p in done.parameters if p.grad is not None],
        [local(states[p]["exp_avg"]) for p in done.parameters],
        [local(states[p]["exp_avg_sq"]) for p in done.parameters],
        [],
        [states[p]["step"] for p in done.parameters],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=done.lr,
        weight_decay=done.group["weight_decay"],
        eps=done.group["eps"],
        maximize=False,
    )


def _step_sgd(done: _Stepped, states: States) -> None:
    """One step of SGD with heavy-ball momentum and decoupled weight decay.

    Source: `torch.optim.SGD`. Changed: weight decay acts on the weights, not on the gradient.
    """
    weights = [local(p) for p in done.parameters]
    buffers = [local(states[p]["momentum_buffer"]) for p in done.parameters]
    torch._foreach_mul_(buffers, done.group["momentum"])
    torch._foreach_add_(buffers, [local(p.grad) for p in done.parameters if p.grad is not None])
    if done.group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - done.lr * done.group["weight_decay"])
    torch._foreach_add_(weights, buffers, alpha=-done.lr)


STEPS: dict[str, Callable[[_Stepped, States], None]] = {
    "muon": _step_muon,
    "adamw": _step_adamw,
    "sgd": _step_sgd,
}
