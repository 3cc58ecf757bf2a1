"""Lets the model call a calculator before it answers."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence

from nemo_like.config.environments import END_OF_CALL
from nemo_like.environments.arithmetic import ArithmeticEnvironment
from nemo_like.types import Rollout

_CALL = re.compile(rf"<calc>([^<>]*){END_OF_CALL}[^<>]*$")
_EXPRESSION = re.compile(r"[-+*/() 0-9]{1,64}")
_LARGEST = 10**18
"""Of numbers, and of every result on the way."""
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


class CalculatorEnvironment(ArithmeticEnvironment):
    """Replies to an answer that ends in `<calc>EXPRESSION</calc>` with its value and a line break.

    The reward is that of `ArithmeticEnvironment`, which looks at the last `Answer: N`.
    """

    def reply(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """The value or `error` where the latest answer ends in a call, None elsewhere."""
        return [self._reply(rollout.latest) for rollout in rollouts]

    @staticmethod
    def _reply(answer: str) -> str | None:
        call = _CALL.search(answer)
        if call is None:
            return None
        value = calculated(call[1])
        return "error\n" if value is None else f"{value}\n"


def calculated(expression: str) -> int | None:
    """The value of whole numbers under + - * / and parentheses; None where it has none.

    It has none if it is longer than 64 characters, holds anything else, divides by 0 or with a
    remainder, or comes anywhere to more than 10^18. It is parsed and looked at, never executed.
    """
    if not _EXPRESSION.fullmatch(expression):
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            pass
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            value, rest = divmod(_value(left), _value(right))
            if rest:
                raise ValueError("no whole number")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError("not of these")
    if abs(value) > _LARGEST:
        raise ValueError("too large")
    return value
