"""The user's own text: what is read, and errors that name the file, the place and the remedy."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from moekit.config.data import DataConfig
from moekit.config.errors import ConfigError, DataError, MissingExtraError
from moekit.data.documents import Document, SourceInfo
from moekit.data.sources import hub_documents, local_documents


def read(path: Path, **settings: object) -> tuple[list[Document], SourceInfo]:
    return local_documents(DataConfig(path=str(path), **settings))  # type: ignore[arg-type]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffline one\r\nline two\r".encode())
    documents, info = read(tmp_path / "a.txt")
    assert documents == [Document("line one\nline two\n", "text", "a.txt")]
    assert info.name == "a.txt"


def test_a_folder_gives_a_document_a_file_with_its_domain(tmp_path: Path) -> None:
    files = {
        "src/a.py": "x = 1",
        "src/deep/b.RS": "fn main() {}",
        "letters/c.txt": "dear",
        "d.md": "# head",
        "e.txt": "root",
        ".hidden/f.py": "no",
        "src/__pycache__/g.py": "no",
        "h.png": "no",
        "empty.py": " \n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1"))
    (tmp_path / "link.txt").symlink_to(tmp_path / "e.txt")
    messages: list[str] = []
    documents, info = local_documents(DataConfig(path=str(tmp_path)), messages.append)
    assert {document.name: document.domain for document in documents} == {
        "src/a.py": "python",
        "src/deep/b.RS": "rust",
        "letters/c.txt": "letters",
        "d.md": "markdown",
        "e.txt": "text",
    }
    assert info.note.startswith("2 files left out, the first: ")
    assert messages == [info.note]


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    rows = [{"text": "one", "kind": "x"}, {"text": "two\u2028", "kind": "y"}, {"text": None, "kind": "y"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    documents, _ = read(tmp_path / "a.jsonl", domain_column="kind")
    assert documents == [Document("one", "x", "a.jsonl:1"), Document("two\u2028", "y", "a.jsonl:3")]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"body": ["one", "two"], "kind": ["x", "y"], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    documents, _ = read(tmp_path / "a.parquet", text_column="body", domain_column="kind")
    assert documents == [Document("one", "x", "a.parquet:1"), Document("two", "y", "a.parquet:2")]
    with pytest.raises(
        ConfigError, match=r"data\.text_column .* got 'bodi': did you mean 'body'\? Known: body, kind, n"
    ):
        read(tmp_path / "a.parquet", text_column="bodi")
    with pytest.raises(DataError, match=r"a\.parquet:1: column 'n' must hold text; got int"):
        read(tmp_path / "a.parquet", text_column="n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"broken\.parquet is not a parquet file"):
        read(tmp_path / "broken.parquet")


def test_parquet_without_its_extra_names_the_install_command(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.parquet").write_text("x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moekit\[parquet\]'"):
        read(tmp_path / "a.parquet")


def test_a_missing_path_names_its_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(
        ConfigError, match=r"data\.path .*corpsu\.txt' does not exist\. did you mean 'corpus\.txt'"
    ):
        read(tmp_path / "corpsu.txt")


def test_an_unknown_suffix_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.jsonll").write_text("x")
    with pytest.raises(ConfigError, match=r"got '.*a\.jsonll'\. did you mean '\.jsonl'"):
        read(tmp_path / "a.jsonll")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(" \n\n")
    with pytest.raises(DataError, match=f"{name} is empty"):
        read(tmp_path / name)


def test_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no file that ends in"):
        read(tmp_path)
    (tmp_path / "a.py").write_text("")
    with pytest.raises(DataError, match=r"has no text \(.*a\.py is empty\)"):
        read(tmp_path)


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"line one\nna\xefve")
    with pytest.raises(DataError, match=r"byte 0xef at position 11 \(line 2\)\. Convert it: iconv"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"text": "a"', DataError, r"a\.jsonl:2: not JSON: .* at column 13"),
        ('["a"]', DataError, r"a\.jsonl:2: each line must be a JSON object; got list"),
        (
            '{"txt": "a"}',
            ConfigError,
            r"data\.text_column must be a column of .*a\.jsonl:2; got 'text': did you mean 'txt'",
        ),
        ('{"text": 5}', DataError, r"a\.jsonl:2: column 'text' must hold text; got int"),
        ('{"text": "a\\ud800"}', DataError, r"a\.jsonl:2: .*half a surrogate pair at character 1"),
    ],
)
def test_broken_rows_name_file_and_line(
    tmp_path: Path, line: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(error, match=message):
        read(tmp_path / "a.jsonl")


class FakeHub(types.ModuleType):
    """Stands in for the datasets library; remembers what it was asked for."""

    def __init__(self, rows: list[dict[str, object]]):
        super().__init__("datasets")
        self.rows = rows
        self.calls: list[tuple[object, ...]] = []

    def load_dataset(
        self, name: str, configuration: str | None, **options: object
    ) -> list[dict[str, object]]:
        self.calls.append((name, configuration, options))
        if name == "gone":
            raise FileNotFoundError("no such data set")
        return self.rows

    @staticmethod
    def DownloadConfig(local_files_only: bool) -> str:
        return f"local={local_files_only}"


def test_hub_rows_are_documents(monkeypatch) -> None:
    hub = FakeHub([{"text": "x" * 600, "kind": "a"} for _ in range(10)])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    documents, info = hub_documents(DataConfig(hub_dataset="owner/name:small"))
    assert len(documents) == 10
    assert hub.calls[0] == ("owner/name", "small", {"split": "train"})
    assert (documents[2].name, documents[2].domain) == ("owner/name:3", "text")
    assert "see the data set's card" in info.licence
    # with a budget the rows are streamed and reading stops
    documents, _ = hub_documents(DataConfig(hub_dataset="owner/name", max_bytes_per_domain=1000))
    assert len(documents) == 4
    assert hub.calls[1] == ("owner/name", None, {"split": "train", "streaming": True})
    hub_documents(DataConfig(hub_dataset="owner/name", offline=True))
    assert hub.calls[2][2] == {"split": "train", "download_config": "local=True"}
    with pytest.raises(ConfigError, match=r"data\.domain_column .* got 'kin': did you mean 'kind'"):
        hub_documents(DataConfig(hub_dataset="owner/name", domain_column="kin"))
    with pytest.raises(DataError, match="'gone' could not be loaded: no such data set"):
        hub_documents(DataConfig(hub_dataset="gone"))


def test_hub_without_its_extra_names_the_install_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moekit\[hf\]'"):
        hub_documents(DataConfig(hub_dataset="owner/name"))
