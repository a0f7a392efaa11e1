"""The recipe `dialogue`: what a model generates says little where any of a hundred replies would do, so candidates are
ranked as well: the right reply among ten, nine of them replies to something else.

Both sides choose how they rank on the validation examples: the model whether it divides a candidate's log-probability
by its length and how much it takes off what the candidate is worth to any question (Li et al. 2016, arXiv 1510.03055);
BM25 whether it looks for the words of the question in the candidate, or for training questions like this one whose
replies are like the candidate.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, DataError
from moekit.config.task import SequenceTarget, TextInput
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.baselines.base import fit_baseline
from moekit.evaluate.baselines.retrieval import Retrieval
from moekit.evaluate.likelihood import candidate_likelihoods
from moekit.evaluate.task import predict
from moekit.evaluate.task_metrics import score
from moekit.recipes.tasks import Recipe
from moekit.train.run import LoadedTask

BASELINE = "bm25 retrieval"
CANDIDATES = 10
MOST = 500  # questions whose candidates are ranked
RECALL, RANK = f"right reply first of {CANDIDATES}", f"mean 1 / rank of {CANDIDATES}"


def measure(loaded: LoadedTask, data: TaskData) -> dict[str, float]:
    """How often the right reply is ranked first, and its mean reciprocal rank."""
    name, target = _target(loaded.config)
    question = _question(loaded.config)

    def tables(part: Examples) -> dict[str, np.ndarray]:
        chosen = part.rows(questions(part))
        texts = candidates(list(chosen[target.column]))
        total, tokens = candidate_likelihoods(loaded.model, loaded.encoding, chosen, name, texts)
        nothing = Examples({**chosen.columns, question: [""] * len(chosen)})
        anyway, _ = candidate_likelihoods(loaded.model, loaded.encoding, nothing, name, texts)
        return {
            f"{how}, less {share} of the prior": (total - share * anyway) / (tokens if how == "mean" else 1)
            for how in ("mean", "sum")
            for share in (0.0, 0.5, 1.0)
        }

    return ranked(tables(data.test), best_of(tables(data.validation)))


def baseline(name: str, recipe: Recipe, config: TaskRunConfig, data: TaskData) -> dict[str, Any]:
    """The reply of the nearest training question, and candidates ranked by BM25."""
    if name != BASELINE:
        raise ConfigError(f"recipe {recipe.name} names a baseline {name!r} that nobody registers")
    began = time.perf_counter()
    key, target = _target(config)
    fitted = fit_baseline("bm25", data.train, data.validation, config.inputs, {key: target})
    said = fitted.predict(data.test)[key].values
    scores = {each.key: score(each.metric, said, data.test[target.column], **each.options)
              for each in recipe.measures}  # fmt: skip
    asked = _question(config)
    by_question, by_reply = Retrieval(list(data.train[asked])), Retrieval(list(data.train[target.column]))

    def tables(part: Examples) -> dict[str, np.ndarray]:
        chosen = part.rows(questions(part))
        texts = candidates(list(chosen[target.column]))
        words = np.zeros((len(texts), CANDIDATES))
        through = np.zeros_like(words)
        for row, (question, replies) in enumerate(zip(chosen[asked], texts, strict=True)):
            words[row] = shared_words(question, replies)
            near = by_question.similarities(question)
            for place, reply in enumerate(replies):
                through[row, place] = float((near * by_reply.similarities(reply)).max())
        return {"words of the question": words, "training questions like it": through}

    how = best_of(tables(data.validation))
    scores |= ranked(tables(data.test), how)
    settings = {**fitted.settings, "ranking": how}
    return {"scores": scores, "seconds": time.perf_counter() - began, "settings": settings}


def notes(loaded: LoadedTask, data: TaskData) -> str:
    """A few replies, so that nobody takes the figures for a conversation."""
    name, _ = _target(loaded.config)
    question = _question(loaded.config)
    few = data.test.rows(questions(data.test, 3))
    said = predict(loaded.model, loaded.encoding, few).raw[name]
    pairs = [f"“{one}” → “{other}”" for one, other in zip(few[question], said, strict=True)]
    return f"Replies to the test, as they come: {'; '.join(pairs)}."


def questions(part: Examples, most: int = MOST) -> np.ndarray:
    """Places of at most so many examples, evenly over the part."""
    return np.unique(np.linspace(0, len(part) - 1, min(most, len(part))).round().astype(np.int64))


def candidates(replies: Sequence[str]) -> list[list[str]]:
    """For each reply, itself and other ones of the same list, drawn by a fixed seed; the right one first.

    Errors: `ConfigError` where there are not enough different replies.

    >>> found = candidates([str(number) for number in range(20)])
    >>> [len(set(texts)) for texts in found[:2]], [texts[0] for texts in found[:2]]
    ([10, 10], ['0', '1'])
    """
    distinct = list(dict.fromkeys(replies))
    if len(distinct) < CANDIDATES:
        raise ConfigError(
            f"{CANDIDATES} different replies are needed to rank them; got {len(distinct)}. Test on more examples"
        )
    found = []
    for row, right in enumerate(replies):
        order = np.random.Generator(np.random.PCG64([7, row])).permutation(len(distinct))
        others = [distinct[place] for place in order if distinct[place] != right]
        found.append([right, *others[: CANDIDATES - 1]])
    return found


def shared_words(question: str, replies: Sequence[str]) -> np.ndarray:
    """BM25 of the question with each of the replies; zeros where none of them has a word."""
    try:
        return Retrieval(replies).similarities(question)
    except DataError:
        return np.zeros(len(replies))


def best_of(tables: Mapping[str, np.ndarray]) -> str:
    """The way of ranking with the highest mean reciprocal rank; the first of equals."""
    return max(tables, key=lambda how: ranked(tables, how)[RANK])


def ranked(tables: Mapping[str, np.ndarray], how: str) -> dict[str, float]:
    """Both figures of one way of ranking; the right candidate is the first column, equals share their ranks."""
    right = np.zeros(len(tables[how]), dtype=np.int64)
    return {
        RECALL: score("hits_at_k", tables[how], right, k=1),
        RANK: score("mrr_filtered", tables[how], right),
    }


def _target(config: TaskRunConfig) -> tuple[str, SequenceTarget]:
    for name, target in config.targets.items():
        if isinstance(target, SequenceTarget):
            return name, target
    raise ConfigError("the recipe dialogue needs a target of kind sequence")


def _question(config: TaskRunConfig) -> str:
    return next(part.column for part in config.inputs.values() if isinstance(part, TextInput))
