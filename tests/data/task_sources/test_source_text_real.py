"""The real text sources: counts, labels and the hash of everything, as they were when the modules were written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moekit.data.clients import RegistryUnavailable
from moekit.data.examples import TaskData
from moekit.data.task_sources.base import Fetcher, load_source, task_sources

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

# by source and options: sizes of training, validation and test, the beginning of the fingerprint, and what one label
# (or tag) comes to in training and test
REAL: dict[str, tuple[str, Mapping[str, Any], tuple[int, int, int], str, Mapping[str, int]]] = {
    "20newsgroups": (
        "20newsgroups",
        {},
        (11293, 0, 7528),
        "9fee7000b2d47590",
        {"rec.sport.hockey": 999, "comp.sys.ibm.pc.hardware": 982, "talk.religion.misc": 628},
    ),
    "r8": ("r8", {}, (5485, 0, 2189), "e8576a1da2dd67a9", {"earn": 3923, "money-fx": 293, "grain": 51}),
    "r52": ("r52", {}, (6532, 0, 2568), "fb217a81640ecbaf", {"earn": 3923, "cotton": 24, "platinum": 3}),
    "reviews": ("reviews", {}, (15204, 0, 3823), "998b5b3e65b28aed", {"positive": 10058, "negative": 8969}),
    "reviews:binary=False": (
        "reviews",
        {"binary": False},
        (18839, 0, 4716),
        "76d65c71148d5af2",
        {"movies": 10603, "tweets": 4140, "products": 3696},
    ),
    "chinese-sentiment": (
        "chinese-sentiment",
        {},
        (13856, 0, 3464),
        "0b5b16a23c42803c",
        {"negative": 9019, "positive": 8301},
    ),
    "spam-emails": ("spam-emails", {}, (4458, 0, 1115), "12689956fe843bea", {"ham": 4069, "spam": 1504}),
    "spam-emails:subject=True": (
        "spam-emails",
        {"subject": True},
        (4668, 0, 1167),
        "2c4073bc7d9683b4",
        {"ham": 4090, "spam": 1745},
    ),
    "spam-sms": ("spam-sms", {}, (3626, 0, 907), "7c247307eaf1b5ff", {"ham": 3972, "spam": 561}),
    "chinese-tags": (
        "chinese-tags",
        {},
        (35567, 0, 8765),
        "3dddbf6352b075da",
        {"O": 1702479, "B-LOC": 27872, "B-ORG": 3521},
    ),
    "chinese-tags:entities=False": (
        "chinese-tags",
        {"entities": False},
        (35567, 0, 8767),
        "7a2da1e082b8f460",
        {"n": 236510, "Ng": 4561, "Yg": 1},
    ),
    "brown": ("brown", {}, (45836, 0, 11354), "dc8a90ef1a36def9", {"NOUN": 273572, "PRON": 56415, "X": 788}),
    "brown:tagset=brown": (
        "brown",
        {"tagset": "brown"},
        (45836, 0, 11354),
        "6b57f467cee43b21",
        {"nn": 168025, "rbt": 101, "pn+hvd": 1},
    ),
    "conll2003": (
        "conll2003",
        {},
        (14041, 3250, 3453),
        "c55d5a0da671be40",
        {"O": 207901, "I-PER": 5684, "I-MISC": 1371},
    ),
    "icd10": (
        "icd10",
        {},
        (36913, 0, 9231),
        "da473116d5b6aa5b",
        {
            "Injury, poisoning and certain other consequences of external causes": 13068,
            "Mental, Behavioral and Neurodevelopmental disorders": 1089,
            "Codes for special purposes": 5,
        },
    ),
    "icd10:terms=True": (
        "icd10",
        {"terms": True},
        (46917, 0, 11748),
        "ba56e08c3af1cc8a",
        {
            "Injury, poisoning and certain other consequences of external causes": 14627,
            "Congenital malformations, deformations and chromosomal abnormalities": 1803,
            "Codes for special purposes": 11,
        },
    ),
    "intents": (
        "intents",
        {},
        (6759, 0, 1695),
        "3b6f2236676c53d7",
        {"HassGetState": 1220, "HassMediaPause": 50, "HassNevermind": 2},
    ),
    "intents:language=zh-CN": (
        "intents",
        {"language": "zh-CN"},
        (5058, 0, 1273),
        "b6a62f94a1b2f3b1",
        {"HassGetState": 1124, "HassFanSetSpeed": 60, "HassNevermind": 9},
    ),
}
TEXT = (
    "20newsgroups", "brown", "chinese-sentiment", "chinese-tags", "conll2003", "icd10", "intents", "r52", "r8",
    "reviews", "spam-emails", "spam-sms",
)  # fmt: skip


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the module: several sources are of one package."""
    return tmp_path_factory.mktemp("packages")


def load(name: str, options: Mapping[str, Any]) -> TaskData:
    try:
        return load_source(name, options, Fetcher())
    except RegistryUnavailable as error:
        pytest.skip(f"the registry cannot be reached: {error}")


@pytest.mark.parametrize("case", REAL)
def test_a_source_is_what_it_was(case: str, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKIT_CACHE", str(shared_cache))
    name, options, sizes, fingerprint, counts = REAL[case]
    data = load(name, options)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    if "tags" in data.train.columns:
        found = Counter(tag for part in (data.train, data.test) for tags in part["tags"] for tag in tags)
    elif "label" in data.train.columns:
        found = Counter(label for part in (data.train, data.test) for label in part["label"])
    else:
        found = Counter(domain for part in (data.train, data.test) for domain in part["domain"])
    assert {label: found[label] for label in counts} == counts
    assert data.fingerprint()[:16] == fingerprint
    assert set(data.train.columns) <= set(task_sources()[name].columns)
    if not data.given_test and "text" in data.train.columns:
        assert not set(data.train["text"]) & set(data.test["text"])


def test_every_text_source_is_read_here() -> None:
    assert {name for name, *_ in REAL.values()} == set(TEXT)
