"""Examples in memory: ragged arrays, never changed after they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nemo_like.types import Example, Prompt


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokenised rows of one source, laid end to end; `ends_B` is where each row ends.

    Five bytes per token, against about a hundred for tuples of Python numbers.
    """

    name: str
    token_ids_N: NDArray[np.int32]
    loss_mask_N: NDArray[np.bool_]
    ends_B: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Iterable[Example], *, name: str) -> Corpus:
        """The corpus of these examples, in this order."""
        builder = CorpusBuilder()
        for example in examples:
            builder.add(example)
        return builder.build(name)

    def __len__(self) -> int:
        return len(self.ends_B)

    def __getitem__(self, index: int) -> Example:
        """The example of a row; raises IndexError outside of 0 to len - 1, so iteration ends."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        span = slice(self.ends_B[index - 1] if index else 0, self.ends_B[index])
        return Example(
            tuple(self.token_ids_N[span].tolist()), tuple(self.loss_mask_N[span].tolist())
        )

    @property
    def lengths_B(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.ends_B, prepend=0)

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same examples in the same order, and for no others."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ends_B, self.token_ids_N, self.loss_mask_N):
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PromptSet:
    """The prompts of one source, to be asked by their position."""

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row."""
        return self.prompts[index]

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same prompts and answers in the same order, and for no others."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.prompts:
            digest.update(repr((prompt.token_ids, prompt.answer)).encode())
        return digest.hexdigest()


@dataclass
class CorpusBuilder:
    """A corpus in the making, which holds what it was given as compactly as the corpus will."""

    _ids: list[NDArray[np.int32]] = field(default_factory=list)
    _masks: list[NDArray[np.bool_]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, example: Example) -> None:
        """Take an example as the next row."""
        self._ids.append(np.array(example.token_ids, dtype=np.int32))
        self._masks.append(np.array(example.loss_mask, dtype=np.bool_))

    def build(self, name: str) -> Corpus:
        """The corpus of all rows so far."""
        ids = np.concatenate([np.empty(0, np.int32), *self._ids])
        masks = np.concatenate([np.empty(0, np.bool_), *self._masks])
        ends = np.cumsum(np.array([len(row) for row in self._ids], dtype=np.int64))
        for array in (ids, masks, ends):
            array.flags.writeable = False
        return Corpus(name, ids, masks, ends)
