"""The service desk and the news with tone: what is composed of which collection, and what may not leak."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moekit.config.errors import ConfigError, DataError
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources import desk, news_tone
from moekit.data.task_sources.base import Fetcher, load_source, task_sources

INFO = SourceInfo("a package", "somewhere", "free", None, "")


def data(train: dict, test: dict, validation: dict | None = None) -> TaskData:
    whole = Examples(train)
    held = whole.rows([]) if validation is None else Examples(validation)
    return TaskData(whole, held, Examples(test), [INFO], given_test=True)


def labelled(texts: list[str], labels: list[str]) -> dict:
    return {"text": texts, "label": labels}


def numbered(word: str, n: int, labels: list[str]) -> dict:
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [f"{word} {letters[i % 26]} {letters[i // 26]}" for i in range(n)]
    return labelled(texts, [labels[i % len(labels)] for i in range(n)])


@pytest.fixture
def _collections(monkeypatch) -> None:
    groups = ["comp.graphics", "sci.electronics", "rec.autos"]
    chat = {"question": ["Hello there!", "My PC is broken", "How are you?"], "answer": ["Hi!", "Restart it", "Fine."],
            "topic": ["greetings", "tech_support", "emotion"]}  # fmt: skip
    made = {
        "newsgroups": data(numbered("Disk", 60, groups), numbered("Modem", 12, groups)),
        "icd10": data(
            numbered("Fever", 40, ["Eye", "Ear"]), labelled(["Fever A b", "Cholera, acute"], ["Eye", "Eye"])
        ),
        "r8": data(numbered("profit", 40, ["earn", "acq"]), numbered("loss", 8, ["earn", "acq"])),
        "intents": data(numbered("lamp", 40, ["On", "Off"]), numbered("fan", 8, ["On"])),
        "chatterbot": data(
            chat, {**chat, "question": ["Good day", "b", "c"]}, {**chat, "question": ["Tell me", "d", "e"]}
        ),
    }  # fmt: skip
    for name, found in made.items():
        monkeypatch.setattr(desk, name, lambda fetch, *more, found=found: found)


@pytest.mark.usefixtures("_collections")
def test_each_domain_comes_from_its_collection_evenly_by_intent() -> None:
    found = load_source("desk", {"per_domain": 20, "test_per_domain": 10}, Fetcher())
    whole = Counter([*found.train["label"], *found.validation["label"]])
    # four of the six chat texts are small talk
    assert whole == {"technical": 20, "medical": 20, "finance": 20, "home": 20, "chat": 4}
    intents = Counter([*found.train["intent"], *found.validation["intent"]])
    assert intents["technical: comp.graphics"] == intents["technical: sci.electronics"] == 10
    assert "technical: rec.autos" not in intents
    assert {intent.split(":")[0] for intent in intents} == set(whole)
    assert set(found.train["text"]) & {"hi", "hello there"}
    assert not set(found.train["text"]) & {"my pc is broken", "restart it"}
    assert all(text == text.lower() and "," not in text for text in found.train["text"])
    assert "composed from 5 collections" in found.sources[-1].note


@pytest.mark.usefixtures("_collections")
def test_nothing_of_the_test_stands_in_training() -> None:
    found = load_source("desk", {"per_domain": 60, "test_per_domain": 60}, Fetcher())
    seen = {*found.train["text"], *found.validation["text"]}
    assert not set(found.train["text"]) & set(found.test["text"])
    assert "cholera acute" in found.test["text"]
    # of the chat, both parts that were held are tested on
    assert {"good day", "tell me"} <= {text for text in found.test["text"] if text not in seen}
    again = load_source("desk", {"per_domain": 60, "test_per_domain": 60}, Fetcher())
    assert again.fingerprint() == found.fingerprint()


@pytest.mark.usefixtures("_collections")
def test_a_text_of_two_domains_counts_for_the_first(monkeypatch) -> None:
    same = numbered("Disk", 60, ["Eye"])
    monkeypatch.setattr(desk, "icd10", lambda fetch: data(same, numbered("x", 3, ["Eye"])))
    found = load_source("desk", {"per_domain": 60}, Fetcher())
    texts = [*found.train["text"], *found.validation["text"]]
    assert len(texts) == len(set(texts))
    counts = Counter([*found.train["label"], *found.validation["label"]])
    # 40 of the 60 are of a technical group, the others are left for the second domain
    assert (counts["technical"], counts["medical"]) == (40, 20)
    empty = data(labelled(["42", "!"], ["Eye", "Eye"]), numbered("x", 3, ["Eye"]))
    monkeypatch.setattr(desk, "icd10", lambda fetch: empty)
    with pytest.raises(DataError, match="no text of its domain"):
        load_source("desk", {}, Fetcher())


def test_long_texts_are_cut_at_a_random_place_and_short_ones_stay() -> None:
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "abcde" for b in "abcdefgh"]
    found = [desk.shortened(" ".join(words), rng).split() for _ in range(200)]
    assert {len(part) for part in found} == set(range(3, 13))
    assert all(part == words[words.index(part[0]) :][: len(part)] for part in found)
    assert len({part[0] for part in found}) > 20
    assert desk.shortened("It's 3 PM!", rng) == "it s pm"
    assert desk.shortened("42", rng) == ""
    cut = desk.shortened_chinese("你好" * 40 + "。", rng)
    assert 6 <= len(cut) <= 24


def test_options_of_the_desk_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"language must be english or chinese"):
        load_source("desk", {"language": "french"}, Fetcher())
    with pytest.raises(ConfigError, match=r"per_domain must be 10 to 100000"):
        load_source("desk", {"per_domain": 1}, Fetcher())


@pytest.fixture
def _news(monkeypatch) -> None:
    news = {"text": ["profit is up", "firm bought"], "label": ["earn", "acq"], "order": [0, 1]}
    later = {"text": ["loss"], "label": ["earn"], "order": [2]}
    tones = {"text": ["It's GREAT!", "Awful, 1/10"], "label": ["positive", "negative"], "score": [3.0, -2.0],
             "domain": ["movies", "tweets"], "document": ["1", "2"]}  # fmt: skip
    for name, found in (
        ("r8", data(news, later)),
        ("r52", data(news, later)),
        ("reviews", data(tones, {**tones, "text": ["it s, great", "Terrible."]})),
    ):
        monkeypatch.setattr(news_tone, name, lambda fetch, found=found: found)


@pytest.mark.usefixtures("_news")
def test_each_text_knows_one_of_two_answers() -> None:
    found = load_source("news-tone", {}, Fetcher())
    assert found.train.columns == {
        "text": ["profit is up", "firm bought", "it s great", "awful"],
        "topic": ["earn", "acq", None, None],
        "tone": [None, None, "positive", "negative"],
        "order": [0, 1, -1, -1],
        "collection": ["news", "news", "movies", "tweets"],
    }
    # "It's GREAT!" and "it s, great" are one text here, and it stands in training
    assert found.test["text"] == ["loss", "terrible"]
    assert found.test["topic"] == ["earn", None]
    assert "1 snippets of the test that stand in training too were left out" in found.sources[-1].note
    assert found.given_test
    fewer = load_source("news-tone", {"news": "r52", "domains": ["tweets"]}, Fetcher())
    assert fewer.train["collection"] == ["news", "news", "tweets"]
    with pytest.raises(ConfigError, match=r"domains must name some of tweets"):
        load_source("news-tone", {"domains": ["books"]}, Fetcher())
    with pytest.raises(ConfigError, match=r"news must be r8 or r52"):
        load_source("news-tone", {"news": "r9"}, Fetcher())


def test_both_are_for_research_only() -> None:
    assert all(task_sources()[name].research_only for name in ("desk", "news-tone"))
