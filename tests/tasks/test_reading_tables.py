"""The user's own files: what is read, and the error for each thing that can be wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moekit.config.errors import ConfigError, DataError
from moekit.config.task_run import TaskRunConfig
from moekit.data.tables import read_examples
from moekit.data.task_data import load_task_data

WANTED = ("text", "label")


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_all_formats_give_the_same(tmp_path):
    rows = [("a, b", "x"), ('say "hi"', "y"), ("中文\nzwei", "x")]
    csv = 'text,label\n"a, b",x\n"say ""hi""",y\n"中文\nzwei",x\n'
    jsonl = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    tsv = 'text\tlabel\na, b\tx\n"say ""hi"""\ty\n"中文\nzwei"\tx\n'
    expected = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    for name, content in (("a.csv", csv), ("a.jsonl", jsonl), ("a.tsv", tsv), ("b.csv", "\ufeff" + csv),
                          ("c.csv", csv.replace("\n", "\r\n"))):  # fmt: skip
        assert read_examples(write(tmp_path, name, content), {}, WANTED).columns == expected, name
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table(expected), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet", {}, WANTED).columns == expected


def test_own_names_of_columns(tmp_path):
    path = write(tmp_path, "a.csv", "review,stars,who\ngood,5,ann\n")
    found = read_examples(path, {"text": "review", "label": "stars"}, WANTED)
    assert found.columns == {"text": ["good"], "label": ["5"]}


def test_a_folder_of_classes(tmp_path):
    for label in ("ham", "spam"):
        (tmp_path / "mail" / label).mkdir(parents=True)
        for number in range(2):
            write(tmp_path / "mail" / label, f"{number}.txt", f"{label} {number}")
    found = read_examples(tmp_path / "mail", {}, WANTED)
    assert found["label"] == ["ham", "ham", "spam", "spam"]
    assert found["text"][2] == "spam 0"
    for label in ("a", "b"):
        (tmp_path / "sound" / label).mkdir(parents=True)
        np.save(tmp_path / "sound" / label / "x.npy", np.ones((3, 2), np.float32))
    assert read_examples(tmp_path / "sound", {}, ("audio", "label"))["audio"][0].shape == (3, 2)


BROKEN = {
    "no such file": (None, None, ConfigError, "does not exist"),
    "an unknown suffix": ("a.xlsx", "text,label\n", ConfigError, r"must be a folder or end in \.csv"),
    "empty": ("a.csv", "", DataError, "is empty"),
    "a header alone": ("a.csv", "text,label\n", DataError, "holds no examples"),
    "a column missing": ("a.csv", "txt,label\na,x\n", ConfigError,
                         r"a\.csv:2: column 'text' .*missing: .*'txt'.*data\.columns\.text=NAME"),
    "a column twice": ("a.csv", "text,text,label\na,b,x\n", DataError, r"a\.csv:1: column 'text' stands twice"),
    "a field too many": ("a.csv", "text,label\na,x\nb,c,y\n", DataError, r"a\.csv:3: 3 fields, .* 2 columns"),
    "a quotation mark left open": ("a.csv", 'text,label\n"a,x\nb,y\n', DataError, r"a\.csv:3: "),
    "not UTF-8": ("a.csv", b"text,label\ncaf\xe9,x\n", DataError, r"not UTF-8: byte 0xe9 at position 14 \(line 2\)"),
    "a NUL byte": ("a.csv", b"text,label\na\x00,x\n", DataError, r"a\.csv:2: holds a NUL byte"),
    "broken JSON": ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b" "label"}\n', DataError,
                    r"a\.jsonl:2: not JSON: .* at column 14"),
    "a list in JSON lines": ("a.jsonl", '["a", "x"]\n', DataError,
                             r"a\.jsonl:1: each line must be a JSON object; got list"),
    "no Parquet": ("a.parquet", "PAR1 not really", DataError, "is not a parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, what):
    name, content, error, words = BROKEN[what]
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "a.csv" if name is None else write(tmp_path, name, content)
    with pytest.raises(error, match=words):
        read_examples(path, {}, WANTED)


def config(path, **targets) -> TaskRunConfig:
    return TaskRunConfig.from_dict({
        "inputs": {"text": {"kind": "text", "tokenizer": "words"}},
        "targets": {"label": {"kind": "class", **targets}}, "data": {"path": str(path), "test_share": 0.2},
    })  # fmt: skip


def test_shares_of_a_users_file(tmp_path):
    rows = "".join(f"text {i},{'xy'[i % 2]}\n" for i in range(100))
    data = load_task_data(config(write(tmp_path, "a.csv", "text,label\n" + rows)))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [72, 8, 20]
    assert sorted([*data.train["text"], *data.validation["text"], *data.test["text"]]) == sorted(
        f"text {i}" for i in range(100)
    )
    assert data.test["label"].count("x") == 10
    assert not data.given_test
    again = load_task_data(config(tmp_path / "a.csv"))
    assert again.fingerprint() == data.fingerprint()


def test_too_few_examples(tmp_path):
    with pytest.raises(DataError, match="1 examples are too few"):
        load_task_data(config(write(tmp_path, "a.csv", "text,label\na,x\n")))
