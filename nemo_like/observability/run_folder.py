"""The folder `logs/exp_NNN`: all that a run tells, and nothing that it needs to continue.

metrics.jsonl   one JSON object per line: step, time, and values by name
samples.jsonl   answers to held-out prompts
config.yaml     the resolved configuration, secrets removed
tables.json     what was printed as tables, such as the routing table
facts.json      versions, device, command, when it began
report.html     all of it, made for reading
tensorboard/ wandb/ mlflow/    where these are switched on
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_like.errors import ConfigError, DataError
from nemo_like.observability.records import Answer, Table
from nemo_like.observability.secrets import redact_tree

_NUMBERED = re.compile(r"exp_(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """The log folder of one run; a resumed run goes on in the folder it began in."""

    path: Path

    @classmethod
    def create(cls, log_dir: str | Path) -> RunFolder:
        """A new folder `exp_NNN`, which no other process gets, however many start at once."""
        log_dir = Path(log_dir)
        log_dir.mkdir(parents=True, exist_ok=True)
        numbers = [int(m[1]) for p in log_dir.iterdir() if (m := _NUMBERED.fullmatch(p.name))]
        number = max(numbers, default=0) + 1
        while True:
            path = log_dir / f"exp_{number:03d}"
            try:
                path.mkdir()  # atomic: of two processes that chose this number, one gets it
            except FileExistsError:
                number += 1
            else:
                return cls(path)

    @classmethod
    def reopen(cls, path: str | Path, *, step: int) -> RunFolder:
        """The folder of the run that is resumed at `step`, without what it told of later steps.

        Steps after `step` are done again, so the curves stay single-valued. A missing folder is
        made anew: logs may be deleted, and a run must be able to continue without them.
        """
        folder = cls(Path(path))
        folder.path.mkdir(parents=True, exist_ok=True)
        for log in (folder.metrics, folder.samples):
            truncate_after(log, step)
        return folder

    @classmethod
    def of_run(cls, path: Path) -> RunFolder:
        """The folder of a run that has logged something.

        Raises:
            ConfigError: there is no such run in it.
        """
        folder = cls(path)
        if not folder.metrics.is_file():
            raise ConfigError(
                f"{path} holds no metrics.jsonl; expected the log folder of a run, such as "
                "logs/exp_001 (see logger.log_dir)"
            )
        return folder

    @property
    def metrics(self) -> Path:
        """The file of all metrics."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """The file of all answers of validations."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        """The page made of it all."""
        return self.path / "report.html"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def facts(self) -> Path:
        """Versions, device, command."""
        return self.path / "facts.json"

    @property
    def tables(self) -> Path:
        """What was printed as tables."""
        return self.path / "tables.json"

    def write_config(self, tree: Mapping[str, Any]) -> None:
        """Save the resolved configuration, secrets removed."""
        import yaml

        text = yaml.safe_dump(redact_tree(tree), sort_keys=False, allow_unicode=True)
        _replace(self.config, text.encode())

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration; nothing, where a run did not get as far as saving it.

        Raises:
            DataError: the file is not what `write_config` writes.
        """
        import yaml

        if not self.config.is_file():
            return {}
        try:
            tree = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{self.config} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(tree, dict):
            raise DataError(f"{self.config} holds no keys; expected a run's configuration")
        return tree

    def write_facts(self, facts: Mapping[str, str]) -> None:
        """Save facts about the run."""
        _replace(self.facts, _json(redact_tree(facts), indent=2))

    def write_tables(self, tables: Iterable[Table]) -> None:
        """Save tables, in the order of the report."""
        _replace(self.tables, _json(redact_tree([dataclasses.asdict(t) for t in tables]), indent=1))

    def append_answers(self, answers: Iterable[Answer]) -> None:
        """Add answers to held-out prompts."""
        for answer in answers:
            append_line(self.samples, redact_tree(dataclasses.asdict(answer)))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON object as one line, in one write: a kill leaves at most the last line torn."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        line = _json(record) + b"\n"
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "no space for a whole line", str(path))
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole records of a file that may not exist, without a torn last line.

    Raises:
        DataError: a line before the last is another's, so something else wrote into the file.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is empty, or torn
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                raise ValueError("found no step in it")
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not JSON of a run ({error}); expected one object with "
                "a step per line: remove the line, or move the file away"
            ) from error
        records.append(record)
    return records


def truncate_after(path: Path, step: int) -> None:
    """Drop the records of later steps, and a torn last line; a file that is not there stays so."""
    if not path.exists():
        return
    kept = [record for record in read_lines(path) if record["step"] <= step]
    _replace(path, b"".join(_json(record) + b"\n" for record in kept))


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent).encode()


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
