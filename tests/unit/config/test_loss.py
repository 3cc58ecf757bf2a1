import pickle

import pytest
from pydantic import ValidationError

from nemo_like.config.loss import ClippedPGConfig

TIS = {
    "use_importance_sampling_correction": True,
    "truncated_importance_sampling_type": "tis",
    "truncated_importance_sampling_ratio": 2.0,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reference_policy_kl_penalty": 0.0, "ratio_clip_max": 0.28, "ratio_clip_c": 10.0},
        {"sequence_level_importance_ratios": True, "token_level_loss": False},
        {"use_cispo": True, "ratio_clip_min": 1.0, "ratio_clip_max": 4.0},
        {"disable_ppo_ratio": True, **TIS},
        {**TIS, "truncated_importance_sampling_ratio_min": 0.5},
        {"loss_divisor_tokens": 1024},
        {"use_kl_in_reward": True},
    ],
)
def test_the_published_losses_are_legal_and_survive_pickling(settings):
    config = ClippedPGConfig(**settings)
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"sequence_level_importance_ratios": True},
            ("sequence_level_importance_ratios", "token_level_loss"),
        ),
        ({"use_cispo": True, "ratio_clip_c": 3.0}, ("use_cispo", "ratio_clip_c")),
        ({"use_cispo": True, "disable_ppo_ratio": True}, ("use_cispo", "disable_ppo_ratio")),
        ({"use_cispo": True, "token_level_loss": False}, ("use_cispo", "token_level_loss")),
        (
            {
                "use_cispo": True,
                "sequence_level_importance_ratios": True,
                "token_level_loss": False,
            },
            ("use_cispo", "sequence_level_importance_ratios"),
        ),
        ({"disable_ppo_ratio": True, "ratio_clip_c": 3.0}, ("disable_ppo_ratio", "ratio_clip_c")),
        (
            {"disable_ppo_ratio": True, "force_on_policy_ratio": True},
            ("disable_ppo_ratio", "force_on_policy_ratio"),
        ),
        (
            {**TIS, "use_importance_sampling_correction": False},
            ("truncated_importance_sampling_type", "use_importance_sampling_correction"),
        ),
        (
            {**TIS, "truncated_importance_sampling_ratio": None},
            ("truncated_importance_sampling_type", "truncated_importance_sampling_ratio"),
        ),
        (
            {**TIS, "truncated_importance_sampling_type": None},
            ("truncated_importance_sampling_ratio", "truncated_importance_sampling_type"),
        ),
        (
            {**TIS, "truncated_importance_sampling_ratio_min": 2.0},
            ("truncated_importance_sampling_ratio_min", "truncated_importance_sampling_ratio"),
        ),
        (
            {"loss_divisor_tokens": 8, "token_level_loss": False},
            ("loss_divisor_tokens", "token_level_loss"),
        ),
        (
            {"use_kl_in_reward": True, "reference_policy_kl_penalty": 0.0},
            ("use_kl_in_reward", "reference_policy_kl_penalty"),
        ),
        (
            {"use_kl_in_reward": True, "use_on_policy_kl_approximation": True},
            ("use_kl_in_reward", "use_on_policy_kl_approximation"),
        ),
        ({"ratio_clip_c": 1.0}, ("ratio_clip_c",)),
        ({"ratio_clip_min": 1.5}, ("ratio_clip_min",)),
    ],
)
def test_options_that_exclude_each_other_are_refused_by_name(settings, named):
    with pytest.raises(ValidationError) as refusal:
        ClippedPGConfig(**settings)
    assert refusal.value.error_count() == 1
    assert " and ".join(named) in str(refusal.value)


def test_the_start_weights_are_needed_just_for_a_penalty():
    assert ClippedPGConfig().needs_reference
    assert ClippedPGConfig().has_kl_in_loss
    assert not ClippedPGConfig(reference_policy_kl_penalty=0.0).needs_reference
    in_reward = ClippedPGConfig(use_kl_in_reward=True)
    assert in_reward.needs_reference and not in_reward.has_kl_in_loss
