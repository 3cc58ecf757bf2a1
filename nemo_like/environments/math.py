"""Judges mathematical answers."""

from __future__ import annotations

from nemo_like.config.environments import MathEnvConfig
from nemo_like.environments.function import FunctionEnvironment, Say


class MathEnvironment(FunctionEnvironment):
    r"""Reward 1 where an answer is right, else 0; a model can not make it fail.

    With `hf_math_verify` it is right if it equals the expected one as a mathematical object. What
    is expected may be a GSM8K solution that ends in `#### 72`, hold a `\boxed{}`, or be a bare
    expression. An answer that can not be read scores 0, and so does one that takes more than the
    limits to compare, whatever `env.on_failure` says: such answers are the model's doing.

    With `dapo_math_verify` what follows the last `Answer:` must be the expected text, after a
    normalization.
    """

    def __init__(self, config: MathEnvConfig, *, say: Say):
        match config.math_verify_impl:
            case "hf_math_verify":
                reward = "nemo_like.environments.math_verifier:reward"
                options = {"parser_s": max(1, int(config.timeout_s) // 3)}
            case "dapo_math_verify":
                reward, options = "nemo_like.environments.dapo_math:reward", {}
        super().__init__(
            reward, config, key="env.math", failure_reward=0.0, say=say, options=options
        )
