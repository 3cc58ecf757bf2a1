"""The data of a run: every source read, checked and tokenised, with one report of all bad rows."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice

from nemo_like.config.data import DataConfig, DatasetConfig
from nemo_like.data.chat import ChatEncoder
from nemo_like.data.corpus import Corpus, CorpusBuilder, PromptSet
from nemo_like.data.faults import Fault, FaultReport, RowError, column_settings
from nemo_like.data.messages import Message, RowFormat
from nemo_like.data.rows import RawRow, read_rows
from nemo_like.errors import DataError
from nemo_like.types import Example, Prompt

_CHUNK_ROWS = 512


@dataclass(frozen=True)
class Limits:
    """What a model can take: tokens of a sequence, and token ids below `vocab_size`."""

    max_length: int
    vocab_size: int | None = None


@dataclass(frozen=True)
class Source:
    """A tokenised source: examples, their share in a mixture, and the first few prompts.

    `env_name` is the environment that judges answers to the prompts.
    """

    corpus: Corpus
    weight: float
    prompts: tuple[Prompt, ...]
    env_name: str


@dataclass(frozen=True)
class Data:
    """What a run trains on and validates with; `warning` tells of bad rows that were left out."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...]
    warning: str | None


@dataclass(frozen=True)
class PromptSource:
    """The prompts of a source, and their share in a mixture."""

    prompts: PromptSet
    weight: float


@dataclass(frozen=True)
class PromptData:
    """The prompts of a run; `warning` tells of bad rows that were left out."""

    train: tuple[PromptSource, ...]
    validation: tuple[PromptSource, ...]
    warning: str | None


@dataclass(frozen=True)
class _Row:
    """A row that is good: its example if it is learned from, its prompt if it may be asked."""

    example: Example | None
    prompt: Prompt | None
    is_held_out: bool


@dataclass(frozen=True)
class _RowEncoder:
    """What turns the raw rows of one source into tokens; given whole to each process."""

    format: RowFormat
    encoder: ChatEncoder
    limits: Limits
    held_out_share: float
    seed: int
    with_prompts: bool
    with_examples: bool = True

    def encode(self, rows: Sequence[RawRow]) -> list[_Row | RowError]:
        return [self._try(row) for row in rows]

    def _try(self, row: RawRow) -> _Row | RowError:
        if isinstance(row.value, RowError):
            return row.value
        try:
            messages = self.format.messages(row.value)
            example = self.encoder.encode(messages) if self.with_examples else None
            is_held_out = self._is_held_out(messages)
            is_asked = self.with_prompts and (is_held_out or not self.held_out_share)
            if is_asked or example is None:
                prompt = self.encoder.prompt(messages, row.number)
            else:
                prompt = None
            learned_or_asked = example or prompt
            assert learned_or_asked is not None
            self._check(learned_or_asked.token_ids)
        except RowError as error:
            return error
        return _Row(example, prompt, is_held_out)

    def _check(self, token_ids: Sequence[int]) -> None:
        num, limit = len(token_ids), self.limits.max_length
        if num > limit:
            raise RowError("too long", found=f"{num} tokens, at most {limit}", length=num)
        vocab_size, largest = self.limits.vocab_size, max(token_ids)
        if vocab_size is not None and largest >= vocab_size:
            raise RowError("token outside the vocabulary", found=f"id {largest} of {vocab_size}")

    def _is_held_out(self, messages: Sequence[Message]) -> bool:
        """By a hash of what precedes the first answer, so that equal questions stay together."""
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        question = "\0".join([str(self.seed), *(m["content"] for m in messages[:first])])
        digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.held_out_share * 2**64


_worker_encoder: _RowEncoder


def _start_worker(encoder: _RowEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _work(rows: Sequence[RawRow]) -> list[_Row | RowError]:
    return _worker_encoder.encode(rows)


def _encode_all(
    rows: Iterable[RawRow], encoder: _RowEncoder, num_workers: int
) -> Iterator[tuple[RawRow, _Row | RowError]]:
    """Every raw row with what became of it, in order; at most a few chunks are in memory."""
    iterator = iter(rows)
    chunks = iter(lambda: list(islice(iterator, _CHUNK_ROWS)), [])
    if num_workers == 1:
        for chunk in chunks:
            yield from zip(chunk, encoder.encode(chunk), strict=True)
        return
    # Not `fork`: the tokenizers library and torch hold locks and threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (encoder,)) as pool:
        running: deque[tuple[list[RawRow], Future[list[_Row | RowError]]]] = deque()
        for chunk in chunks:
            running.append((chunk, pool.submit(_work, chunk)))
            if len(running) > 2 * num_workers:
                done, future = running.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in running:
            yield from zip(done, future.result(), strict=True)


@dataclass
class _Side:
    """One half of a source: for training, or held out."""

    builder: CorpusBuilder = field(default_factory=CorpusBuilder)
    prompts: list[Prompt] = field(default_factory=list)
    num_rows: int = 0

    def add(self, row: _Row, num_prompts: float) -> None:
        if row.prompt is not None and len(self.prompts) < num_prompts:
            self.prompts.append(replace(row.prompt, index=self.num_rows))
        if row.example is not None:
            self.builder.add(row.example)
        self.num_rows += 1


def _load(
    rows: Iterable[tuple[RawRow, _Row | RowError]],
    report: FaultReport,
    *,
    num_prompts: float,
    columns: Mapping[str, str],
) -> tuple[_Side, _Side]:
    """The rows kept and held out; faults go into the report, to its latest source."""
    kept, held_out = _Side(), _Side()
    tally = report.sources[-1]
    ids: set[object] = set()
    for raw, row in rows:
        tally.num_rows += raw.number > 0
        error = row if isinstance(row, RowError) else _repeated_id(raw, ids)
        if error is not None:
            report.add(Fault(raw.file, raw.number, error))
            is_missing = error.rule == "missing column" and error.field in columns.values()
            if is_missing and isinstance(raw.value, dict):
                tally.settings[column_settings(raw.value, columns)] += 1
        elif isinstance(row, _Row):
            (held_out if row.is_held_out else kept).add(row, num_prompts)
    return kept, held_out


def _repeated_id(raw: RawRow, ids: set[object]) -> RowError | None:
    found = raw.value.get("id") if isinstance(raw.value, dict) else None
    if not isinstance(found, str | int):
        return None
    if found in ids:
        return RowError("id given twice", field="id", found=repr(found))
    ids.add(found)
    return None


def _columns(source: DatasetConfig) -> dict[str, str]:
    """The columns that a source's rows must have, by the key that names each."""
    if source.messages_key is not None:
        return {"messages_key": source.messages_key}
    return {"input_key": source.input_key, "output_key": source.output_key}


def load_data(
    config: DataConfig, encoder: ChatEncoder, limits: Limits, *, seed: int, num_prompts: int = 0
) -> Data:
    """The training and validation data that the config names.

    Each validation source brings its first `num_prompts` prompts. What is held out of training
    sources (`split_validation_size`) joins the validation sources, if there are any.

    Raises:
        DataError: one report of every bad row of every source, unless they may be left out.
        ConfigError: for a source that does not exist.
    """
    sides, warning = _load_sides(config, encoder, limits, seed=seed, num_prompts=num_prompts)

    def sources(of_training: bool) -> tuple[Source, ...]:
        return tuple(
            Source(
                corpus=side.builder.build(key),
                weight=source.weight,
                prompts=tuple(side.prompts),
                env_name=config.judge(source),
            )
            for key, source, side in sides
            if key.startswith("data.train") == of_training
        )

    return Data(sources(True), sources(False), warning)


def load_prompts(
    config: DataConfig, encoder: ChatEncoder, limits: Limits, *, seed: int
) -> PromptData:
    """The same sources as questions with expected answers, of which nothing is learned by heart.

    Limits are of the prompts alone.

    Raises:
        DataError, ConfigError: as for `load_data`.
    """
    sides, warning = _load_sides(
        config, encoder, limits, seed=seed, num_prompts=math.inf, with_examples=False
    )

    def prompts(number: int, source: DatasetConfig, side: _Side) -> Iterator[Prompt]:
        judge, first = config.judge(source), number << 32
        for prompt in side.prompts:
            yield replace(prompt, index=first + prompt.index, env_name=judge)

    def sources(of_training: bool) -> tuple[PromptSource, ...]:
        return tuple(
            PromptSource(PromptSet(key, tuple(prompts(number, source, side))), source.weight)
            for number, (key, source, side) in enumerate(sides)
            if key.startswith("data.train") == of_training
        )

    return PromptData(sources(True), sources(False), warning)


def _load_sides(
    config: DataConfig,
    encoder: ChatEncoder,
    limits: Limits,
    *,
    seed: int,
    num_prompts: float,
    with_examples: bool = True,
) -> tuple[list[tuple[str, DatasetConfig, _Side]], str | None]:
    """Every source by its key, what is held out of one as a source of validation; a warning."""
    length_limits = {"policy.max_total_sequence_length": limits.max_length}
    if config.max_input_seq_length is not None:
        length_limits["data.max_input_seq_length"] = config.max_input_seq_length
    longest = min(length_limits.values())
    report = FaultReport(length_limits)
    sides: list[tuple[str, DatasetConfig, _Side]] = []
    for key, source in config.sources().items():
        is_train = key.startswith("data.train")
        own_seed = seed if source.seed is None else source.seed
        share = source.split_validation_size if is_train else 0.0
        row_encoder = _RowEncoder(
            format=RowFormat.of(source, config.default),
            encoder=encoder,
            limits=Limits(longest, limits.vocab_size),
            held_out_share=share,
            seed=own_seed,
            with_prompts=num_prompts > 0 and (share > 0 or not is_train),
            with_examples=with_examples,
        )
        rows = _encode_all(read_rows(source, seed=own_seed), row_encoder, config.num_workers)
        report.source(key)
        kept, held_out = _load(rows, report, num_prompts=num_prompts, columns=_columns(source))
        sides.append((key, source, kept))
        if share:
            sides.append((f"data.validation (held out of {key})", source, held_out))
    warning = report.check(drop=config.bad_rows == "drop", max_share=config.max_bad_rows)
    for key, source, side in sides:
        if not side.num_rows:
            raise DataError(f"{key}: no row is left of {source.data_path or source.dataset_name}")
    return sides, warning
