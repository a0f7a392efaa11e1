"""The user's own examples: CSV, TSV, JSON lines, Parquet, and folders with a folder for each class.

Whatever is wrong in a file is an error with the file, the line and the column, before anything is trained.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, DataError, MissingExtraError, nearest
from moekit.data.examples import Examples
from moekit.data.log_mel import wave_frames
from moekit.data.sources import read_text

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
SIGNALS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".npy", ".wav")
_TEXTS = (".txt", ".md")


def read_examples(path: str | Path, columns: Mapping[str, str], wanted: Sequence[str]) -> Examples:
    """Examples of a file or folder.

    Args:
        path: the file or folder.
        columns: the task's name of a column to the file's name of it, where they differ.
        wanted: the task's names of the columns that are read; a missing one is an error.

    Errors: `ConfigError` for a path, suffix or column that is not there, with the nearest name; `DataError` with file
    and line for what cannot be read; `MissingExtraError` for .parquet or images without their library.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path, columns, wanted)
    if not path.is_file():
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"data.path {str(path)!r} does not exist: {nearest(path.name, siblings) if siblings else ''}"
        )
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ConfigError(
            f"data.path must be a folder or end in {', '.join(TABLES)}; got {str(path)!r}. "
            f"{nearest(suffix or path.name, TABLES)}"
        )
    return _collected(READERS[suffix](path), path, columns, wanted)


def _collected(
    rows: Iterator[tuple[int, Mapping[str, Any]]],
    path: Path,
    columns: Mapping[str, str],
    wanted: Sequence[str],
) -> Examples:
    found: dict[str, list[Any]] = {name: [] for name in wanted}
    origins: list[str] = []
    for line, row in rows:
        for name in wanted:
            own = columns.get(name, name)
            if own not in row:
                raise ConfigError(
                    f"{path}:{line}: column {own!r} ({name} of the task) is missing: {nearest(own, list(row))}. "
                    f"Name yours with data.columns.{name}=NAME"
                )
            found[name].append(row[own])
        origins.append(f"{path}:{line}")
    if not origins:
        raise DataError(f"{path} holds no examples")
    return Examples(found, origins, dict(columns))


def _delimited(path: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = read_text(path)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}:{line}: holds a NUL byte, so it is no text table")
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    csv.field_size_limit(2**31 - 1)
    try:
        header = next(reader)
        doubles = sorted({name for name in header if header.count(name) > 1})
        if doubles:
            raise DataError(f"{path}:1: column {doubles[0]!r} stands twice in the header")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(row)} fields, but the header has {len(header)} columns. Is a "
                    "quotation mark missing, or another separator used?"
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return _delimited(path, ",")


def _tsv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return _delimited(path, "\t")


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: each line must be a JSON object; got {type(row).__name__}")
        yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtraError(f"{path} needs pyarrow: pip install 'moekit[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's errors have no common base besides Exception
        raise DataError(f"{path} is not a parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    ".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet,
}  # fmt: skip


def _folder(root: Path, columns: Mapping[str, str], wanted: Sequence[str]) -> Examples:
    """`root/CLASS/FILE`: the class is the name of the folder, the content a text, an image or an array."""
    content = [name for name in wanted if name != "label"]
    if len(content) != 1:
        raise ConfigError(
            f"data.path: a folder of files gives a label and one other column; the task reads {', '.join(wanted)}. "
            "Give a table instead"
        )
    values, labels, origins = [], [], []
    files = sorted(
        item
        for item in root.rglob("*")
        if item.is_file() and not any(part.startswith(".") for part in item.parts)
    )
    for file in files:
        if file.suffix.lower() not in (*_TEXTS, *SIGNALS):
            continue
        if "label" in wanted and file.parent == root:
            raise DataError(f"{file} lies in no folder of a class: put it into {root}/CLASS/")
        values.append(read_signal(file))
        origins.append(str(file))
        labels.append(file.relative_to(root).parts[0])
    if not values:
        raise DataError(f"{root} has no file that ends in {', '.join((*_TEXTS, *SIGNALS))}")
    found: dict[str, Any] = {content[0]: values}
    if "label" in wanted:
        found["label"] = labels
    return Examples(found, origins, dict(columns))


def read_signal(path: Path) -> Any:
    """The content of one file: text, an array, an image `[height, width, 3]`, or a sound as log-mel frames.

    Errors: `DataError` where it cannot be read, `MissingExtraError` for images without Pillow.
    """
    suffix = path.suffix.lower()
    if suffix in _TEXTS:
        return read_text(path)
    if suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path} is no array of numbers: {error}") from None
    if suffix == ".wav":
        return wave_frames(path)
    try:
        image = importlib.import_module("PIL.Image")
    except ImportError:
        raise MissingExtraError(f"{path} needs Pillow: pip install 'moekit[tasks]'") from None
    try:
        return np.asarray(image.open(path).convert("RGB"))
    except Exception as error:  # Pillow raises many kinds
        raise DataError(f"{path} is not an image: {error}") from None
