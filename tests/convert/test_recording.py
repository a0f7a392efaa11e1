"""From a Hugging Face folder and some text to the page of its experts."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.0")
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moekit.cli.main import main
from moekit.convert.recording import batches, cut, record_folder
from moekit.data.documents import Document
from moekit.data.tokenizer import train_tokenizer

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two files and a folder of two more groups."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    files = {"a.txt": "abc", "more/digits/1.txt": "123", "more/digits/2.txt": "456", "more/x/3.txt": "xyz"}
    for name, signs in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(" ".join("".join(draw.choices(signs, k=3)) for _ in range(400)))
    return folder


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory, text):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "olmoe"
    OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)).save_pretrained(folder)
    documents = [Document(path.read_text(), "text", path.name) for path in text.rglob("*.txt")]
    train_tokenizer(documents, 300).save(folder / "tokenizer.json")
    return folder


def test_groups_are_files_and_folders_and_get_equal_shares(olmoe, text):
    record = record_folder(olmoe, [text / "a.txt", text / "more"], tokens=900, length=32, batch_size=4)
    assert record.groups == ("a", "digits", "x")
    assert record.arrays["tokens"].tolist() == [300, 300, 300]
    assert record.n_token_rows == 900
    digits = record.arrays["token/group"] == 1
    assert len(np.unique(record.arrays["token/text"][digits])) == 2, "both files of the group"
    assert record.arrays["token/position"].max() > 64, "places in the document, not in the piece"
    assert record.source == "foreign"


def test_each_token_is_read_once_in_its_place(olmoe, text):
    from moekit.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(olmoe / "tokenizer.json")
    documents = [
        Document("aa bb cc dd " * 9, "one", "1"),
        Document(" ", "one", "2"),
        Document("zz", "two", "3"),
    ]
    pieces = cut(tokenizer, documents, ["one", "two"], 10_000, 8)
    back = {}
    for batch in batches(pieces, 3):
        for row in range(len(batch["input_ids"])):
            n = int(batch["attention_mask"][row].sum())
            for place, token in zip(
                batch["positions"][row, :n].tolist(), batch["input_ids"][row, :n].tolist(), strict=True
            ):
                back[(int(batch["texts"][row]), place)] = token
    for number in (0, 2):
        ids = [token for (text_number, _), token in sorted(back.items()) if text_number == number]
        full = tokenizer.encode(documents[number].text)
        assert ids == full[: len(ids)]
        assert len(full) - len(ids) <= 1, "a last piece of a single token predicts nothing"


def test_explain_records_and_writes_the_page(olmoe, text, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["explain", str(olmoe), "--data", str(text / "a.txt"), "--data", str(text / "more")]
    assert main([*words, "--tokens", "600", "--out", str(page), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["groups"] == ["a", "digits", "x"]
    assert report["title"] == "olmoe"
    assert report["n_layers"] == 2
    assert "OlmoeTopKRouter" in report["layers"][0]["router"]
    read = "".join("".join(one["tokens"]) for one in report["texts"] if one["group"] == "digits")
    assert set(read) <= set("123456 ")
    assert page.is_file()


def test_a_saved_record_is_explained_with_the_model_s_words(olmoe, text, capsys):
    record_folder(olmoe, [text / "a.txt"], tokens=200).save(olmoe / "routing")
    assert main(["explain", str(olmoe / "routing"), "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["texts"][0]["tokens"]
    assert set("".join(tokens)) <= set("abc ")


def test_what_cannot_be_explained_is_said(olmoe, text, tmp_path, capsys):
    assert main(["explain", str(olmoe)]) != 0
    assert "Give files or folders: --data" in capsys.readouterr().err
    assert main(["explain", str(olmoe), "--data", str(text / "none.txt")]) != 0
    assert "none.txt" in capsys.readouterr().err
    assert main(["explain", str(olmoe), "--data", str(text), "--causes"]) == 2
    assert main(["explain", str(tmp_path), "--data", str(text)]) == 2
    capsys.readouterr()
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--data", str(text)]) != 0
    assert "tokenizer.json" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_bytes((olmoe / "tokenizer.json").read_bytes())
    assert main(["explain", str(tmp_path), "--data", str(text)]) != 0
    assert "must have experts" in capsys.readouterr().err
