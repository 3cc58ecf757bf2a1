import torch

from nemo_like.ops.sequences import means, spread, sums

LENGTHS_B = torch.tensor([2, 0, 3])
VALUES_N = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def test_values_of_sequences_are_spread_over_their_tokens():
    assert spread(torch.tensor([7, 8, 9]), LENGTHS_B, 5).tolist() == [7, 7, 9, 9, 9]


def test_tokens_are_summed_by_sequence_an_empty_one_to_zero():
    assert sums(VALUES_N, LENGTHS_B).tolist() == [3, 0, 12]
    assert sums(VALUES_N[:0], LENGTHS_B[:0]).tolist() == []


def test_means_are_over_the_tokens_of_the_mask_alone():
    mask_N = torch.tensor([False, True, True, False, True])
    dirty_N = torch.where(mask_N, VALUES_N, torch.nan)
    assert means(dirty_N, mask_N, LENGTHS_B).tolist() == [2, 0, 4]
    assert means(dirty_N, mask_N & False, LENGTHS_B).tolist() == [0, 0, 0]


def test_long_sequences_are_summed_beyond_the_precision_of_their_type():
    tokens = torch.full((100_000,), 0.1)
    assert abs(float(sums(tokens, torch.tensor([100_000]))) - 100_000 * float(tokens[0])) < 1e-6
