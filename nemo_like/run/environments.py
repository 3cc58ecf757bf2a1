"""From names and the configuration to what judges answers."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from nemo_like.config.environments import EnvConfig
from nemo_like.environments.arithmetic import ArithmeticEnvironment
from nemo_like.environments.function import FunctionEnvironment, Say
from nemo_like.environments.math import MathEnvironment
from nemo_like.environments.routed import RoutedEnvironment
from nemo_like.errors import ConfigError
from nemo_like.interfaces import Environment


def build_environment(name: str, config: EnvConfig, *, say: Say) -> Environment:
    """The environment of this `env_name`, its processes ready.

    Raises:
        ConfigError: there is none, or its function can not be imported. To build it before anything
            else starts is to know that early.
    """
    match name:
        case "arithmetic":
            return ArithmeticEnvironment()
        case "math":
            return MathEnvironment(config.math, say=say)
        case "custom" if config.custom.reward is not None:
            return FunctionEnvironment(
                config.custom.reward,
                config.custom,
                key="env.custom",
                failure_reward=config.failure_reward if config.on_failure == "score" else None,
                say=say,
            )
        case "custom":
            raise ConfigError("env.custom.reward is not set, and env_name=custom asks for it")
        case "calculator":
            raise ConfigError(
                "env_name=calculator: this version judges single answers, and can not yet reply to "
                "them; use arithmetic, math or custom, and grpo.max_rollout_turns=1"
            )
    raise ConfigError(
        f"env_name={name!r}: no such environment; there are arithmetic, math and custom"
    )


def build_environments(config: EnvConfig, names: Iterable[str], *, say: Say) -> RoutedEnvironment:
    """One environment for prompts of all these `env_name`s, ready.

    Raises:
        ConfigError: as `build_environment`.
    """
    with ExitStack() as stack:
        environments: dict[str, Environment] = {}
        for name in sorted(set(names)):
            environments[name] = build_environment(name, config, say=say)
            stack.callback(environments[name].close)
        stack.pop_all()
        return RoutedEnvironment(environments)
