"""Lists of words to arrays: ids by frequency, parts by hash, what training hides, and tags on them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moekit.config.errors import ConfigError, DataError
from moekit.config.task import TagsTarget, WordsInput
from moekit.data.encoding.targets import TagsEncoder
from moekit.data.encoding.whole import Encoding
from moekit.data.encoding.words import WordsEncoder, word_parts
from moekit.data.examples import Examples

LISTS = [["The", "dog", "barks"], ["the", "DOG", "1998"], [], ["a", "dog", "2026", "x"]]
TRAIN = Examples({"words": LISTS, "tags": [["O"] * len(words) for words in LISTS]})


def fitted(**fields) -> WordsEncoder:
    return WordsEncoder.fit(WordsInput(**fields), TRAIN)


def arrays(
    encoder: WordsEncoder, lists: list, rng: np.random.Generator | None = None
) -> dict[str, np.ndarray]:
    encoded = encoder.encode(Examples({"words": lists}))
    return {name: array.numpy() for name, array in encoded.batch(np.arange(len(lists)), rng).items()}


def test_ids_go_by_frequency_without_case_and_digits():
    encoder = fitted()
    assert encoder.counts == {"dog": 3, "0000": 2, "the": 2}
    assert arrays(encoder, [["Dog", "the", "1234", "cat"], ["a"], []])["ids"].tolist() == [
        [2, 4, 3, 1],
        [1, 0, 0, 0],  # a is too rare
        [1, 0, 0, 0],  # no words are one that nothing is known of
    ]
    assert fitted(min_count=1).id_of("a") == fitted(min_count=1, vocab_size=4).id_of("a") == 5
    assert fitted(vocab_size=1).id_of("the") == 1
    assert encoder.part().vocab_size == 5


def test_unknown_words_are_told_apart_by_parts_which_never_change():
    encoder = fitted(buckets=1000)
    found = arrays(encoder, [["Reuterian", "reuterian", "Reuters", "Sox"]])["parts"][0]
    one, low, like, other = (set(row[row > 0].tolist()) for row in found)
    assert len(one - low) == 1, "the shape alone differs"
    assert found[0, 0] == found[2, 0] == found[3, 0], "three capitalised words"
    assert len(one & like) > 10 > len(one & other)
    # written down once: another run of Python, or another machine, must find the same
    assert encoder.parts_of("Sox") == [164, 919, 315, 227, 499, 683, 767, 958, 905]
    assert found.max() <= 1000


def test_every_kind_of_part_can_be_left_out():
    assert list(word_parts("Ab", WordsInput(ngrams=None, affixes=0, shape=False))) == []
    assert list(word_parts("Ab", WordsInput(ngrams=None, affixes=9, shape=False))) == [
        "<a",
        "b>",
        "<ab",
        "ab>",
    ]
    assert list(word_parts("Ab", WordsInput(ngrams=(3, 3), affixes=0))) == ["shape Xx", "<ab", "ab>"]
    found = arrays(fitted(ngrams=None, affixes=0, shape=False), [["Ab", "dog"]])
    assert found["parts"].tolist() == [[[0], [0]]]
    with pytest.raises(ConfigError, match="the shorter one first"):
        WordsInput.from_dict({"ngrams": [5, 3]})


def test_pairs_are_shared_by_the_two_words():
    encoder = fitted(ngrams=None, affixes=0, shape=False, pairs=True, unit="characters")
    found = arrays(encoder, ["北京是", "在北京"])["parts"]
    assert found[0, 1, 1] == found[0, 0, 2] == found[1, 2, 1] == found[1, 1, 2]
    assert len(set(found[0, :, 1:].flatten().tolist())) == 4, "three characters have two pairs and two ends"


def test_training_hides_rare_words_and_blanks_some():
    encoder = fitted(min_count=1, rare_dropout=0.5, dropout=0.2)
    lists = [["dog", "barks"]] * 4000
    plain_arrays = arrays(encoder, lists)
    assert (plain_arrays["ids"] > 1).all()
    found = arrays(encoder, lists, np.random.default_rng(0))
    blank = (found["parts"][..., 1:] == 0).all(axis=2)
    assert blank.mean() == pytest.approx(0.2, abs=0.02)
    assert (found["parts"][..., 0] == plain_arrays["parts"][..., 0]).all(), "the shape stays"
    assert (found["ids"][blank] == 1).all()
    # seen 3 times and once: 0.5 / 3.5 and 0.5 / 1.5
    hidden = ((found["ids"] == 1) & ~blank).sum(axis=0) / (~blank).sum(axis=0)
    assert hidden.tolist() == pytest.approx([1 / 7, 1 / 3], abs=0.03)
    again = arrays(encoder, lists, np.random.default_rng(0))
    assert all((again[name] == found[name]).all() for name in found)


def test_what_was_fitted_comes_back(tmp_path):
    inputs, targets = {"text": WordsInput(pairs=True)}, {"tags": TagsTarget(crf=True)}
    encoding = Encoding.fit(inputs, targets, TRAIN)
    encoding.save(tmp_path)
    again = Encoding.load(tmp_path, inputs, targets)
    for first, second in zip(encoding.encode(TRAIN).arrays(np.arange(4)), again.encode(TRAIN).arrays(np.arange(4)),
                             strict=True):  # fmt: skip
        assert json.dumps(first, default=lambda t: t.tolist()) == json.dumps(
            second, default=lambda t: t.tolist()
        )
    assert again.targets["tags"].part() == encoding.targets["tags"].part()


def test_tags_lie_on_words_that_are_read():
    inputs, targets = {"text": WordsInput(max_len=2)}, {"tags": TagsTarget()}
    examples = Examples({"words": [["a", "b", "c"], ["d"]], "tags": [["O", "X", "X"], ["X"]]})
    encoding = Encoding.fit(inputs, targets, examples)
    encoded = encoding.encode(examples)
    assert encoded.arrays(np.arange(2))[1]["tags"].tolist() == [[0, 1], [1, -100]]
    said = {"prediction": ["X", "X"]}
    assert encoding.targets["tags"].completed(said, 0, encoded.inputs, examples)["prediction"] == [
        "X",
        "X",
        "O",
    ]
    for tags in (["O"], ["O"] * 4):
        wrong = Examples({"words": [["a", "b", "c"]], "tags": [tags]})
        with pytest.raises(
            DataError, match=r"example 1, column 'tags': must hold as many tags as words \(3\); got "
        ):
            encoding.encode(wrong)


@pytest.mark.parametrize(
    ("tags", "bio"), [([["B-X", "I-X"], ["O"]], True), ([["O", "I-X"]], False), ([["N"]], False)]
)
def test_rules_of_bio_are_those_that_training_keeps(tags, bio):
    examples = Examples({"tags": tags})
    assert TagsEncoder.fit(TagsTarget(crf=True), examples).part().bio is bio
    assert TagsEncoder.fit(TagsTarget(), examples).part().bio is False


@pytest.mark.parametrize("value", [None, 3])
def test_what_holds_no_words_is_named(value):
    with pytest.raises(
        DataError, match="example 2, column 'words': must hold a list of words, or a text; got "
    ):
        fitted().encode(Examples({"words": [["a"], value]}))
    with pytest.raises(DataError, match="column 'words' holds no words"):
        WordsEncoder.fit(WordsInput(), Examples({"words": [[], []]}))
