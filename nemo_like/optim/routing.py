"""Which parameter goes to which optimizer, and why: every trainable parameter exactly once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from nemo_like.errors import ConfigError
from nemo_like.optim.layout import Layout, layout_of
from nemo_like.optim.views import WHOLE, View

Algorithm = Literal["muon", "adamw", "sgd"]

STATE_BYTES: dict[Algorithm, int] = {"adamw": 8, "muon": 4, "sgd": 4}
"""Bytes of fp32 optimizer state per parameter."""

NAME_RULES: tuple[tuple[str, str], ...] = (
    # A module called `gate_proj` or `gate_up_proj` is a hidden matrix; one called `gate` is a
    # router.
    ("bias", r"bias(\.weight)?$"),
    ("LoRA adapter", r"(^|[._])lora_"),
    ("norm", r"norm[^.]*(\.|$)|(^|\.)ln_?[^.]*\.weight$"),
    (
        "position table",
        r"(^|\.)(wpe|rel_pos_[hw]|[^.]*pos(itions?|itional)?_(emb|enc|bias|table)[^.]*)(\.|$)",
    ),
    ("learned tokens", r"(^|\.)(latents|latent_query|[^.]*(query|cls|mask|register)_tokens?)$"),
    ("embedding", r"(^|\.)(wte|[^.]*embed[^.]*)(\.|$)"),
    ("router", r"(^|\.)(router|gate|[^.]*(router|expert_gate))(\.|$)"),
    ("output head", r"(^|\.)(output_layer|embed_out|score|classifier|([^.]*_)?head)(\.|$)"),
    ("state-space parameter", r"(^|\.)(A_log|dt_bias|D)$"),
    # The last module counts: LFM2 calls a block `conv` that has matrices inside.
    ("convolution", r"conv[^.]*(\.weight)?$|(^|\.)patch[^.]*\."),
    ("experts flattened into one matrix", r"experts\.(mlp\.(w1|v1|w2)|weight[12])$"),
)
"""(reason, pattern): a matrix whose name matches is left to AdamW; first match wins.

Source: the exclusions of Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/) and of
Megatron-LM. Added: biases stored as matrices (stacked experts), tables of positions and learned
tokens, routers, LoRA, and the experts of DBRX and of Megatron's `GroupedMLP`, whose rows do not
say where one ends.
"""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who updates one parameter; `shape` and `numel` are of the whole tensor, over all ranks.

    `view` says into which matrices Muon cuts it. It is not stored: another backend packs otherwise.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    optimizer: Algorithm
    reason: str
    view: View = WHOLE


@dataclass(frozen=True)
class Routing:
    """Who owns what: a row per trainable parameter (tied ones once), in the order of the model."""

    rows: tuple[Owner, ...]

    def names(self, optimizer: Algorithm) -> tuple[str, ...]:
        """The parameters of one algorithm, in order."""
        return tuple(row.name for row in self.rows if row.optimizer == optimizer)

    def owners(self) -> dict[str, str]:
        """The optimizer of each parameter."""
        return {row.name: row.optimizer for row in self.rows}

    def to_json(self) -> list[dict[str, Any]]:
        """What a checkpoint stores, to be compared on resume."""
        return [
            {"name": r.name, "shape": list(r.shape), "optimizer": r.optimizer, "reason": r.reason}
            for r in self.rows
        ]


def embedding_names(model: nn.Module) -> frozenset[str]:
    """The parameters of all `nn.Embedding` modules: evidence that is better than their names."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    )


def route(
    named_parameters: Iterable[tuple[str, Tensor]],
    optimizer: Algorithm,
    *,
    embeddings: Iterable[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    view: Callable[[Sequence[str], Sequence[int]], View] = lambda names, shape: WHOLE,
    layout: Callable[[Tensor], Layout] = layout_of,
) -> Routing:
    """One row per trainable parameter; with `adamw` or `sgd` that algorithm takes them all.

    `view` is asked, for Muon's parameters alone, how one of these names and this shape is cut.
    `layout` says what a tensor is a part of.

    Raises:
        ConfigError: nothing is trainable, or an `include` or `exclude` pattern is not a regular
            expression, matches nothing, or asks for the impossible.
    """
    owners: dict[int, tuple[Tensor, list[str]]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            owners.setdefault(id(parameter), (parameter, []))[1].append(name)
    if not owners:
        raise ConfigError("found no trainable parameter: all are frozen (requires_grad=False)")
    names = [name for _, own in owners.values() for name in own]
    takes = _Patterns("muon_include", include, names)
    leaves = _Patterns("muon_exclude", exclude, names)
    known = frozenset(embeddings)
    rows = []
    for parameter, own in owners.values():
        chosen, reason = optimizer, "every parameter"
        laid = layout(parameter)
        shape = laid.shape
        if optimizer == "muon":
            chosen, reason = _choose(own, shape, known, takes=takes, leaves=leaves)
        cut = view(own, shape) if chosen == "muon" else WHOLE
        if cut.label:
            reason = f"{reason}: {cut.label}"
        rows.append(
            Owner(own[0], shape, math.prod(shape), optimizer=chosen, reason=reason, view=cut)
        )
    return Routing(tuple(rows))


class _Patterns:
    """The regular expressions under one configuration key, each of which must match something."""

    def __init__(self, key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
        self.key = key
        self.compiled = [self._compile(pattern) for pattern in patterns]
        for pattern in self.compiled:
            if not any(map(pattern.search, names)):
                some = ", ".join(names[:3])
                raise ConfigError(
                    f"{key}: {pattern.pattern!r} matches none of {len(names)} trainable parameters "
                    f"(such as {some}); change or remove it"
                )

    def _compile(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{self.key}: {pattern!r} is not a regular expression: {error}"
            ) from error

    def first_match(self, names: Sequence[str]) -> str | None:
        """The first pattern that finds one of these names."""
        return next((p.pattern for p in self.compiled if any(map(p.search, names))), None)


def _choose(
    names: list[str],
    shape: tuple[int, ...],
    embeddings: frozenset[str],
    *,
    takes: _Patterns,
    leaves: _Patterns,
) -> tuple[Algorithm, str]:
    taken, left = takes.first_match(names), leaves.first_match(names)
    if taken and left:
        raise ConfigError(
            f"{names[0]} matches muon_include ({taken!r}) and muon_exclude ({left!r}); "
            "make one of them narrower"
        )
    if left:
        return "adamw", f"muon_exclude {left!r}"
    if taken:
        if len(shape) < 2:
            raise ConfigError(
                f"muon_include {taken!r} takes {names[0]} of shape {shape}, but "
                "Muon needs a matrix; make the pattern narrower"
            )
        if len(shape) > 3:
            raise ConfigError(
                f"muon_include {taken!r} takes {names[0]} of shape {shape}, and "
                "which two of its dimensions make a matrix is not known; make the pattern narrower"
            )
        return "muon", f"muon_include {taken!r}"
    reason = next(_reasons_against(names, shape, embeddings), None)
    if reason:
        return "adamw", reason
    return "muon", "hidden matrix" if len(shape) == 2 else "stacked hidden matrices"


def _reasons_against(
    names: list[str], shape: tuple[int, ...], embeddings: frozenset[str]
) -> Iterator[str]:
    """Why Muon does not take this parameter; tied parameters are judged by all their names."""
    if len(shape) < 2:
        yield "one-dimensional"
    if not embeddings.isdisjoint(names):
        yield "embedding"
    for reason, pattern in NAME_RULES:
        if any(re.search(pattern, name) for name in names):
            yield reason
    if min(shape[-2:]) == 1:
        yield "a vector in the form of a matrix"
    if len(shape) > 3 or (len(shape) == 3 and not re.search("expert", names[0])):
        yield f"{len(shape)}-dimensional, and no stack of experts"
