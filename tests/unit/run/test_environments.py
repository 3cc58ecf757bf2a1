import pytest

from nemo_like.config.environments import EnvConfig
from nemo_like.errors import ConfigError, DataError
from nemo_like.run.environments import build_environment, build_environments
from nemo_like.types import Prompt, Rollout

DAPO = "nemo_like.environments.dapo_math:reward"


def config(**env):
    return EnvConfig.model_validate(env)


def rollout(env_name, text):
    return Rollout(Prompt(0, (1,), "", "34", env_name), (1,), (0.0,), text, "stop", 0)


def say(text):
    raise AssertionError(text)


def test_environments_are_built_for_the_names_that_are_asked_for():
    env = config(math={"math_verify_impl": "dapo_math_verify"}, custom={"reward": DAPO})
    environments = build_environments(env, ["custom", "arithmetic", "math", "custom"], say=say)
    names = ("arithmetic", "math", "custom")
    texts = ("Answer: 34", "Answer: $34$")
    rollouts = [rollout(name, text) for name in names for text in texts]
    assert environments.score(rollouts) == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(DataError, match="judges with arithmetic, custom, math"):
        environments.score([rollout("calculator", "34")])
    environments.close()


@pytest.mark.parametrize(
    ("name", "env", "what"),
    [
        ("custom", {}, "env.custom.reward is not set"),
        ("custom", {"custom": {"reward": "no_such_module:f"}}, "No module named 'no_such_module'"),
        ("riddles", {}, "there are arithmetic, math, calculator and custom"),
    ],
)
def test_an_environment_that_can_not_be_had_is_refused(name, env, what):
    with pytest.raises(ConfigError, match=what):
        build_environment(name, config(**env), say=say)


def test_failed_custom_rewards_stop_the_run_or_score_as_configured():
    said = []
    fails = {"reward": "posixpath:join"}
    for env, ends in (({}, True), ({"on_failure": "score", "failure_reward": -1.0}, False)):
        environment = build_environment("custom", config(custom=fails, **env), say=said.append)
        if ends:
            with pytest.raises(DataError, match="posixpath:join returned"):
                environment.score([rollout("custom", "34")])
        else:
            assert environment.score([rollout("custom", "34")]) == [-1.0]
        environment.close()
    assert len(said) == 1
