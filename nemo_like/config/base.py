"""What every node of the tree has in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator


@dataclass(frozen=True, slots=True)
class Conflict:
    """Values that are fine one by one, wrong together; `keys` are dotted paths below the node."""

    keys: tuple[str, ...]
    message: str
    only_to_run: bool = False
    """It ends a run before it begins, and is a note where something is only planned."""

    def below(self, prefix: str) -> Conflict:
        """The same conflict, seen from the parent that holds the node as `prefix`."""
        return replace(self, keys=tuple(f"{prefix}.{key}" for key in self.keys))


class Node(BaseModel):
    """A frozen node that refuses unknown keys; the string under a field is its line in `--help`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the fields of this node."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self, info: ValidationInfo) -> Self:
        if not defers_conflicts(info.context):
            found = [f"{' and '.join(c.keys)}: {c.message}" for c in self.conflicts()]
            if found:
                raise ValueError("; ".join(found))
        return self


DEFER_CONFLICTS = {"defer_conflicts": True}
"""Validation context under which nodes check fields only; `conflicts_of` then finds the rest."""


def defers_conflicts(context: Any) -> bool:
    """True where the caller promises to look at `conflicts_of` itself."""
    return context is DEFER_CONFLICTS


def conflicts_of(node: Node) -> Iterator[Conflict]:
    """Every conflict of a node and of the nodes below it."""
    yield from node.conflicts()
    for name in type(node).model_fields:
        value = getattr(node, name)
        if isinstance(value, Node):
            yield from (conflict.below(name) for conflict in conflicts_of(value))
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Node):
                    yield from (c.below(f"{name}.{index}") for c in conflicts_of(item))


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _number_as_text(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


EnvVars = dict[str, Annotated[str, BeforeValidator(_number_as_text)]]
