"""Baselines that order entities: links between them, and what comes next in a history."""

from __future__ import annotations

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.config.task import EntityTarget, FieldsInput, IdsInput, NumberTarget, SequenceInput
from moekit.config.task_reshape import ReciprocalReshape
from moekit.data.encoding.whole import Encoding
from moekit.data.examples import Examples
from moekit.data.reshape import both_directions
from moekit.evaluate.baselines.base import fit_baseline
from moekit.evaluate.task_metrics import score

LINKS = {"ids": IdsInput(columns=("head", "relation"))}
TAIL = {"tail": EntityTarget(column="tail", input="ids", like="head")}
HISTORY, NEXT = {"history": SequenceInput()}, {"item": EntityTarget(input="history")}
NONE = Examples({"head": [], "relation": [], "tail": []})


def families(n: int = 8) -> Examples:
    """Couples and their children: who is married to whom is the same as who shares a child."""
    rows = []
    for i in range(n):
        rows += [(f"m{i}", "married", f"w{i}"), (f"m{i}", "parent", f"c{i}"), (f"w{i}", "parent", f"c{i}")]
    return Examples({name: [row[k] for row in rows] for k, name in enumerate(("head", "relation", "tail"))})


def test_complex_learns_relations_that_follow_from_others():
    every = families()
    train = every.rows([row for row in range(len(every)) if row != 1])  # m0 is w0's husband, so c0 is his
    train, asked = (both_directions(part, ReciprocalReshape()) for part in (train, every.rows([1])))
    options = {"factors": 16, "penalty": 0.02, "batch": 16, "epochs": 40}
    fitted = fit_baseline("complex", train, NONE, LINKS, TAIL, options=options)
    again = fit_baseline("complex", train, NONE, LINKS, TAIL, options=options)
    said = fitted.predict(asked)["tail"]
    assert np.array_equal(said.class_scores, again.predict(asked)["tail"].class_scores)
    assert list(said.values) == [said.labels[place] for place in said.class_scores.argmax(1)]
    encoder = Encoding.fit(LINKS, TAIL, train).targets["tail"]
    order = encoder.ordered(said.labels, said.class_scores, asked)
    # of 24 entities; chance gives 0.16
    assert score("mrr_filtered", order, encoder.truth(asked)) > 0.4
    assert score("mrr_filtered", *known(fitted, encoder, train)) > 0.9
    # nobody knows the entity: all are alike
    strange = fitted.predict(Examples({"head": ["x"], "relation": ["parent"], "tail": ["c0"]}))["tail"]
    assert np.ptp(strange.class_scores) == 0
    with pytest.raises(ConfigError, match="needs an input of two columns"):
        fit_baseline("complex", train, NONE, {"ids": IdsInput(columns=("head",))}, TAIL)


def known(fitted, encoder, examples: Examples):
    said = fitted.predict(examples)["tail"]
    return encoder.ordered(said.labels, said.class_scores, examples), encoder.truth(examples)


def test_complex_keeps_the_epoch_that_ranks_validation_best():
    train = both_directions(families(), ReciprocalReshape())
    fitted = fit_baseline(
        "complex", train, train, LINKS, TAIL, options={"factors": 8, "epochs": 30, "patience": 3}
    )
    settings = fitted.settings["tail"]
    assert 1 <= settings["epochs"] <= 30
    assert settings["validation"] > 0.9


def shelves(seed: int, n: int = 120) -> Examples:
    """Readers of two shelves; the first book of each shelf is what most have read."""
    rng = np.random.default_rng(seed)
    histories, items = [], []
    for row in range(n):
        shelf = "ab"[row % 2]
        books = [f"{shelf}{k}" for k in rng.choice(8, 5, replace=False, p=[0.3, *[0.1] * 7])]
        histories.append(books[:-1])
        items.append(books[-1])
    return Examples({"history": histories, "item": items})


@pytest.mark.parametrize(("name", "worst"), [("popularity", 0.1), ("item-knn", 0.3), ("als", 0.3)])
def test_readers_of_a_shelf_get_its_books(name, worst):
    pytest.importorskip("scipy")
    if name != "popularity":
        pytest.importorskip("implicit")
    options = {"item-knn": {"neighbours": (6,)}, "als": {"factors": (4,), "penalties": (0.1,)}}.get(name, {})
    train, test = shelves(0), shelves(1)
    fitted = fit_baseline(name, train, shelves(2), HISTORY, NEXT, options=options)
    said = fitted.predict(test)["item"]
    encoder = Encoding.fit(HISTORY, NEXT, train).targets["item"]
    order = encoder.ordered(said.labels, said.class_scores, test)
    for row, before in enumerate(test["history"]):
        assert np.isneginf(order[row, [encoder.names.index(book) + 1 for book in before]]).all()
    # of 12 books that are left 4 are on the reader's shelf
    of_shelf = np.mean([
        encoder.names[int(np.argmax(order[row])) - 1][0] == test["item"][row][0] for row in range(len(test))
    ])  # fmt: skip
    # what is left of the most popular books stands on the other shelf
    assert (of_shelf < 0.5) if name == "popularity" else (of_shelf > 0.9)
    assert worst < score("hits_at_k", order, encoder.truth(test), k=4) <= 1
    assert score("ndcg_at_k", order, encoder.truth(test), k=10) > worst
    empty = fitted.predict(Examples({"history": [[], ["unheard of"]], "item": ["a0", "b0"]}))["item"]
    assert np.isfinite(empty.class_scores).all()


def test_one_right_candidate_may_be_given_as_its_number():
    table = [[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]
    # by hand: first, and third, which gains 1 / log2(4)
    assert score("ndcg_at_k", table, [1, 2], k=3) == pytest.approx((1 + 0.5) / 2)
    assert score("ndcg_at_k", table, [[1], [2]], k=3) == score("ndcg_at_k", table, np.array([1, 2]), k=3)
    assert score("recall_at_k", table, [1, 2], k=2) == 0.5


@pytest.mark.parametrize("name", ["linear", "boosting"])
def test_lists_of_categories_are_read(name):
    pytest.importorskip("sklearn")
    lists = [["war"], ["love", "war"], ["love"], [], "war love", ["rare"]] * 20
    stars = [5.0 if "war" in one else 1.0 for one in lists]
    train = Examples({"genres": lists, "stars": stars})
    inputs, targets = {"x": FieldsInput(lists=("genres",))}, {"stars": NumberTarget(columns=("stars",))}
    fitted = fit_baseline(name, train, train.rows([]), inputs, targets)
    said = fitted.predict(Examples({"genres": [["war", "unheard"], ["love"], None]}))["stars"].values
    assert said == pytest.approx([5, 1, 1], abs=0.5)
