"""Questions and answers: small talk by topic in 28 languages, and conversations between people.

What the packages hold was read from them:

* chatterbot-corpus 1.3.3: files of conversations by topic, written for a chat program, in 28 languages of very
  different sizes (9 to about 2,500 pairs; half of the English ones are doubles). A turn answers the one before it.
  Entries that are no list of texts, a few Ukrainian ones, are left out.
* chitchat-dataset 0.9.0: 7,168 conversations of volunteers in 2018; a turn is one or several messages of one person.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from moekit.config.errors import DataError, nearest, require
from moekit.data.clients import Package
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.registry import PackageFolder
from moekit.data.task_sources.base import Fetcher, register_source

_SEED = 0  # of the splits made here, so that the test is the same in every run

CHATTERBOT = Package(
    client="pip-wheel",
    name="chatterbot-corpus",
    version="1.3.3",
    digest="sha256:86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    members=("chatterbot_corpus/data/*/*.yml", "*/METADATA"),
)
CHITCHAT = Package(
    client="pip-wheel",
    name="chitchat-dataset",
    version="0.9.0",
    digest="sha256:7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    members=("chitchat_dataset/dataset.json", "*/LICENSE"),
)


@register_source(
    "chatterbot",
    "up to 2,500 questions with answers by topic in each of 28 languages (English 1,177, Chinese 550)",
    columns={
        "question": "what is said",
        "answer": "what answers it",
        "topic": "the file that it stands in, such as sports",
        "language": "such as english, chinese, traditionalchinese",
    },
    licence="BSD (as the package's classifier says; it holds no licence text)",
)
def chatterbot(fetch: Fetcher, language: str = "english") -> TaskData:
    """A tenth is tested on, another is for validation; questions that are the same stand in one part.

    Args:
        language: as the package names it, or "all". Languages with few pairs may be too small for three parts.

    Errors: `ConfigError` for a language that it has not; `DataError` where the package cannot be had, or a language
        is too small.
    """
    package = fetch(CHATTERBOT)
    files = [name for name in package.files if name.endswith(".yml")]
    known = sorted({PurePosixPath(name).parent.name for name in files})
    require(language == "all" or language in known, "data.options.language", language,
            "must be a language of the corpus, or all", nearest(str(language), [*known, "all"]))  # fmt: skip
    rows: list[tuple[str, str, str, str]] = []
    groups: list[list[Any]] = []  # what each row shares with others: its conversation and its question
    for name in files:
        path = PurePosixPath(name)
        if language not in ("all", path.parent.name):
            continue
        for number, turns in enumerate(conversations(package, name)):
            for question, answer in pairwise(turns):
                rows.append((question, answer, path.stem, path.parent.name))
                groups.append([(name, number), " ".join(question.casefold().split())])
    first = {row: place for place, row in reversed(list(enumerate(rows)))}
    kept = sorted(first.values())
    belongs = joined([groups[place] for place in kept])
    columns = {
        column: [rows[place][i] for place in kept]
        for i, column in enumerate(("question", "answer", "topic", "language"))
    }
    note = (
        f"{len(kept)} pairs, {len(rows) - len(kept)} doubles left out; split so that no conversation and no "
    )
    info = _info(CHATTERBOT, "PyPI; written by the contributors of ChatterBot",
                 "BSD (the package's classifier; no licence text)", f"{note}question stands in two parts")  # fmt: skip
    return _split(columns, belongs, [0.1, 0.1], info)


def conversations(package: PackageFolder, name: str) -> list[list[str]]:
    """The conversations of a file, each at least two texts."""
    import yaml

    text = package.read_text(name)
    try:
        data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise DataError(f"{package.package.name}: {name} is not YAML: {error}") from None
    found = data.get("conversations") if isinstance(data, dict) else None
    result = []
    for turns in found or []:
        if isinstance(turns, list) and all(isinstance(turn, str) and turn.strip() for turn in turns):
            texts = [" ".join(turn.split()) for turn in turns]
            if len(texts) > 1:
                result.append(texts)
    return result


@register_source(
    "chitchat",
    "131,557 turns of 7,168 conversations in English, each with the turn that answers it",
    columns={
        "question": "a turn: the messages of one person until the other answers",
        "answer": "the next turn",
        "conversation": "its name",
    },
    licence="MIT",
)
def chitchat(fetch: Fetcher) -> TaskData:
    """A twentieth of the conversations is tested on, another is for validation.

    Errors: `DataError` where the package cannot be had.
    """
    package = fetch(CHITCHAT)
    name = next(name for name in package.files if name.endswith("dataset.json"))
    columns: dict[str, list[Any]] = {"question": [], "answer": [], "conversation": []}
    for key, conversation in json.loads(package.read_text(name)).items():
        turns = turns_of(conversation["messages"])
        for question, answer in pairwise(turns):
            columns["question"].append(question)
            columns["answer"].append(answer)
            columns["conversation"].append(key)
    info = _info(CHITCHAT, "PyPI; Chit-Chat Challenge of Brigham Young University, 2018", "MIT",
                 f"{len(columns['question'])} pairs; split by conversation")  # fmt: skip
    return _split(columns, columns["conversation"], [0.05, 0.05], info)


def turns_of(messages: Iterable[Sequence[dict[str, Any]]]) -> list[str]:
    """The turns as texts: the messages of each joined by a space; empty turns leave.

    >>> turns_of([[{"text": "Hello"}, {"text": " how are you? "}], [{"text": " "}], [{"text": "fine"}]])
    ['Hello how are you?', 'fine']
    """
    turns = (" ".join(" ".join(message["text"] for message in turn).split()) for turn in messages)
    return [turn for turn in turns if turn]


def joined(groups: Sequence[Sequence[Any]]) -> list[int]:
    """A number for each row, the same for rows that share something, directly or through others.

    >>> joined([["a", 1], ["b", 2], ["c", 1], ["b", 3], ["a", 9]])
    [0, 1, 0, 1, 0]
    """
    parents = list(range(len(groups)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    owner: dict[Any, int] = {}
    for row, shared in enumerate(groups):
        for thing in shared:
            mine, other = root(row), root(owner.setdefault(thing, row))
            parents[max(mine, other)] = min(mine, other)
    return [root(row) for row in range(len(groups))]


def _split(
    columns: dict[str, list[Any]], belongs: Sequence[Any], shares: list[float], info: SourceInfo
) -> TaskData:
    whole = Examples({**columns, "belongs": list(belongs)})
    parts = [
        Examples({name: part[name] for name in columns})
        for part in split_examples(whole, shares, _SEED, together="belongs")
    ]
    return TaskData(parts[0], parts[1], parts[2], [info])


def _info(package: Package, origin: str, licence: str, note: str) -> SourceInfo:
    return SourceInfo(
        f"{package.name} {package.version}", origin, licence, package.digest.removeprefix("sha256:"), note
    )
