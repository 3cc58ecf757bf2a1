"""How many steps a run has, and what it validates with."""

import numpy as np
import pytest

from nemo_like.config.data import DataConfig
from nemo_like.config.sft import SFTTree
from nemo_like.data.corpus import Corpus
from nemo_like.data.datasets import Data, Source
from nemo_like.data.loader import Loader
from nemo_like.errors import DataError
from nemo_like.run.sft import _validation_batches, num_steps
from nemo_like.types import Example


def source(num_rows, *, name="data.validation", first_token=0, env_name=None):
    examples = [Example((first_token + i, 1), (False, True)) for i in range(num_rows)]
    return Source(Corpus.of(examples, name=name), 1.0, (), env_name)


def loader(num_rows):
    return Loader([source(num_rows).corpus], seed=0)


def tree(*, batch=8, **sft):
    return SFTTree(sft=sft, policy={"train_global_batch_size": batch})


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "max_steps", "expected"),
    [
        (80, 8, 1, 100, 10),
        (80, 8, 1, 3, 3),
        (80, 8, 3, 100, 30),
        (81, 8, 1, 100, 10),
        (12, 8, 2, 100, 3),  # a batch may span two epochs
        (8, 8, 1, 100, 1),
    ],
)
def test_a_run_has_the_smaller_of_its_epochs_and_steps(rows, batch, epochs, max_steps, expected):
    config = tree(batch=batch, max_num_epochs=epochs, max_num_steps=max_steps)
    assert num_steps(config, loader(rows)) == expected


def test_less_than_one_batch_of_rows_is_refused_with_the_key_to_change():
    with pytest.raises(DataError, match=r"7 training rows.*policy.train_global_batch_size=8"):
        num_steps(tree(), loader(7))


def drawn(config, *sources):
    batches = _validation_batches(config, Data((), tuple(sources), None))
    firsts = [b.token_ids_N[b.lengths_B.cumsum(0) - b.lengths_B].tolist() for b in batches]
    return [len(b) for b in batches], [token for part in firsts for token in part]


def test_without_held_out_rows_there_is_nothing_to_validate_with():
    assert _validation_batches(tree(), Data((), (), None)) == []


@pytest.mark.parametrize(
    ("num_batches", "expected"), [(1, [4]), (2, [4, 4]), (3, [4, 4, 2]), (0, [4, 4, 2])]
)
def test_validation_takes_its_batches_or_all_rows_once(num_batches, expected):
    config = tree(val_batches=num_batches, val_global_batch_size=4)
    sizes, rows = drawn(config, source(10))
    assert sizes == expected
    assert len(set(rows)) == len(rows)


def test_validation_takes_the_same_rows_every_time():
    config = tree(val_batches=1, val_global_batch_size=4)
    assert drawn(config, source(100)) == drawn(config, source(100))


@pytest.mark.parametrize("seed", range(20))
def test_validation_on_everything_takes_every_row_of_every_source_once(seed):
    sizes = np.random.default_rng(seed).integers(1, 40, size=2 + seed % 5).tolist()
    sources = [source(n, name=f"s{i}", first_token=1000 * i) for i, n in enumerate(sizes)]
    _, rows = drawn(tree(val_batches=0, val_global_batch_size=7), *sources)
    assert sorted(rows) == sorted(1000 * i + k for i, n in enumerate(sizes) for k in range(n))


@pytest.mark.parametrize(
    ("data", "judge"),
    [
        ({"dataset_name": "arithmetic"}, "arithmetic"),
        ({"dataset_name": "openai/gsm8k"}, "math"),
        ({"dataset_name": "arithmetic", "env_name": "math"}, "math"),
    ],
)
def test_answers_are_judged_by_what_fits_the_source(data, judge):
    config = DataConfig(train={"dataset_name": "x"}, validation=data)
    assert config.judge(config.validation) == judge
