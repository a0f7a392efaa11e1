"""The tokenizer gives every text back, trains the same each time, and text cannot forge an end marker."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import numbered
from hypothesis import given
from hypothesis import strategies as st

from moekit.config.errors import ConfigError, DataError
from moekit.data import tokenizer as module
from moekit.data.documents import Document
from moekit.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "plain words",
    "  leading and trailing  ",
    "中文，全角１２３。",
    "emoji 👩‍👩‍👧 🙂🏽 flags 🇩🇪",
    "e\u0301 and é differ, ﬁ is a ligature",
    "\x00\x01\x02\x7f\x80 \ufeff\u2028 \r\n\t\v",
    "if x:\n\t\treturn   {'a': 1}\n\n\n",
    f"{END_OF_TEXT} a text that spells the marker {END_OF_TEXT}",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    documents = [*numbered("english", 20), Document("汉字和词语。" * 30, "chinese", "zh")]
    return train_tokenizer(documents, 400)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text])[0] == tokenizer.encode(text)


@given(st.text(max_size=60))
def test_any_text_comes_back_and_its_bytes_are_counted(text: str) -> None:
    tokenizer = _small()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_id not in ids
    assert int(tokenizer.byte_lengths()[ids].sum()) == len(text.encode())


_CACHED: list[Tokenizer] = []


def _small() -> Tokenizer:
    if not _CACHED:
        _CACHED.append(train_tokenizer(numbered("x", 5), 300))
    return _CACHED[0]


def test_text_never_becomes_the_end_marker(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
        assert each.end_id not in each.encode(END_OF_TEXT)
        assert each.decode([each.end_id]) == END_OF_TEXT


def test_training_is_deterministic_and_saving_keeps_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [*numbered("english", 20), Document("汉字和词语。" * 30, "chinese", "zh")]
    again = train_tokenizer(documents, 400)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.to_json() == tokenizer.to_json()
    again.save(tmp_path / "t" / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "t" / "tokenizer.json")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode("english words 汉字") == tokenizer.encode("english words 汉字")
    assert train_tokenizer(documents, 300).fingerprint() != tokenizer.fingerprint()


def test_domains_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING_BYTES_PER_DOMAIN", 3000)
    large = [
        Document("".join(chr(97 + (i + j) % 26) for j in range(5000)), "large", str(i)) for i in range(40)
    ]
    small = [Document("z" * 1000, "small", "s")]
    sample = list(module._training_sample(large + small, piece=100))
    sizes = {
        name: sum(len(text) for text in sample if ("zzz" in text) == (name == "small"))
        for name in ("large", "small")
    }
    assert sizes["small"] == 1000
    assert 2900 <= sizes["large"] <= 3100
    # pieces come from all over the domain, not from its beginning
    assert (
        len(
            {
                document.text.index(text[:26])
                for text in sample[:30]
                for document in large
                if text in document.text
            }
        )
        > 1
    )
    assert len(sample) > 20


def test_a_small_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.vocab_size must be at least 257"):
        train_tokenizer(numbered("a", 2), 256)
    with pytest.raises(DataError, match="needs text"):
        train_tokenizer([], 300)


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "broken.json")


def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, normalizers, pre_tokenizers

    inner = Inner(models.BPE())
    inner.save(str(tmp_path / "no-end.json"))
    with pytest.raises(ConfigError, match="must have the token"):
        load_tokenizer(tmp_path / "no-end.json")
    lossy = Inner.from_str(_small().to_json())
    lossy.normalizer = normalizers.Lowercase()
    lossy.save(str(tmp_path / "lossy.json"))
    with pytest.raises(ConfigError, match="must give every text back unchanged"):
        load_tokenizer(tmp_path / "lossy.json")
    words = Inner.from_str(_small().to_json())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ConfigError, match="must give every text back unchanged"):
        load_tokenizer(tmp_path / "words.json")
