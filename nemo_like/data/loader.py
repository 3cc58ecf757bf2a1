"""An endless, resumable stream of examples or prompts from weighted sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemo_like.errors import CheckpointError, DataError

T_co = TypeVar("T_co", covariant=True)


class Rows(Protocol[T_co]):
    """What can be drawn from: a `Corpus` of examples, a `PromptSet`."""

    @property
    def name(self) -> str:
        """The source."""
        ...

    @property
    def fingerprint(self) -> str:
        """The same for the same rows in the same order, and for no others."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T_co: ...


class Loader(Generic[T_co]):
    """Draws rows; what comes next is a function of the seed and of how many were drawn.

    Of each source every row comes once before any comes again. Between sources, the next example
    comes from the one that is furthest behind its weight, so that at all times each has its share
    to within one example. An epoch is as many examples as all sources have rows.
    """

    def __init__(
        self,
        corpora: Sequence[Rows[T_co]],
        *,
        weights: Sequence[float] | None = None,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        weights = weights or [1.0] * len(corpora)
        if not corpora or not all(len(corpus) for corpus in corpora):
            names = ", ".join(corpus.name for corpus in corpora if not len(corpus))
            raise DataError(f"there is nothing to draw from: {names or 'no source'}")
        if len(weights) != len(corpora) or min(weights) <= 0:
            raise DataError(f"{len(corpora)} sources with weights {list(weights)}")
        self._corpora = tuple(corpora)
        self._shares = [weight / sum(weights) for weight in weights]
        self._seed = seed
        self._shuffle = shuffle
        self._taken = [0] * len(corpora)
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source -> epoch and its order

    @property
    def epoch_size(self) -> int:
        """Examples of an epoch."""
        return sum(len(corpus) for corpus in self._corpora)

    @property
    def num_taken(self) -> int:
        """Examples drawn so far."""
        return sum(self._taken)

    def take(self, n: int) -> list[T_co]:
        """The next examples."""
        return [self._next() for _ in range(n)]

    def state(self) -> dict[str, Any]:
        """Where the stream stands, and what it is a stream of; plain values for JSON."""
        return {**self._identity(), "taken": list(self._taken)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where the stream stood that `state` was taken from.

        Raises:
            CheckpointError: if that was another stream, naming the difference.
        """
        identity = self._identity()
        differences = [
            f"{key} is {_brief(identity[key])}, in the checkpoint {_brief(state.get(key))}"
            for key in identity
            if state.get(key) != identity[key]
        ]
        if differences:
            raise CheckpointError(
                "the data are not those of the checkpoint, so training can not go on where it "
                f"stopped: {'; '.join(differences)}. Restore the data and their order, or start "
                "anew with another checkpointing.checkpoint_dir"
            )
        self._taken = [int(count) for count in state["taken"]]

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "data.shuffle": self._shuffle,
            "shares": self._shares,
            "rows": {corpus.name: len(corpus) for corpus in self._corpora},
            "fingerprints": {corpus.name: corpus.fingerprint for corpus in self._corpora},
        }

    def _next(self) -> T_co:
        drawn = self.num_taken + 1
        behind = [
            share * drawn - taken for share, taken in zip(self._shares, self._taken, strict=True)
        ]
        source = behind.index(max(behind))
        corpus = self._corpora[source]
        epoch, place = divmod(self._taken[source], len(corpus))
        self._taken[source] += 1
        return corpus[int(self._order(source, epoch)[place])]

    def _order(self, source: int, epoch: int) -> NDArray[np.int64]:
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            num = len(self._corpora[source])
            rng = np.random.Generator(np.random.PCG64([self._seed, source, epoch]))
            order = rng.permutation(num) if self._shuffle else np.arange(num)
            known = self._orders[source] = (epoch, order)
        return known[1]


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
