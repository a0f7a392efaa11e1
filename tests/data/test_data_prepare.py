"""Preparing: the cache gives back the same data, notices every change, and is never half written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moekit.config.data import DataConfig
from moekit.data import prepare as module
from moekit.data.prepare import PreparedData, prepare
from moekit.data.tokenizer import train_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty small files in two domains."""
    root = tmp_path / "text"
    for i in range(30):
        file = root / f"{i}.{'py' if i % 2 else 'txt'}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            "\n".join(
                f"line {j * i} of the file number {i}, which is {'code' if i % 2 else 'text'}"
                for j in range(20)
            )
        )
    return root


def config(folder: Path, **settings: object) -> DataConfig:
    return DataConfig.from_dict({"path": str(folder), "vocab_size": 300, "validation_share": 0.2, **settings})


def same(first: PreparedData, second: PreparedData) -> bool:
    arrays = ("tokens", "offsets", "domain_index", "n_bytes")
    return first.fingerprint == second.fingerprint and all(
        np.array_equal(getattr(getattr(first, split), name), getattr(getattr(second, split), name))
        for split in ("train", "validation", "held_out")
        for name in arrays
    )


def test_the_second_time_comes_from_the_cache(folder: Path, monkeypatch) -> None:
    messages: list[str] = []
    first = prepare(config(folder), messages.append)
    assert any("training a tokenizer" in message for message in messages)
    monkeypatch.setattr(module, "build_corpus", None)  # reading again would fail
    messages.clear()
    second = prepare(config(folder), messages.append)
    assert messages == []
    assert same(first, second)
    assert second.sources == first.sources
    assert second.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert second.train.domains == first.train.domains == second.validation.domains == ("python", "text")
    assert second.held_out.n_tokens == 0


def test_tokens_are_the_text_and_the_tokenizer_saw_training_text_only(folder: Path) -> None:
    (folder / "x.txt").write_text("zebra " * 50)
    for seed in range(40):
        data = prepare(config(folder, split_seed=seed))
        if "x.txt" in data.validation.names:
            break
    else:
        pytest.fail("no seed held x.txt for validation")
    assert (
        "zebra" not in data.tokenizer.to_json()
    )  # as a token it would have been learnt from validation text
    split = data.validation
    place = split.names.index("x.txt")
    ids = split.tokens[split.offsets[place] : split.offsets[place + 1]].tolist()
    assert ids[0] == data.tokenizer.end_id
    assert data.tokenizer.decode(ids[1:]) == "zebra " * 50
    assert split.n_bytes[place] == 300


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 310}, {"split_seed": 1}, {"validation_share": 0.4}, {"max_bytes_per_domain": 5000}],
)
def test_every_setting_that_matters_changes_the_data(folder: Path, changes: dict[str, object]) -> None:
    first = prepare(config(folder))
    assert not same(first, prepare(config(folder, **changes)))
    assert same(first, prepare(config(folder)))


def test_settings_that_do_not_matter_share_the_cache(folder: Path, cache: Path) -> None:
    prepare(config(folder))
    prepare(config(folder, seq_len=64, order="shuffled"))
    assert len(list((cache / "prepared").iterdir())) == 1


def test_changed_text_is_noticed(folder: Path) -> None:
    first = prepare(config(folder))
    (folder / "3.py").write_text("something else entirely, which was not there before\n" * 30)
    assert not same(first, prepare(config(folder)))


@pytest.mark.parametrize("name", ["train.safetensors", "tokenizer.json", "prepared.json"])
@pytest.mark.parametrize("damage", ["cut", "remove", "flip"])
def test_a_damaged_cache_is_made_again(folder: Path, cache: Path, name: str, damage: str) -> None:
    first = prepare(config(folder))
    (kept,) = (cache / "prepared").iterdir()
    data = (kept / name).read_bytes()
    if damage == "remove":
        (kept / name).unlink()
    else:
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        (kept / name).write_bytes(data[:half] if damage == "cut" else flipped)
    messages: list[str] = []
    assert same(first, prepare(config(folder), messages.append))
    if damage != "flip" or name == "train.safetensors":
        assert messages  # it was made again, not believed
        messages.clear()
        assert same(first, prepare(config(folder), messages.append))
        assert messages == []  # and repaired in place


def test_a_cache_that_cannot_be_written_costs_only_the_cache(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "file"))
    messages: list[str] = []
    assert prepare(config(folder), messages.append).train.n_tokens > 0
    assert any("could not be kept" in message for message in messages)


def test_a_tokenizer_of_ones_own_is_used(folder: Path, tmp_path: Path) -> None:
    first = prepare(config(folder))
    path = tmp_path / "tokenizer.json"
    first.tokenizer.save(path)
    assert same(first, prepare(config(folder, tokenizer=str(path))))
    from moekit.data.documents import Document

    train_tokenizer([Document("other words", "d", "n")], 260).save(path)
    other = prepare(config(folder, tokenizer=str(path)))
    assert other.fingerprint != first.fingerprint
    assert other.tokenizer.vocab_size == 260


def test_a_held_out_domain_is_packed_apart(folder: Path) -> None:
    data = prepare(config(folder, held_out_domain="text"))
    assert data.train.domains == ("python",)
    assert data.held_out.domains == ("text",)
    assert data.held_out.n_documents == 15
