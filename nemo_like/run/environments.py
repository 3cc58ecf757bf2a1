"""From names and the configuration to what judges answers."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from nemo_like.config.environments import EnvConfig
from nemo_like.config.grpo import GRPOTree
from nemo_like.data.chat import ChatEncoder
from nemo_like.environments.arithmetic import ArithmeticEnvironment
from nemo_like.environments.calculator import CalculatorEnvironment
from nemo_like.environments.function import FunctionEnvironment, Say
from nemo_like.environments.math import MathEnvironment
from nemo_like.environments.routed import RoutedEnvironment
from nemo_like.errors import ConfigError
from nemo_like.interfaces import Environment, Generator
from nemo_like.rollout.turns import ConversingGenerator
from nemo_like.run.model_config import read_model_config


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
                reply=config.custom.reply,
                key="env.custom",
                failure_reward=config.failure_reward if config.on_failure == "score" else None,
                say=say,
            )
        case "custom":
            raise ConfigError("env.custom.reward is not set, and env_name=custom asks for it")
        case "calculator":
            return CalculatorEnvironment()
    raise ConfigError(
        f"env_name={name!r}: no such environment; there are arithmetic, math, calculator and custom"
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


def with_turns(
    generator: Generator, environment: Environment, encoder: ChatEncoder, tree: GRPOTree
) -> Generator:
    """The generator, or around it one whose rollouts have as many turns as are configured.

    Raises:
        ConfigError: the chat template has no place for replies.
    """
    if tree.grpo.max_rollout_turns == 1:
        return generator
    encoder.reply_ids("", ended_by=encoder.tokenizer.eos_token_id)  # so as to know it before step 1
    positions = read_model_config(tree.policy).get("max_position_embeddings")
    longest = tree.policy.max_model_len
    return ConversingGenerator(
        generator,
        environment,
        encoder,
        max_turns=tree.grpo.max_rollout_turns,
        max_length=longest if positions is None else min(longest, positions),
    )
