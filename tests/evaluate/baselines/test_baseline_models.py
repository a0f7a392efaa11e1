"""Each family learns what it must learn, chooses on validation, and never sees more than it is given."""

from __future__ import annotations

import numpy as np
import pytest

from moekit.config.errors import ConfigError, DataError
from moekit.config.task import (
    AudioInput,
    ClassTarget,
    FieldsInput,
    IdsInput,
    ImageInput,
    NumberTarget,
    ProfileInput,
    TagsTarget,
    TextInput,
)
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import fit_baseline

pytest.importorskip("sklearn")

TEXT, LABEL = {"text": TextInput()}, {"label": ClassTarget()}


def topics(n: int, seed: int) -> Examples:
    """Short texts of three topics; each has its words, and all share noise."""
    rng = np.random.default_rng(seed)
    words = {"sea": ["wave", "boat", "salt"], "sky": ["cloud", "bird", "wind"], "土": ["石", "泥", "草地"]}
    labels = [list(words)[i % 3] for i in range(n)]
    texts = []
    for label in labels:
        chosen = [str(rng.choice(words[label])) for _ in range(2)] + [
            str(rng.choice(["the", "a", "of"])) for _ in range(4)
        ]
        texts.append(" ".join(chosen[i] for i in rng.permutation(6)))
    return Examples({"text": texts, "label": labels})


def quick(name: str) -> dict[str, object]:
    """Options that make a baseline small where it would be slow."""
    small = {"buckets": 2**12, "size": 16, "rate": 0.03}
    return {"bag-of-embeddings": small, "boosting": {"rounds": 60, "rate": 0.2}}.get(name, {})


def accuracy(fitted, examples: Examples, name: str = "label") -> float:
    found = fitted.predict(examples)[name].values
    return float(np.mean([a == b for a, b in zip(found, examples[name], strict=True)]))


@pytest.mark.parametrize(
    "name", ["tfidf-svm", "tfidf-logistic", "tfidf-char-svm", "linear", "nearest", "bag-of-embeddings"]
)
def test_text_classifiers_learn_topics(name):
    fitted = fit_baseline(name, topics(90, 1), topics(30, 2), TEXT, LABEL, options=quick(name))
    test = topics(60, 3)
    assert accuracy(fitted, test) >= 0.95
    answers = fitted.predict(test)["label"]
    assert answers.labels == ("sea", "sky", "土")
    assert answers.class_scores.shape == (60, 3)
    assert [answers.labels[i] for i in answers.class_scores.argmax(1)] == list(answers.values)
    if answers.probabilistic:
        assert np.allclose(answers.class_scores.sum(1), 1, atol=1e-5)
    assert answers.probabilistic == (name not in ("tfidf-svm", "tfidf-char-svm"))
    empty = fitted.predict(test.rows([]))["label"]
    assert len(empty.values) == 0
    assert empty.class_scores.shape == (0, 3)


@pytest.mark.parametrize("name", ["tfidf-svm", "bag-of-embeddings"])
def test_several_labels_at_once(name):
    data = topics(120, 1)
    lists = [
        [label, "wet"] if label == "sea" else [label] if label == "sky" else [] for label in data["label"]
    ]
    data = Examples({"text": data["text"], "label": lists})
    train, held, test = data.rows(range(80)), data.rows(range(80, 100)), data.rows(range(100, 120))
    fitted = fit_baseline(
        name,
        train,
        held,
        TEXT,
        {"label": ClassTarget(multi=True)},
        options=quick(name),
    )
    answers = fitted.predict(test)["label"]
    assert answers.labels == ("sea", "sky", "wet")
    assert np.mean([set(a) == set(b) for a, b in zip(answers.values, test["label"], strict=True)]) >= 0.9


def test_the_penalty_is_chosen_on_validation_alone():
    """Validation labels are the training labels turned: the figures that were written down say so."""
    train, held = topics(90, 1), topics(30, 2)
    turned = {"sea": "sky", "sky": "土", "土": "sea"}
    wrong = Examples({"text": held["text"], "label": [turned[label] for label in held["label"]]})
    right_figures = fit_baseline("tfidf-svm", train, held, TEXT, LABEL).settings["label"]["validation"]
    wrong_figures = fit_baseline("tfidf-svm", train, wrong, TEXT, LABEL).settings["label"]["validation"]
    assert max(wrong_figures.values()) < 0.2 < 0.9 < max(right_figures.values())
    without = fit_baseline("tfidf-svm", train, held.rows([]), TEXT, LABEL).settings["label"]
    assert without["C"] == 1.0
    assert "validation" not in without


def test_refit_learns_from_validation_too():
    train = Examples({"text": ["up up", "down"] * 4, "label": ["+", "-"] * 4})
    held = Examples({"text": ["up", "side"], "label": ["+", "="]})
    test = Examples({"text": ["side"]})
    once = fit_baseline("tfidf-svm", train, held, TEXT, LABEL)
    again = fit_baseline("tfidf-svm", train, held, TEXT, LABEL, options={"refit": True, "grid": [10.0]})
    assert once.predict(test)["label"].labels == ("+", "-")
    assert again.predict(test)["label"].values == ["="]
    assert again.settings["label"]["refit"] is True


def fields(n: int, seed: int) -> Examples:
    """y = 2 · size + 3 where the colour is red; the label says whether size is outside -1..1, which no line can say."""
    rng = np.random.default_rng(seed)
    size = rng.normal(size=n)
    colour = [str(rng.choice(["red", "blue", "rare"], p=[0.45, 0.45, 0.1])) for _ in range(n)]
    value = 2 * size + 3 * np.asarray([c == "red" for c in colour])
    label = ["out" if abs(s) > 1 else "in" for s in size]
    holes = [None if i % 17 == 0 else float(s) for i, s in enumerate(size)]
    return Examples({"size": size, "holes": holes, "colour": colour, "value": value, "label": label})


def test_lines_and_trees_each_learn_what_they_can():
    inputs = {"x": FieldsInput(numbers=("size",), categories=("colour",))}
    train, held, test = fields(400, 1), fields(150, 2), fields(200, 3)
    for name, number_error, class_low, class_high in (
        ("linear", 0.05, 0.0, 0.75), ("boosting", 0.45, 0.97, 1.0), ("nearest", 0.35, 0.93, 1.0),
    ):  # fmt: skip
        targets = {"value": NumberTarget(columns=("value",)), "label": ClassTarget()}
        fitted = fit_baseline(name, train, held, inputs, targets, options=quick(name))
        error = np.sqrt(np.mean((fitted.predict(test)["value"].values - test["value"]) ** 2))
        assert error < number_error, name
        assert class_low <= accuracy(fitted, test) <= class_high, name


@pytest.mark.parametrize("name", ["linear", "boosting", "nearest"])
def test_holes_unseen_categories_and_bounds(name):
    inputs = {"x": FieldsInput(numbers=("holes",), categories=("colour",))}
    target = {"value": NumberTarget(columns=("value", "size"), bounds=(-0.5, 0.5))}
    fitted = fit_baseline(name, fields(200, 1), fields(60, 2), inputs, target, options=quick(name))
    strange = Examples({"holes": [None, float("nan"), 5.0], "colour": ["green", None, "red"]})
    found = fitted.predict(strange)["value"].values
    assert found.shape == (3, 2)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 0.5
    assert found[2].tolist() == [0.5, 0.5]
    assert fitted.predict(strange.rows([]))["value"].values.shape == (0, 2)


def test_boosting_keeps_the_rounds_that_validation_wants():
    rng = np.random.default_rng(0)
    noise = Examples({"n": rng.normal(size=200), "y": rng.normal(size=200)})
    inputs, targets = {"x": FieldsInput(numbers=("n",))}, {"y": NumberTarget(columns=("y",))}
    fitted = fit_baseline("boosting", noise.rows(range(100)), noise.rows(range(100, 200)), inputs, targets)
    assert fitted.settings["y"]["y"]["rounds"] <= 10  # nothing to learn: early rounds are the best ones
    # every round gets the few held examples right: the loss still says that more than the first one are wanted
    n = np.linspace(-1, 1, 101)
    clear = Examples({"n": n, "y": ["above" if value > 0 else "below" for value in n]})
    held = Examples({"n": [-0.5, 0.5, 0.7], "y": ["below", "above", "unheard of"]})
    fitted = fit_baseline(
        "boosting", clear, held, inputs, {"y": ClassTarget(column="y")}, options={"grid": [7]}
    )
    assert fitted.settings["y"]["rounds"] > 20
    said = fitted.predict(held)["y"]
    assert said.values == ["below", "above", "above"]
    assert said.class_scores[:, 0].tolist() == pytest.approx([0, 1, 1], abs=0.05)
    with pytest.raises(ConfigError, match=r"'boosting' answers one class; targets\.label\.multi is true"):
        fit_baseline("boosting", Examples({"n": [1.0], "label": [["a"]]}), noise.rows([]), inputs,
                     {"label": ClassTarget(multi=True)})  # fmt: skip


@pytest.mark.parametrize("name", ["linear", "boosting", "nearest"])
def test_images_and_sound(name):
    rng = np.random.default_rng(0)
    label = np.arange(120) % 2
    images = rng.integers(0, 50, (120, 6, 6)).astype(np.uint8)
    images[label == 1, :3] += 150
    sound = [rng.normal(size=(int(rng.integers(3, 9)), 4)) + 3 * y for y in label]
    data = Examples({"image": images, "audio": sound, "label": label})
    train, held, test = data.rows(range(60)), data.rows(range(60, 90)), data.rows(range(90, 120))
    for inputs in ({"i": ImageInput()}, {"a": AudioInput()}):
        assert accuracy(fit_baseline(name, train, held, inputs, LABEL, options=quick(name)), test) == 1.0
    with pytest.raises(DataError, match=r"frames \[time, features\].*got shape \(7,\)"):
        fit_baseline(
            name, Examples({"audio": [np.zeros(7)], "label": ["a"]}), held, {"a": AudioInput()}, LABEL
        )


def rated(n: int, seed: int) -> Examples:
    """Users of two tastes, items of two kinds: a rating says whether they agree, plus what item and user add."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 40, n), rng.integers(0, 30, n)
    value = 3 + np.where(user % 2 == item % 2, 1.0, -1.0) + 0.5 * (item % 3 - 1) + 0.1 * rng.normal(size=n)
    return Examples({"user": user, "item": item, "rating": value})


@pytest.mark.parametrize("name", ["factorisation", "svd++"])
def test_factorisations_learn_tastes(name):
    inputs = {"x": IdsInput(columns=("user", "item"))}
    targets = {"rating": NumberTarget(columns=("rating",), bounds=(1, 5))}
    train, held, test = rated(700, 1), rated(150, 2), rated(200, 3)
    options = {"factors": 4, "penalty": 0.005, "batch": 128, "rate": 0.05, "epochs": 25}
    fitted = fit_baseline(name, train, held, inputs, targets, options=options)
    again = fit_baseline(name, train, held, inputs, targets, options=options)
    found = fitted.predict(test)["rating"].values
    assert np.sqrt(np.mean((found - test["rating"]) ** 2)) < 0.35  # biases alone leave 1.0
    assert np.array_equal(found, again.predict(test)["rating"].values)
    # a profile names the same columns
    profile = {"x": ProfileInput(by="user", of="item", value="rating")}
    by_profile = fit_baseline(name, train, held, profile, targets, options=options)
    assert np.array_equal(found, by_profile.predict(test)["rating"].values)
    # nobody knows either: the mean of training
    strange = fitted.predict(Examples({"user": [99], "item": [99]}))["rating"].values
    assert strange == pytest.approx(np.mean(train["rating"]), abs=1e-5)
    with pytest.raises(ConfigError, match=r"two columns of ids, user and item; got user"):
        fit_baseline(name, train, held, {"x": IdsInput(columns=("user",))}, targets)


def test_bm25_answers_with_the_nearest_example():
    pytest.importorskip("bm25s")
    train = Examples({
        "question": ["how old are you", "what is your name", "你叫什么名字", "tell me a joke", "another joke please"],
        "answer": ["three", "moe", "小模", "no", "no"],
    })  # fmt: skip

    class Reply:
        kind, column = "sequence", "answer"

    fitted = fit_baseline(
        "bm25", train, train.rows([]), {"q": TextInput(column="question")}, {"reply": Reply()}
    )
    asked = Examples({"question": ["your name?", "名字", "HOW OLD is he", "xyzzy", "", None]})
    assert fitted.predict(asked)["reply"].values == ["moe", "小模", "three", "no", "no", "no"]
    assert fitted.report()["libraries"].keys() == {"bm25s"}


def tagged(n: int, seed: int, characters: bool = False) -> Examples:
    """Capitals after "in" are places, other capitals persons; characters from 在 to 。 are a place."""
    rng = np.random.default_rng(seed)
    texts, tags = [], []
    for _ in range(n):
        name = "".join(rng.choice(list("abcdefgh"), 4)).title()
        if characters:
            place = "".join(rng.choice(list("东西南北山水"), 2))
            texts.append(f"他在{place}。")
            tags.append(["O", "O", "B-LOC", "I-LOC", "O"])
        elif rng.random() < 0.5:
            texts.append(["they", "live", "in", name])
            tags.append(["O", "O", "O", "B-LOC"])
        else:
            texts.append(["then", name, "sang", "loud"])
            tags.append(["O", "B-PER", "O", "O"])
    return Examples({"text": texts, "tags": tags})


@pytest.mark.parametrize("characters", [False, True])
def test_crf_tags_unseen_words_by_shape_and_neighbours(characters):
    pytest.importorskip("sklearn_crfsuite")
    inputs = {"text": TextInput(tokenizer="characters" if characters else "words")}
    train, held, test = (tagged(n, seed, characters) for n, seed in ((60, 1), (20, 2), (30, 3)))
    fitted = fit_baseline("crf", train, held, inputs, {"tags": TagsTarget()})
    assert fitted.predict(test)["tags"].values == list(test["tags"])
    assert set(fitted.settings["tags"]["validation"]) == {"(0.1, 0.1)", "(0.01, 0.01)"}
    assert fitted.predict(test.rows([]))["tags"].values == []


def test_crf_names_the_example_whose_lengths_differ():
    pytest.importorskip("sklearn_crfsuite")
    broken = Examples({"text": [["a"], ["b", "c"]], "tags": [["O"], ["O"]]})
    with pytest.raises(DataError, match=r"training example 1: 2 words, but 1 tags"):
        fit_baseline(
            "crf", broken, broken.rows([]), {"text": TextInput(tokenizer="words")}, {"tags": TagsTarget()}
        )


def test_one_class_cannot_be_separated():
    one = Examples({"text": ["a", "b"], "label": ["x", "x"]})
    for name in ("tfidf-svm", "bag-of-embeddings"):
        with pytest.raises(ConfigError, match=r"targets\.label has "):
            fit_baseline(name, one, one, TEXT, LABEL)
    with pytest.raises(DataError, match=r"column 'text' gives no words"):
        fit_baseline("tfidf-svm", Examples({"text": ["", "!"], "label": ["x", "y"]}), one, TEXT, LABEL)
