import pytest
import torch

from nemo_like.losses.nll import NLL, mean_nll
from nemo_like.observability.metrics import reduce
from nemo_like.types import Example, TrainBatch

BATCH = TrainBatch.of(
    [
        Example((5, 6, 7), (False, True, True)),
        Example((8, 9), (False, True)),
        Example((1, 2, 3, 4), (False, False, False, True)),
    ]
)
LOGPROBS_N = torch.tensor([0.0, -1.0, -2.0, 0.0, -0.5, 0.0, 0.0, 0.0, -4.0])


def test_loss_is_the_mean_over_the_targets_of_the_global_batch():
    loss, _ = NLL()(LOGPROBS_N, BATCH)
    assert float(loss) == pytest.approx(7.5 / 4)


def test_shares_of_any_split_sum_to_the_loss():
    whole, _ = NLL()(LOGPROBS_N, BATCH)
    shares = [
        NLL()(LOGPROBS_N[BATCH.token_index(rows)], BATCH.select(rows))[0] for rows in ([2], [1, 0])
    ]
    assert float(sum(shares)) == pytest.approx(float(whole))


def test_values_outside_the_mask_do_not_count():
    noisy = torch.where(BATCH.loss_mask_N, LOGPROBS_N, torch.tensor(-99.0))
    assert NLL()(noisy, BATCH)[0] == NLL()(LOGPROBS_N, BATCH)[0]


def test_validation_over_batches_is_the_loss_of_their_union():
    parts = [
        TrainBatch.of([Example((5, 6, 7), (False, True, True))]),
        TrainBatch.of([Example((8, 9), (False, True))]),
    ]
    metrics = reduce(
        {"val_loss": mean_nll(lp, b)}
        for lp, b in zip(
            (torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0.0, -6.0])), parts, strict=True
        )
    )
    assert metrics["val_loss"].value == pytest.approx(3.0)
