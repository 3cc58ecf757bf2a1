"""Raw rows, one at a time, from files, `datasets` and the bundled generator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from nemo_like.config.data import DatasetConfig
from nemo_like.data.arithmetic import Kind, generate_problems
from nemo_like.data.faults import RowError, shorten
from nemo_like.errors import ConfigError

MAX_ROW_BYTES = 16 * 1024 * 1024
_DEFAULT_PROBLEMS = {"train": 8192, "validation": 512}
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip"}


class RawRow(NamedTuple):
    """A row as it was read, or why it could not be; `number` counts from 1, 0 is the whole file."""

    file: str
    number: int
    value: dict[str, Any] | RowError


def read_rows(source: DatasetConfig, *, seed: int) -> Iterator[RawRow]:
    """The rows of a source, in order, up to `num_rows`.

    Raises:
        ConfigError: if there is no such source.
    """
    if source.data_path is not None:
        files = _files(Path(source.data_path))
        return islice(chain.from_iterable(map(_file_rows, files)), source.num_rows)
    match source.dataset_name:
        case "arithmetic" | "products" as kind:
            return _problem_rows(kind, source, seed)
    return islice(_hub_rows(source), source.num_rows)


def _problem_rows(kind: Kind, source: DatasetConfig, seed: int) -> Iterator[RawRow]:
    match source.split:
        case "train" | "validation" as split:
            num = source.num_rows or _DEFAULT_PROBLEMS[split]
        case other:
            raise ConfigError(f"split={other} of `{kind}`: expected train or validation")
    problems = generate_problems(num, seed=seed, split=split, kind=kind)
    for number, problem in enumerate(problems, start=1):
        yield RawRow(kind, number, {"input": problem.prompt, "output": problem.response})


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"data_path={path}: no such file or folder (looked in {Path.cwd()})")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
    if not files:
        raise ConfigError(f"data_path={path}: the folder has no .jsonl or .parquet file")
    return files


def _file_rows(file: Path) -> Iterator[RawRow]:
    match file.suffix:
        case ".jsonl":
            rows = _jsonl_rows(file)
        case ".parquet":
            rows = _parquet_rows(file)
        case other:
            raise ConfigError(f"data_path={file}: expected .jsonl or .parquet, not `{other}`")
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        yield RawRow(str(file), 0, RowError("empty file"))


def _jsonl_rows(file: Path) -> Iterator[RawRow]:
    with file.open("rb") as stream:
        head = stream.peek(2)[:2]
        if head in _OTHER_ENCODINGS:
            error = RowError("wrong encoding", found=f"{_OTHER_ENCODINGS[head]}, expected UTF-8")
            yield RawRow(str(file), 0, error)
            return
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):  # to the end of the row, in pieces
                    line = stream.readline(MAX_ROW_BYTES)
                error = RowError("huge row", found=f"more than {MAX_ROW_BYTES} bytes")
                yield RawRow(str(file), number, error)
            elif line.strip():
                yield RawRow(str(file), number, _parse(line))


def _parse(line: bytes) -> dict[str, Any] | RowError:
    """The object in a line, or the rule that it breaks."""
    if line.startswith(b"\xef\xbb\xbf"):
        return RowError("byte order mark", found="save the file as UTF-8 without a BOM")
    try:
        value = json.loads(
            line.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as exc:
        found = f"byte 0x{line[exc.start]:02x} at {exc.start} is not UTF-8"
        return RowError("wrong encoding", found=found)
    except RowError as error:
        return error
    except RecursionError:
        return RowError("not JSON", found="nested too deep")
    except ValueError as exc:
        return RowError("not JSON", found=str(exc))
    if not isinstance(value, dict):
        return RowError("not an object", found=shorten(value))
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise RowError("key given twice", field=next(n for n in names if names.count(n) > 1))
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise RowError("not JSON", found=f"{name} is not a JSON number")


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(str(file), number, value)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        found = f"after row {number}: {str(exc).splitlines()[0]}"
        yield RawRow(str(file), 0, RowError("damaged parquet file", found=found))


def _hub_rows(source: DatasetConfig) -> Iterator[RawRow]:
    """Rows of `datasets`: a saved folder, or anything that `load_dataset` knows."""
    import datasets

    name = str(source.dataset_name)
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            table = datasets.load_from_disk(name)
            if isinstance(table, datasets.DatasetDict):
                table = table[source.split]
        else:
            table = datasets.load_dataset(name, source.subset, split=source.split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as exc:
        raise ConfigError(
            f"dataset_name={name} (subset={source.subset}, split={source.split}) can not be "
            f"loaded: {type(exc).__name__}: {shorten(str(exc))}. Without a network, use data_path "
            "for local files, or a folder that `datasets` has saved"
        ) from exc
    for number, value in enumerate(table, start=1):
        yield RawRow(name, number, value)
