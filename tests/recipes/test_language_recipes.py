"""What is only the recipes' of replies and slots: ranking, and baselines of their own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.config.task import SpanTarget, TextInput
from moekit.data.examples import Examples, TaskData
from moekit.recipes import dialogue, slots
from moekit.recipes.dialogue import (
    CANDIDATES,
    RANK,
    RECALL,
    best_of,
    candidates,
    questions,
    ranked,
    shared_words,
)
from moekit.recipes.slots import found_shares, span_of, tagged, words_in
from moekit.recipes.tasks import load_recipe
from moekit.train.run import load_task_run, train_run

# ----------------------------------------------------------------------------------------------------------- replies


def test_candidates_are_other_replies_and_always_the_same():
    replies = [f"reply {number % 15}" for number in range(30)]
    found = candidates(replies)
    assert found == candidates(replies)
    for right, texts in zip(replies, found, strict=True):
        assert texts[0] == right
        assert len(set(texts)) == len(texts) == CANDIDATES
        assert set(texts) <= set(replies)
    assert len({tuple(sorted(texts)) for texts in found}) > 10, "not the same nine for all"
    with pytest.raises(ConfigError, match=r"10 different replies are needed to rank them; got 3"):
        candidates(["a", "b", "c"] * 9)


def test_ranks_of_the_first_column():
    first = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    third = np.array([[1.0, 2.0, 3.0], [5.0, 4.0, 6.0]])
    tables = {"worse": third, "better": first, "as good": first}
    assert ranked(tables, "better") == {RECALL: 1.0, RANK: 1.0}
    assert ranked(tables, "worse") == {RECALL: 0.0, RANK: pytest.approx((1 / 3 + 1 / 2) / 2)}
    assert best_of(tables) == "better"
    equal = ranked({"all equal": np.zeros((4, 3))}, "all equal")
    assert equal[RANK] == pytest.approx(1 / 2), "equals share the middle rank, nobody is first by place"
    assert equal[RECALL] == 0


def test_questions_lie_evenly():
    part = Examples({"question": [str(number) for number in range(101)]})
    assert questions(part, 3).tolist() == [0, 50, 100]
    assert questions(part, 500).tolist() == list(range(101))


def test_shared_words():
    pytest.importorskip("bm25s")
    found = shared_words("where is the cat", ["a dog", "the cat is here", "the end"])
    assert found.argmax() == 1
    assert found[0] == 0
    assert shared_words("where", ["?", "!"]).tolist() == [0, 0]


def small_talk(n: int) -> Examples:
    """Each topic has a reply; the question names it."""
    topics = [f"topic{number}" for number in range(12)]
    return Examples({
        "question": [f"tell me of {topics[row % 12]} number{row}" for row in range(n)],
        "answer": [f"this is all about {topics[row % 12]}" for row in range(n)],
    })  # fmt: skip


def talk() -> tuple[object, TaskData]:
    config = load_recipe("dialogue").config("small-talk", overrides=[
        "inputs.text.tokenizer=words", "model.d_model=32", "model.n_layers=1", "model.d_ff=64", "model.dropout=0",
        "model.embedding_dropout=0", "model.moe.n_experts=4", "model.moe.d_expert=32", "targets.reply.layers=1",
        "targets.reply.beams=1", "targets.reply.smoothing=0", "epochs=25", "train.optimizer.lr=0.01",
        "train.validate_every=0", "train.device=cpu",
    ])  # fmt: skip
    return config, TaskData(small_talk(240), small_talk(24), small_talk(36), given_test=True)


def test_retrieval_ranks_what_its_questions_name():
    pytest.importorskip("bm25s")
    pytest.importorskip("sacrebleu")
    config, data = talk()
    row = dialogue.baseline("bm25 retrieval", load_recipe("dialogue"), config, data)
    assert row["scores"]["reply.bleu"] == pytest.approx(100)
    assert row["scores"][RECALL] == 1
    assert row["settings"]["ranking"] == "words of the question", "the first of two that are right"
    with pytest.raises(ConfigError, match="'oracle' that nobody registers"):
        dialogue.baseline("oracle", load_recipe("dialogue"), config, data)


def test_a_trained_model_ranks_and_writes(tmp_path):
    pytest.importorskip("ranx")
    config, data = talk()
    folder = train_run(config.replace(runs_dir=str(tmp_path)), data=data, quiet=True).folder
    loaded = load_task_run(folder)
    found = dialogue.measure(loaded, data)
    assert found[RECALL] > 0.5, "a tenth by chance"
    assert found[RANK] >= found[RECALL]
    assert dialogue.notes(loaded, data).count("→") == 3


# ------------------------------------------------------------------------------------------------------------- slots

REQUESTS = Examples({
    "text": ["turn on the living room light", "Open: left blind!", "把客厅的灯打开", "stop", "in the hall now"],
    "area": ["living room", "", "客厅", "", "hall"],
    "area_start": [12, None, 1, None, 7],
    "words": ["known", "known", "new", "none", "new"],
})  # fmt: skip
AREA = SpanTarget(column="area", start="area_start")


def test_words_cover_a_text_but_for_white_space():
    for text in [*REQUESTS["text"], "", "  ", "a  b", "İstanbul'da 5°C,10%", "«¡hola!»"]:
        places = words_in(text)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
        said = "".join(text[begin:end] for begin, end in places)
        assert "".join(said.split()) == "".join(text.split())


def test_tags_and_back():
    found = tagged(REQUESTS, TextInput(), AREA)
    assert found["tags"][0] == ["O", "O", "O", "B-X", "I-X", "O"]
    assert found["words"][0][3:5] == ["living", "room"]
    assert found["tags"][2] == ["O", "B-X", "I-X", "O", "O", "O", "O"]
    assert set(found["tags"][1]) == {"O"}
    said = [span_of(*row) for row in zip(REQUESTS["text"], found["words"], found["tags"], strict=True)]
    assert said == REQUESTS["area"]


def test_the_first_span_counts():
    words = ["a", "b", "c", "d"]
    assert span_of("a b c d", words, ["O", "I-X", "I-X", "O"]) == "b c"
    assert span_of("a b c d", words, ["B-X", "B-X", "I-X", "O"]) == "a"
    assert span_of("a b c d", words, ["O", "O", "O", "B-X"]) == "d"


def test_shares_of_spans_by_whether_training_has_the_words():
    said = {"area": ["living room", "left", "厅", "hall", "Hall."]}
    found = found_shares(said, {"area": AREA}, REQUESTS)
    # a span that is said where there is none belongs to neither
    assert found == {"spans found of known words": 1.0, "spans found of new words": 0.5}
    plain = Examples({name: values for name, values in REQUESTS.columns.items() if name != "words"})
    assert found_shares(said, {"area": AREA}, plain) == {"spans found": pytest.approx(2 / 3)}


def rooms(n: int, new: bool) -> Examples:
    names = ["den", "attic"] if new else ["hall", "living room", "kitchen", "garage", "office", "porch"]
    columns: dict[str, list] = {"text": [], "area": [], "area_start": [], "words": []}
    for row in range(n):
        room = "" if row % 4 == 3 else names[row % len(names)]
        text = f"turn on light {row % 5} in the {room} now" if room else f"stop light {row % 5} now"
        columns["text"].append(text)
        columns["area"].append(room)
        columns["area_start"].append(text.index(room) if room else None)
        columns["words"].append("none" if not room else "new" if new else "known")
    return Examples(columns)


def test_a_random_field_finds_spans_and_is_measured_like_a_model():
    pytest.importorskip("sklearn_crfsuite")
    recipe = load_recipe("slots")
    config = recipe.config("english")
    config = config.replace(targets={"area": config.targets["area"]})
    test = [rooms(24, False), rooms(24, True)]
    both = Examples({name: [*test[0][name], *test[1][name]] for name in test[0].columns})
    row = slots.baseline("crf of spans", recipe, config, TaskData(rooms(60, False), rooms(24, False), both))
    assert row["scores"]["area.exact_match"] > 0.9
    assert row["scores"]["spans found of known words"] == 1
    assert 0 <= row["scores"]["spans found of new words"] <= 1
    assert set(row["settings"]) == {"area"}
    with pytest.raises(ConfigError, match="'oracle' that nobody registers"):
        slots.baseline("oracle", recipe, config, TaskData(both, both, both))
