import pytest
import torch

from nemo_like.ops.rewards import has_signal, penalize_truncated, scale_rewards, shape_overlong


def test_scaling_is_a_straight_line_from_range_to_range_and_clamps_first():
    found = scale_rewards(
        torch.tensor([[-5.0, 0.0, 0.5], [1.0, 2.0, 3.0]]),
        source_min=0.0,
        source_max=2.0,
        target_min=-1.0,
        target_max=3.0,
    )
    assert found.tolist() == [[-1, -1, 0], [1, 3, 3]]


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (80, 0), (85, -0.5), (90, -1), (100, -2), (150, -2)]
)
def test_the_overlong_penalty_grows_over_the_buffer_and_no_further(length, expected):
    """20 tokens of buffer before 100, and a penalty of 2."""
    found = shape_overlong(
        torch.tensor([[0.7]]),
        torch.tensor([[length]]),
        max_response_length=100,
        overlong_buffer_length=20,
        overlong_buffer_penalty=2.0,
    )
    assert found.item() == pytest.approx(0.7 + expected)
    assert found.dtype == torch.float32


def test_a_truncated_completion_keeps_a_share_of_its_reward_and_gains_nothing():
    rewards = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0]])
    truncated = torch.tensor([[True, False, True, False, True]])
    found = penalize_truncated(rewards, truncated, coefficient=0.25)
    assert found.tolist() == [[0.25, 1, -1, -1, 0]]
    assert penalize_truncated(rewards, truncated, coefficient=0.0).tolist() == [[0, 1, -1, -1, 0]]


def test_a_group_has_signal_if_two_samples_that_count_differ():
    rewards = torch.tensor([[0.7, 0.7, 0.7], [0.3, 0.3, 0.3000001], [1.0, 0.0, 0.0], [-1, -1, -1]])
    assert has_signal(rewards).tolist() == [False, True, True, False]
    valid = torch.tensor([[True] * 3, [True, True, False], [False, True, True], [False] * 3])
    assert has_signal(rewards, valid).tolist() == [False] * 4
    valid[2, 0] = True
    assert has_signal(rewards, valid).tolist() == [False, False, True, False]
