"""Where examples come from and how they become tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from nemo_like.config.base import Conflict, Fraction, Node, NonNegative, Positive, PositiveFloat

EnvName = Literal["arithmetic", "math", "calculator", "custom"]
ONE_TURN: tuple[EnvName, ...] = ("arithmetic", "math")
"""Environments that need no configuration, and judge a single answer."""
BUNDLED = ("arithmetic", "products")
"""Names of the problems that come with the package."""


class DatasetConfig(Node):
    """One source of rows; unset fields fall back to `data.default`."""

    dataset_name: str | None = None
    """`arithmetic`, `products` (bundled), or a name or path for `datasets.load_dataset`."""
    data_path: str | None = None
    """A local .jsonl or .parquet file, or a folder of them; takes the place of `dataset_name`."""
    split: str = "train"
    """Split of a `datasets` source."""
    subset: str | None = None
    """Configuration name of a `datasets` source."""
    input_key: str = "input"
    """Column of the prompt; `a.0.b` goes into objects and lists."""
    output_key: str = "output"
    """Column of the response, or of the answer that is expected."""
    messages_key: str | None = None
    """Column of chat messages `[{role, content}, ...]`; replaces `input_key` and `output_key`."""
    weight: PositiveFloat = 1.0
    """Share of this training source among several, relative to the others."""
    split_validation_size: Fraction = 0.0
    """Share of the rows of this training source that are held out for validation."""
    seed: NonNegative | None = None
    """Seed of the hold-out and of the bundled problems; null is the algorithm's seed."""
    num_rows: Positive | None = None
    """Take the first rows only (of the bundled problems: generate that many)."""
    prompt_file: str | None = None
    """A text file with one `{}` that the prompt is put into."""
    system_prompt_file: str | None = None
    """A text file with the system message."""
    env_name: EnvName | None = None
    """What judges answers: null is `arithmetic` for the bundled problems, `math` for all else."""

    @property
    def is_bundled(self) -> bool:
        """Whether the rows are the problems that come with the package."""
        return self.data_path is None and self.dataset_name in BUNDLED

    def conflicts(self) -> Iterator[Conflict]:
        """A source that is none, or can not be held out from."""
        if self.dataset_name is None and self.data_path is None:
            yield Conflict(("dataset_name", "data_path"), "one of them must say where rows are")
        if self.split_validation_size == 1:
            yield Conflict(("split_validation_size",), "nothing would be left to train on")


class DatasetDefaults(Node):
    """What `data.train` and `data.validation` inherit where they say nothing."""

    prompt_file: str | None = None
    """See `data.train.prompt_file`."""
    system_prompt_file: str | None = None
    """See `data.train.system_prompt_file`."""
    env_name: EnvName | None = None
    """See `data.train.env_name`."""


def _how_many(value: Any) -> str:
    """The tag of the union below, so that an error speaks of what the user wrote."""
    return "several" if isinstance(value, list | tuple) else "one"


Sources = Annotated[
    Annotated[DatasetConfig, Tag("one")] | Annotated[tuple[DatasetConfig, ...], Tag("several")],
    Discriminator(_how_many),
]


class DataConfig(Node):
    """The data of a run."""

    train: Sources = DatasetConfig(dataset_name="arithmetic")
    """One source or a list of them, mixed by `weight`."""
    validation: Sources | None = None
    """Held-out rows; null uses `split_validation_size` of the training sources, if set."""
    default: DatasetDefaults = DatasetDefaults()
    """What sources inherit."""
    max_input_seq_length: Positive | None = None
    """Most tokens of a row (GRPO: of its prompt); null is `policy.max_total_sequence_length`."""
    shuffle: bool = True
    """New order in every epoch, from the seed."""
    num_workers: Positive = 1
    """Processes that tokenise; 1 is the driver itself."""
    add_bos: bool = True
    """Start with the beginning-of-sequence token, where there is one and the template has none."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What a bad row does: end the run with a report before training, or be left out."""
    max_bad_rows: Fraction = 0.01
    """Under `bad_rows=drop`: the share of rows that may be left out."""

    def sources(self) -> dict[str, DatasetConfig]:
        """Every source by its dotted path."""
        found: dict[str, DatasetConfig] = {}
        for name in ("train", "validation"):
            value: DatasetConfig | tuple[DatasetConfig, ...] | None = getattr(self, name)
            if isinstance(value, DatasetConfig):
                found[f"data.{name}"] = value
            else:
                found |= {f"data.{name}.{i}": source for i, source in enumerate(value or ())}
        return found

    def judge(self, source: DatasetConfig) -> EnvName:
        """The environment that judges answers to a source's prompts."""
        default: EnvName = "arithmetic" if source.is_bundled else "math"
        return source.env_name or self.default.env_name or default

    @property
    def judges(self) -> set[EnvName]:
        """The environments that judge answers to any source's prompts."""
        return {self.judge(source) for source in self.sources().values()}

    def held_out(self) -> dict[str, DatasetConfig]:
        """The sources that validation draws from, by dotted path."""
        return {
            path: source
            for path, source in self.sources().items()
            if path.startswith("data.validation") or source.split_validation_size > 0
        }

    def conflicts(self) -> Iterator[Conflict]:
        """Lists without a source; keys that only training sources have."""
        for name in ("train", "validation"):
            if getattr(self, name) == ():
                yield Conflict((name,), "the list is empty")
        for path, source in self.sources().items():
            if path.startswith("data.train"):
                continue
            key = path.removeprefix("data.")
            if source.split_validation_size:
                yield Conflict(
                    (f"{key}.split_validation_size",),
                    "all rows of this source are for validation: leave it out",
                )
            if source.weight != 1:
                yield Conflict(
                    (f"{key}.weight",),
                    "validation draws from its sources in proportion to their rows: leave it out",
                )


class ConversationDataConfig(DataConfig):
    """The data of a run that learns whole conversations."""

    add_eos: bool = True
    """End the last assistant turn with the end-of-sequence token, where the template does not."""
    add_generation_prompt: bool = False
    """Put the template's generation prompt before the assistant's turn."""
