"""One torch optimizer whose parameter groups each say which algorithm updates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from nemo_like.errors import CheckpointError, ConfigError
from nemo_like.optim.diagnostics import sizes
from nemo_like.optim.layout import Layout, layout_of
from nemo_like.optim.muon import Muon, observations
from nemo_like.optim.norm import local, local_squares, total_over_ranks

STATE_TENSORS = {
    "muon": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}
"""What an algorithm remembers about a parameter, in tensors that are laid out like it."""


class CombinedOptimizer(Optimizer):
    """AdamW, SGD and Muon side by side, each on the parameter groups that name it.

    A group is `{"algorithm", "params": [(name, parameter), ...], "lr", "weight_decay", ...}` with
    the algorithm's own settings: `rule` (a `MuonRule`) and `views` (one per parameter) for muon;
    `betas` and `eps` for adamw; `momentum` for sgd. State exists from the beginning, so that a
    checkpoint of step 0 has the shape of every other, in the type of the weights (fp32). Parameters
    may be DTensors of any placements, or plain tensors that are a rank's part of a whole one:
    `layout` says which. Those who hold copies of a matrix share Muon's work. A group may be empty,
    where other ranks have parameters for it. A parameter without a gradient is left alone;
    gradients are only read.

    `watch` asks the steps that follow to keep what `metrics` tells of them.

    Raises:
        ConfigError: a parameter is held in half precision.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        layout: Callable[[Tensor], Layout] = layout_of,
    ) -> None:
        super().__init__([{"param_names": []} | group for group in groups], defaults={})
        rank = dist.get_rank() if dist.is_initialized() else 0
        layouts: list[list[Layout]] = []
        for group in self.param_groups:
            layouts.append([layout(parameter) for parameter in group["params"]])
            blocks = [own.held_by(rank) for own in layouts[-1]]
            group["copies"] = [1 if block is None else len(block.holders) for block in blocks]
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
        held = [local(p).device for group in self.param_groups for p in group["params"]]
        self._device = held[0] if held else torch.device("cpu")
        self.watch = self._is_watched = False
        self._muons = [
            _muons_of(group, own) if group["algorithm"] == "muon" else []
            for group, own in zip(self.param_groups, layouts, strict=True)
        ]
        self._stepped: list[tuple[list[Tensor], float]] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped, self._is_watched = [], self.watch
        for group, muons in zip(self.param_groups, self._muons, strict=True):
            lr, decay = group["lr"], group["weight_decay"]
            for muon in muons:
                momenta = [self.state[p]["momentum_buffer"] for p in muon.parameters]
                muon.step(momenta, lr=lr, weight_decay=decay, watch=self.watch)
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["algorithm"] != "muon":
                STEPS[group["algorithm"]](group, parameters, self.state)
            self._stepped.append((parameters, lr))
        return loss

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """How large the last step was, per algorithm and kind of matrix, if it was watched.

        `<algorithm>/update_rms` is the root mean square of the update, `update_to_weight` its size
        relative to the weights, decay not counted. Of Muon there is the same per kind of matrix,
        and what `diagnostics.spectrum` tells. It costs a pass over the parameters and one wait for
        the device, and is a collective when they are sharded: ask on every rank.
        """
        if not self._is_watched:
            return {}
        found: dict[str, Tensor] = {}
        for group, muons, (parameters, lr) in zip(
            self.param_groups, self._muons, self._stepped, strict=True
        ):
            if group["algorithm"] == "muon":
                found |= observations(muons, lr, self._device)
            else:
                found |= self._sizes_of(group, parameters, lr)
        # Weights may be kept on the CPU, and Muon's part is worked out on the GPU all the same.
        devices = {value.device for value in found.values()}
        place = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        values = [value.to(place) for value in found.values()]
        return dict(zip(found, torch.stack(values).tolist(), strict=True)) if values else {}

    def _sizes_of(
        self, group: dict[str, Any], parameters: list[Tensor], lr: float
    ) -> dict[str, Tensor]:
        # Every rank takes part in every sum, whatever it holds or has stepped itself.
        every, stepped = group["params"], set(map(id, parameters))
        table = torch.zeros(3, len(every), dtype=torch.float64, device=self._device)
        if parameters:
            places = [i for i, p in enumerate(every) if id(p) in stepped]
            table[0, places] = _update_squares(group, parameters, self.state)
            table[1, places] = local_squares(parameters)
            table[2, places] = table.new_tensor([float(local(p).numel()) for p in parameters])
        update, weights, count = total_over_ranks(table, group["copies"])
        if not float(count):
            return {}
        return sizes(group["algorithm"], lr, update=update, weights=weights, count=count)

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

    def state_dict(self) -> NoReturn:
        """Refused: torch's form is by number and holds what is no state; `state_tree` is by name.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("take state_tree(), and give it back to load_state_tree()")

    def load_state_dict(self, state_dict: Any) -> NoReturn:
        """Refused, as `state_dict`.

        Raises:
            NotImplementedError: always.
        """
        self.state_dict()

    @property
    def muons(self) -> list[Muon]:
        """Muon at work: one for each set of ranks that hold some of its parameters."""
        return [muon for muons in self._muons for muon in muons]

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


States = Mapping[Tensor, dict[str, Tensor]]


def _update_squares(group: dict[str, Any], parameters: list[Tensor], states: States) -> Tensor:
    """The sum of squares of this rank's part of each last update, for a learning rate of one."""
    if group["algorithm"] == "sgd":
        return local_squares([states[p]["momentum_buffer"] for p in parameters])
    norms = [_adamw_norm(group, states[p]) for p in parameters]
    return torch.stack(norms).double().square_()


def _adamw_norm(group: dict[str, Any], state: Mapping[str, Tensor]) -> Tensor:
    """The norm of AdamW's last update of one parameter: a function of what it remembers."""
    beta1, beta2 = group["betas"]
    step = state["step"].double()  # in fp32, 1 - 0.999^step is good to 4 digits only
    ratio = local(state["exp_avg_sq"]).sqrt()
    ratio.div_((1 - beta2**step).sqrt()).add_(group["eps"])
    torch.div(local(state["exp_avg"]), ratio, out=ratio)
    return ratio.norm() / (1 - beta1**step)


def _muons_of(group: dict[str, Any], layouts: Sequence[Layout]) -> list[Muon]:
    """Muon over a group's parameters: one for each set of ranks that hold some of them."""
    by_ranks: dict[tuple[int, ...], list[int]] = {}
    for i, layout in enumerate(layouts):
        by_ranks.setdefault(layout.ranks, []).append(i)
    named = list(zip(group["param_names"], group["params"], strict=True))
    return [
        Muon(
            group["rule"],
            [named[i] for i in positions],
            [group["views"][i] for i in positions],
            [layouts[i] for i in positions],
        )
        for positions in by_ranks.values()
    ]


def _step_adamw(group: dict[str, Any], parameters: list[Tensor], states: States) -> None:
    """One step of AdamW by torch's fused kernel, on this rank's parts.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, by `torch.optim.adamw`.
    """
    beta1, beta2 = group["betas"]
    adamw(
        [local(p) for p in parameters],
        [local(p.grad) for p in parameters if p.grad is not None],
        [local(states[p]["exp_avg"]) for p in parameters],
        [local(states[p]["exp_avg_sq"]) for p in parameters],
        [],
        [states[p]["step"] for p in parameters],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _step_sgd(group: dict[str, Any], parameters: list[Tensor], states: States) -> None:
    """One step of SGD with heavy-ball momentum and decoupled weight decay.

    Source: `torch.optim.SGD`. Changed: weight decay acts on the weights, not on the gradient.
    """
    weights = [local(p) for p in parameters]
    buffers = [local(states[p]["momentum_buffer"]) for p in parameters]
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, [local(p.grad) for p in parameters if p.grad is not None])
    if group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(weights, buffers, alpha=-group["lr"])


STEPS: dict[str, Callable[[dict[str, Any], list[Tensor], States], None]] = {
    "adamw": _step_adamw,
    "sgd": _step_sgd,
}
"""The algorithms that look at single elements, of which each rank updates its own."""
