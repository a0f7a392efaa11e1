"""The user's own text: files, folders, and data sets of the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moekit.config.data import DataConfig
from moekit.config.errors import ConfigError, DataError, MissingExtraError, nearest
from moekit.data.documents import Document, SourceInfo

Progress = Callable[[str], None]

_TABLES = (".jsonl", ".parquet")
_PROSE = {".txt": "text", ".md": "markdown", ".rst": "restructuredtext", ".tex": "latex"}
_LANGUAGES = {
    ".py": "python", ".pyi": "python", ".js": "javascript", ".mjs": "javascript",
    ".jsx": "javascript", ".ts": "typescript", ".tsx": "typescript", ".c": "c", ".h": "c",
    ".cc": "cpp", ".cpp": "cpp", ".hpp": "cpp", ".cu": "cuda", ".java": "java", ".kt": "kotlin",
    ".go": "go", ".rs": "rust", ".rb": "ruby", ".php": "php", ".cs": "csharp", ".swift": "swift",
    ".scala": "scala", ".jl": "julia", ".r": "r", ".lua": "lua", ".sh": "shell", ".sql": "sql",
    ".html": "html", ".css": "css", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml",
}  # fmt: skip
_SUFFIXES = (*_TABLES, *_PROSE, *_LANGUAGES)
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "venv", "build", "dist"}


def files_of(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that moekit reads: sorted, no hidden ones, no links.

    Raises:
        ConfigError: if the path does not exist, or a file has an unknown suffix.
        DataError: if a folder has no file that can be read.
    """
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise ConfigError(
                f"data.path must end in {', '.join(_SUFFIXES[:4])} or a suffix of source code; "
                f"got {str(path)!r}. {nearest(path.suffix.lower() or path.name, _SUFFIXES)}"
            )
        return [path]
    if not path.is_dir():
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = f". {nearest(path.name, siblings)}" if 0 < len(siblings) <= 30 else ""
        raise ConfigError(f"data.path must be a file or a folder; {str(path)!r} does not exist{hint}")
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")
        )
        for name in sorted(names):
            file = Path(folder, name)
            if file.suffix.lower() in _SUFFIXES and not name.startswith(".") and not file.is_symlink():
                found.append(file)
    if not found:
        raise DataError(
            f"data.path: the folder {str(path)!r} has no file that ends in {', '.join(_SUFFIXES)}"
        )
    return found


def local_documents(
    config: DataConfig, progress: Progress | None = None
) -> tuple[list[Document], SourceInfo]:
    """Documents of `config.path`.

    A .txt file or file of source code is one document; a .jsonl or .parquet file has one a row, its text in
    `text_column`. Domain: `domain_column` where set; else the language of source code; else, in a folder, the
    name of the first folder below it; else "text".

    Raises: ConfigError: for a path or column that is not there, with the nearest name. DataError: for an
        empty file, broken JSON (file and line), or bytes that are not UTF-8 (position). In a folder,
            empty files and files that are not UTF-8 are left out and counted in the note.
        MissingExtraError: for .parquet without the extra `parquet`.
    """
    assert config.path is not None
    root = Path(config.path).expanduser()
    files = files_of(root)
    base = root if root.is_dir() else root.parent
    documents: list[Document] = []
    left_out = []
    for file in files:
        relative = file.relative_to(base)
        domain = _domain(relative)
        if file.suffix.lower() in _TABLES:
            rows = _jsonl_rows(file) if file.suffix.lower() == ".jsonl" else _parquet_rows(file, config)
            documents += _row_documents(rows, relative.as_posix(), domain, config, str(file))
            continue
        try:
            documents.append(Document(read_text(file), domain, relative.as_posix()))
        except DataError as error:
            if root.is_file():
                raise
            left_out.append(str(error))
    if not any(document.text.strip() for document in documents):
        raise DataError(f"data.path: {str(root)!r} has no text" + (f" ({left_out[0]})" if left_out else ""))
    note = f"{len(left_out)} files left out, the first: {left_out[0]}" if left_out else ""
    if note and progress is not None:
        progress(note)
    info = SourceInfo(
        name=root.name, origin=f"{len(files)} files of {root}", licence="yours", sha256=None, note=note
    )
    return documents, info


def _domain(relative: Path) -> str:
    language = _LANGUAGES.get(relative.suffix.lower())
    if language is not None:
        return language
    return relative.parts[0] if len(relative.parts) > 1 else _PROSE.get(relative.suffix.lower(), "text")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark, line ends as newlines.

    Raises:
        DataError: if it is empty or not UTF-8; the message gives the position.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start} "
            f"(line {line}). Convert it: iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = read_text(path)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON: {error.msg} at column {error.colno}. "
                "Each line must be one JSON object"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: each line must be a JSON object; got {type(row).__name__}")
        yield number, row


def _parquet_rows(path: Path, config: DataConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtraError(f"{path} needs pyarrow: pip install 'moekit[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's errors have no common base besides Exception
        raise DataError(f"{path} is not a parquet file: {error}") from None
    names = list(file.schema_arrow.names)
    columns = [name for name in (config.text_column, config.domain_column) if name is not None]
    for field, name in (("text_column", config.text_column), ("domain_column", config.domain_column)):
        _require_column(field, name, names, str(path))
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _require_column(field: str, name: str | None, known: list[str], where: str) -> None:
    if name is not None and name not in known:
        raise ConfigError(f"data.{field} must be a column of {where}; got {name!r}: {nearest(name, known)}")


def _row_documents(
    rows: Iterator[tuple[int, Mapping[str, Any]]], name: str, domain: str, config: DataConfig, where: str
) -> Iterator[Document]:
    columns = [("text_column", config.text_column), ("domain_column", config.domain_column)]
    columns = [(field, column) for field, column in columns if column is not None]
    for number, row in rows:
        for field, column in columns:
            if column not in row:
                _require_column(field, column, list(row), f"{where}:{number}")
        text = row[config.text_column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"{where}:{number}: column {config.text_column!r} must hold text; got {type(text).__name__}"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}:{number}: column {config.text_column!r} has half a surrogate pair at "
                f"character {error.start}, which no UTF-8 text can hold"
            ) from None
        own = str(row[config.domain_column]) if config.domain_column is not None else domain
        yield Document(text, own, f"{name}:{number}")


def hub_documents(config: DataConfig, progress: Progress | None = None) -> tuple[list[Document], SourceInfo]:
    """Documents of a Hugging Face data set; `name:configuration` names one of its configurations.

    With `max_bytes_per_domain` and no `domain_column`, rows are streamed and reading stops at twice that many
    bytes.

    Raises:
        MissingExtraError: without the extra `hf`.
        ConfigError: for a column that is not there.
        DataError: if the data set cannot be loaded.
    """
    assert config.hub_dataset is not None
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MissingExtraError(
            "data.hub_dataset needs the datasets library: pip install 'moekit[hf]'"
        ) from None
    name, _, configuration = config.hub_dataset.partition(":")
    budget = config.max_bytes_per_domain if config.domain_column is None else None
    if progress is not None:
        progress(f"loading {config.hub_dataset} ({config.hub_split})")
    options: dict[str, Any] = {"split": config.hub_split}
    if config.offline:
        options["download_config"] = datasets.DownloadConfig(local_files_only=True)
    elif budget is not None:
        options["streaming"] = True
    try:
        data = datasets.load_dataset(name, configuration or None, **options)
        rows = enumerate(data, 1)
        documents = []
        size = 0
        for document in _row_documents(rows, name, "text", config, config.hub_dataset):
            documents.append(document)
            size += document.n_bytes
            if budget is not None and size >= 2 * budget:
                break
    except (ConfigError, DataError):
        raise
    except Exception as error:  # whatever the network and the data set's files bring
        raise DataError(f"data.hub_dataset {config.hub_dataset!r} could not be loaded: {error}") from error
    if not documents:
        raise DataError(f"data.hub_dataset {config.hub_dataset!r} has no rows in {config.hub_split!r}")
    info = SourceInfo(
        name=config.hub_dataset,
        origin=f"Hugging Face data set, split {config.hub_split}, {len(documents)} rows",
        licence=getattr(getattr(data, "info", None), "license", "") or "see the data set's card",
        sha256=None,
        note=f"the first rows of at least {2 * budget} bytes" if budget is not None else "",
    )
    return documents, info
