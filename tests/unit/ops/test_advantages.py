import random
from math import sqrt

import pytest
import torch

from nemo_like.ops.advantages import clip_advantages, group_relative, standardize
from nemo_like.ops.rewards import has_signal
from nemo_like.ops.sequences import spread
from tests.reference import policy_gradient_by_hand as by_hand

WAYS = [(loo, std) for loo in (False, True) for std in (False, True)]
each_way = pytest.mark.parametrize(("leave_one_out", "divide_by_std"), WAYS)


def rewards(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def advantages(*rows, leave_one_out=False, divide_by_std=False):
    return group_relative(
        rewards(*rows), leave_one_out=leave_one_out, divide_by_std=divide_by_std
    ).tolist()


def test_grpo_divides_by_the_unbiased_deviation_of_the_group():
    # mean 1, squares 4 + 0 + 1 + 1 over 3
    assert advantages([3, 1, 0, 0], divide_by_std=True)[0] == pytest.approx(
        [2 / sqrt(2), 0, -1 / sqrt(2), -1 / sqrt(2)], rel=1e-6
    )


def test_dr_grpo_takes_the_mean_off_and_divides_by_nothing():
    assert advantages([3, 1, 0, 0]) == [[2, 0, -1, -1]]


def test_rloo_compares_each_sample_with_the_mean_of_the_others():
    assert advantages([3, 1, 0, 2], leave_one_out=True)[0] == pytest.approx(
        [3 - 3 / 3, 1 - 5 / 3, 0 - 6 / 3, 2 - 4 / 3]
    )


def test_leaving_one_out_leaves_it_out_of_the_deviation_too():
    found = advantages([4, 1, 0, 2], leave_one_out=True, divide_by_std=True)[0]
    # without the first: mean 1, squares 0 + 1 + 1 over 2
    assert found[0] == pytest.approx(3 / 1, rel=1e-5)
    # without the second: mean 2, squares 4 + 4 + 0 over 2
    assert found[1] == pytest.approx(-1 / 2, rel=1e-5)


@each_way
def test_a_group_of_equal_rewards_has_advantage_zero_to_the_bit(leave_one_out, divide_by_std):
    rows = [[x] * 7 for x in (0.1, 0.3, 0.7, 1e-8, -1.1, 123456.789)]
    found = advantages(*rows, leave_one_out=leave_one_out, divide_by_std=divide_by_std)
    assert found == [[0.0] * 7] * 6


def test_a_sample_whose_others_agree_keeps_its_plain_difference():
    found = advantages([1, 0.7, 0.7, 0.7], leave_one_out=True, divide_by_std=True)[0]
    assert found[0] == pytest.approx(0.3, rel=1e-12)
    # the others of the second are 1, 0.7, 0.7: mean 0.8, deviation sqrt(0.03)
    assert found[1] == pytest.approx(-0.1 / sqrt(0.03), rel=1e-5)


def test_two_samples_left_one_out_have_no_deviation_and_keep_their_difference():
    assert advantages([3, 1], leave_one_out=True, divide_by_std=True) == [[2, -2]]


@each_way
def test_one_sample_alone_has_nothing_to_be_compared_with(leave_one_out, divide_by_std):
    found = advantages([5], [7], leave_one_out=leave_one_out, divide_by_std=divide_by_std)
    assert found == [[0], [0]]


def test_rows_are_groups_even_where_two_hold_the_same():
    assert advantages([1, 0], [1, 0], [5, 5]) == [[0.5, -0.5], [0.5, -0.5], [0, 0]]


@each_way
def test_a_sample_that_does_not_count_is_as_if_it_had_not_been_drawn(leave_one_out, divide_by_std):
    way = {"leave_one_out": leave_one_out, "divide_by_std": divide_by_std}
    valid = torch.tensor([[True, False, True, True, False]])
    found = group_relative(rewards([3, float("nan"), 1, 0, 99]), valid, **way)
    kept = group_relative(rewards([3, 1, 0]), **way)
    assert found[0, [0, 2, 3]].tolist() == kept[0].tolist()
    assert found[0, [1, 4]].tolist() == [0, 0]
    nobody = group_relative(rewards([3, 1]), torch.zeros(1, 2, dtype=torch.bool), **way)
    assert nobody.tolist() == [[0, 0]]


@each_way
def test_random_groups_agree_with_the_slow_twin(leave_one_out, divide_by_std):
    way = {"leave_one_out": leave_one_out, "divide_by_std": divide_by_std}
    dice = random.Random(1)
    rows = [
        [dice.choice([0.0, 0.3, 0.7, 1.0, dice.gauss(0, 2)]) for _ in range(6)] for _ in range(40)
    ]
    valid = [[dice.random() < 0.8 for _ in range(6)] for _ in range(40)]
    found = group_relative(rewards(*rows), torch.tensor(valid), **way)
    expected = [by_hand.advantages(r, v, **way) for r, v in zip(rows, valid, strict=True)]
    torch.testing.assert_close(found, rewards(*expected), rtol=1e-8, atol=1e-9)
    assert found.any(1).equal(has_signal(rewards(*rows), torch.tensor(valid)))


def centred(rewards_PG):
    return group_relative(rewards_PG, leave_one_out=False, divide_by_std=False)


def test_reinforce_plus_plus_standardises_over_the_tokens_of_the_whole_batch():
    tokens = torch.tensor([[1, 3], [2, 0]])
    # values 1, 0, 0, 0, 2, 2 token by token: mean 5/6, mean square 9/6
    std = sqrt(9 / 6 - 25 / 36)
    found = standardize(rewards([1, 0], [2, float("nan")]), tokens)
    expected = rewards([(1 - 5 / 6) / std, -5 / 6 / std], [(2 - 5 / 6) / std, 0])
    torch.testing.assert_close(found, expected)


def test_reinforce_plus_plus_with_baseline_takes_the_mean_of_the_group_off_first():
    tokens = torch.tensor([[1, 3], [2, 2]])
    # 1/2, three times -1/2, 2 twice, -2 twice: mean -1/8, mean square (4/4 + 16) / 8
    std = sqrt(17 / 8 - 1 / 64)
    found = standardize(centred(rewards([1, 0], [6, 2])), tokens)
    expected = rewards([0.625 / std, -0.375 / std], [2.125 / std, -1.875 / std])
    torch.testing.assert_close(found, expected)


def test_spread_over_the_tokens_first_gives_the_same():
    scores, tokens_PG = rewards([1, 0], [2, 9]), torch.tensor([[1, 3], [2, 2]])
    lengths_B = tokens_PG.flatten()
    mask_N = torch.ones(8, dtype=torch.bool)
    found = standardize(spread(scores.flatten(), lengths_B, 8), mask_N)
    whole = standardize(scores, tokens_PG)
    torch.testing.assert_close(found, spread(whole.flatten(), lengths_B, 8))


def test_a_batch_of_equal_advantages_is_standardised_to_zero_to_the_bit():
    assert standardize(rewards([0.7] * 5), torch.full((1, 5), 3)).tolist() == [[0.0] * 5]
    assert standardize(torch.empty(0), torch.empty(0)).tolist() == []


def test_advantages_have_the_type_of_the_rewards_and_the_precision_of_fp64():
    single = rewards([100.1, 100.2, 99.7, 100.4]).float()
    tokens = torch.tensor([[1, 2, 3, 4]])
    for ways in WAYS:
        way = dict(zip(("leave_one_out", "divide_by_std"), ways, strict=True))
        assert group_relative(single, **way).equal(group_relative(single.double(), **way).float())
    assert standardize(single, tokens).equal(standardize(single.double(), tokens).float())


def test_advantages_are_clipped_on_the_sides_given():
    values = rewards([-3, 0.5, 3])
    assert clip_advantages(values, -1, 2).tolist() == [[-1, 0.5, 2]]
    assert clip_advantages(values, None, 2).tolist() == [[-3, 0.5, 2]]
    assert clip_advantages(values, -1, None).tolist() == [[-1, 0.5, 3]]
    assert clip_advantages(values, None, None).tolist() == [[-3, 0.5, 3]]
