import time

import pytest
import torch

from nemo_like.optim.diagnostics import FEW_BUCKETS, Stopwatch, spectrum, transport, untimed

CPU = torch.device("cpu")


def test_a_stopwatch_books_what_happens_inside_under_bucket_and_phase():
    watch = Stopwatch(CPU)
    with watch(1, "compute"):
        time.sleep(0.02)
    with watch(0, "back"):
        pass
    with untimed(0, "there"):
        time.sleep(0.01)
    table = watch.table(2)
    assert table[1, 1] >= 20
    assert 0 < table[0, 2] < 20
    assert (table > 0).sum() == 2


def test_the_exchange_is_told_as_totals_and_as_its_slowest_bucket():
    table = torch.tensor([[1.0, 10.0, 2.0], [4.0, 20.0, 0.0]], dtype=torch.float64)
    found = {n: float(v) for n, v in transport([3.0, 1.0], table, 1.5).items()}
    assert found == {
        "muon/owner_imbalance": 1.5,
        "muon/exchange_mb": 4.0,
        "muon/exchange_wait_ms": 7.0,
        "muon/newton_schulz_ms": 30.0,
        "muon/slowest_bucket_ms": 24.0,
        "muon/bucket0/mb": 3.0,
        "muon/bucket0/ms": 13.0,
        "muon/bucket1/mb": 1.0,
        "muon/bucket1/ms": 24.0,
    }
    assert transport([], table[:0], 1.0) == {}


@pytest.mark.parametrize("count", [1, FEW_BUCKETS + 1])
def test_one_bucket_and_many_buckets_have_no_metrics_of_their_own(count):
    found = transport([1.0] * count, torch.ones(count, 3), 1.0)
    assert len(found) == 5
    assert found["muon/exchange_wait_ms"] == 2 * count


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_a_spectrum_is_that_of_the_singular_values(shape):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(3, *shape, generator=g, dtype=torch.float64) * 1e-3
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    ends = torch.linspace(0.9, 1.2, 6, dtype=torch.float64)
    found = spectrum(X, 0.3 * U * ends @ Vh, 0.3)
    rank = s.square().sum(1).square() / (6 * s.pow(4).sum(1))
    torch.testing.assert_close(found[:, 0], (0.3 * ends).square().sum().expand(3))
    torch.testing.assert_close(found[:, 1], rank)
    error = (ends.square() - 1).square().mean().sqrt()
    torch.testing.assert_close(found[:, 2], error.expand(3))
