"""The named sources as the registries have them: counts, classes, a fingerprint, and no example in two parts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moekit.config.errors import MissingExtraError
from moekit.data.clients import RegistryUnavailable
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, load_source, task_sources

pytestmark = [pytest.mark.network, pytest.mark.slow]

# (source, options, (train, validation, test), given test part, start of the fingerprint)
REAL = [
    ("adult", {}, (32533, 0, 16281), True, "3a1a3959370558ed"),
    ("breast-cancer", {}, (455, 0, 114), False, "b407a2d5c8d34104"),
    ("canvases", {}, (8000, 1000, 1000), False, "929d546d70e7b695"),
    ("desk", {}, (5400, 600, 1485), False, "4b507c5670c57303"),
    ("desk", {"language": "chinese"}, (3797, 422, 1052), False, "5a547d3258dc2832"),
    ("digit-pairs", {}, (8000, 1000, 1000), False, "96ad316d089f9b49"),
    ("digits", {}, (1437, 0, 360), False, "8189cddb115ed3ad"),
    ("fashion-mnist", {}, (60000, 0, 10000), True, "58a217f8ebd3d2f1"),
    ("kinships", {}, (8544, 1068, 1074), True, "beabad78b08ff7fc"),
    ("ml-100k", {}, (80000, 0, 20000), False, "3362e14e8656064f"),
    ("ml-100k", {"leave_one_out": True}, (98114, 943, 943), False, "f23a88ae7457b6fe"),
    ("mnist-10k", {}, (8000, 1000, 1000), False, "375a18da9d78af6f"),
    ("moving-digits", {}, (8000, 1000, 1000), False, "3d803ea775a88f64"),
    ("nations", {}, (1592, 199, 201), True, "75b871a049484439"),
    ("news-tone", {}, (20689, 0, 5991), True, "4e860a6467efe997"),
    # the sound itself: the last digits of log-mel frames depend on the machine
    ("sounds-language", {"waveform": True, "max_seconds": 1}, (1680, 240, 485), False, "248db55cfd5582a9"),
    ("spoken-digits", {}, (2400, 0, 600), False, "4f6c8740cb52ee61"),
    ("umls", {}, (5216, 652, 661), True, "9d6e2a1c0e60ae30"),
    ("wordnet", {}, (36401, 1799, 1800), False, "7579a18061195e18"),
]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages are fetched once for all tests of this module."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load(shared_cache, monkeypatch):
    monkeypatch.setenv("MOEKIT_CACHE", str(shared_cache))

    def load(name: str, options: dict) -> TaskData:
        try:
            return load_source(name, options, Fetcher())
        except (RegistryUnavailable, MissingExtraError) as error:
            pytest.skip(f"cannot be had here: {error}")

    return load


def digests(examples: Examples) -> list[bytes]:
    """A hash of each example."""
    found = []
    for row in zip(*(examples[name] for name in sorted(examples.columns)), strict=True):
        hasher = hashlib.sha256()
        for value in row:
            hasher.update(value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode())
        found.append(hasher.digest())
    return found


@pytest.mark.parametrize(
    ("name", "options", "sizes", "given", "fingerprint"),
    REAL,
    ids=[f"{row[0]}{'-' + next(iter(row[1])) if row[1] else ''}" for row in REAL],
)
def test_a_source_is_what_it_was(load, name, options, sizes, given, fingerprint) -> None:
    data = load(name, options)
    parts = [data.train, data.validation, data.test]
    assert tuple(len(part) for part in parts) == sizes
    assert data.given_test is given
    assert len({tuple(part.columns) for part in parts}) == 1
    declared = set(task_sources()[name].columns)
    if options.get("waveform"):
        declared = declared - {"frames"} | {"waveform"}
    assert set(data.train.columns) == declared
    assert all(info.licence and info.origin and (info.note or info.sha256) for info in data.sources)
    for one, other in itertools.combinations([set(digests(part)) for part in parts], 2):
        assert not one & other
    assert data.fingerprint().startswith(fingerprint)


def test_classes_of_the_real_data(load) -> None:
    clothes = load("fashion-mnist", {})
    assert set(Counter(clothes.train["label"]).values()) == {6000}
    assert set(Counter(clothes.test["label"]).values()) == {1000}
    assert clothes.train["label"][:3] == ["ankle boot", "t-shirt/top", "t-shirt/top"]
    income = load("adult", {})
    assert Counter(income.test["income"]) == {"<=50K": 12435, ">50K": 3846}
    written = load("mnist-10k", {})
    everything = Counter([*written.train["label"], *written.validation["label"], *written.test["label"]])
    assert [everything[str(digit)] for digit in range(10)] == [
        1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978,
    ]  # fmt: skip
    spoken = load("spoken-digits", {})
    assert set(Counter(spoken.test["label"]).values()) == {60}
    assert {len(frames) for frames in spoken.train["frames"]} <= set(range(6, 93))


def test_the_five_folds_of_the_ratings_are_parts_of_one(load) -> None:
    pairs = [
        set(zip(data.test["user"], data.test["item"], strict=True))
        for data in (load("ml-100k", {"fold": fold}) for fold in range(5))
    ]
    assert [len(part) for part in pairs] == [20000] * 5
    assert len(set.union(*pairs)) == 100_000


def test_log_mel_frames_of_the_real_prompts(load) -> None:
    data = load("sounds-language", {"max_seconds": 0.5})
    place = list(zip(data.train["prompt"], data.train["label"], strict=True)).index(("digits/7", "ru"))
    frames = data.train["frames"][place]
    assert frames.shape[1] == 40
    # a Russian seven begins with a hiss: the upper half of the bands is the louder one, and the vowel turns it round
    halves = frames[:, :20].mean(1) - frames[:, 20:].mean(1)
    assert halves[:10].mean() < halves[20:30].mean()


def test_all_of_wordnet(load) -> None:
    data = load("wordnet", {"max_triples": None})
    assert (len(data.train), len(data.validation), len(data.test)) == (166_585, 6_532, 6_480)
    triples = {
        triple
        for part in (data.train, data.validation, data.test)
        for triple in zip(part["head"], part["relation"], part["tail"], strict=True)
    }
    assert len(triples) == 179_597
    assert ("dog.n.1", "hypernym", "canine.n.2") in triples
    assert ("canine.n.2", "hyponym", "dog.n.1") not in triples
