"""Texts that are generated and stretches of a text that was read, as arrays and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError, DataError
from moekit.config.task import SequenceTarget, SpanTarget, TextInput
from moekit.data.encoding.sequences import SequenceEncoder
from moekit.data.encoding.spans import SpanEncoder
from moekit.data.encoding.whole import Encoding
from moekit.data.examples import Examples

PAIRS = Examples({
    "source": ["the dog runs", "the cat sleeps", "a dog sleeps", "你好吗"],
    "target": ["El perro corre.", "El gato duerme.", None, "¿Cómo estás? 你好"],
})  # fmt: skip


def fitted(**fields) -> tuple[Encoding, SequenceEncoder]:
    inputs = {"text": TextInput(column="source", vocab_size=300)}
    encoding = Encoding.fit(inputs, {"said": SequenceTarget(**fields)}, PAIRS)
    encoder = encoding.targets["said"]
    assert isinstance(encoder, SequenceEncoder)
    return encoding, encoder


@pytest.mark.parametrize("tokenizer", ["bpe", "characters", "words"])
def test_texts_come_back(tokenizer):
    texts = ["El perro corre.", "El perro duerme, el gato corre.", "El gato duerme."] * 2
    encoder = SequenceEncoder.fit(SequenceTarget(tokenizer=tokenizer), Examples({"target": texts}))
    for text in texts[:3]:
        (ids,) = encoder.ids([text])
        assert ids[-1] == 0
        assert not (ids[:-1] == 0).any()
        said = encoder.text(ids)
        if tokenizer == "words":
            said = said.replace(" .", ".").replace(" ,", ",")
        assert said == (text if tokenizer == "bpe" else text.lower())
    again = SequenceEncoder.from_state(encoder.config, encoder.state())
    assert again.part() == encoder.part()
    assert again.text(ids) == encoder.text(ids)
    assert encoder.part().never == (1,)


def test_bytes_that_training_never_saw_come_back_too():
    _, encoder = fitted()
    (ids,) = encoder.ids(["Ω😀 x"])
    assert encoder.text(ids) == "Ω😀 x"


def test_a_shared_tokenizer_is_trained_on_both_columns():
    # "perro" stands in the answers alone
    apart, shared = fitted()[0], fitted(share="text")[0]
    assert apart.inputs["text"].pieces("perro") != ["perro"]
    words = Examples({"source": ["dog"] * 40, "target": ["perro"] * 40})
    inputs = {"text": TextInput(column="source", vocab_size=300)}
    both = Encoding.fit(inputs, {"said": SequenceTarget(share="text")}, words)
    assert both.inputs["text"].pieces("perro") == ["perro"]
    stem, head = shared.inputs["text"].part(), shared.targets["said"].part()
    assert stem.vocab_size == head.vocab_size
    assert head.share == "text"
    (ids,) = shared.targets["said"].ids(["the dog"])
    assert (
        ids[:-1].tolist()
        == shared.inputs["text"].encode(Examples({"source": ["the dog"]})).sequences["ids"][0].tolist()
    )


def test_unknown_answers_count_nowhere_and_long_ones_have_no_end():
    encoding, encoder = fitted(max_len=4)
    encoded = encoding.encode(PAIRS)
    targets = encoded.targets["said"].batch(np.array([2, 0]))["targets"]
    assert (targets[0] == -100).all()
    assert targets.shape == (2, 4)
    assert (targets[1] > 0).all(), "cut off, so it does not end"
    assert encoder.part().max_len == 4
    assert fitted()[1].part().max_len == max(len(ids) for ids in fitted()[1].ids(PAIRS["target"]))
    assert encoder.truth(PAIRS) == PAIRS["target"]


def test_an_answer_is_a_text_and_the_mean_probability_of_its_tokens():
    _, encoder = fitted()
    (ids,) = encoder.ids(["El perro"])
    row = torch.zeros(len(ids) + 3, 2)
    row[: len(ids), 0] = torch.from_numpy(ids).float()
    row[: len(ids), 1] = torch.tensor([0.5, 0.25] + [1.0] * (len(ids) - 2)).log()
    said = encoder.answers(row[None], 0)
    assert said["prediction"] == "El perro"
    assert said["tokens"] == len(ids)
    assert said["probability"] == pytest.approx((0.5 * 0.25) ** (1 / len(ids)))


def test_what_is_no_text_is_refused():
    _, encoder = fitted()
    with pytest.raises(DataError, match=r"example 2, column 'target': must hold text; got 7"):
        encoder.encode(Examples({"target": ["x", 7]}))


# ------------------------------------------------------------------------------------------------------------- spans

REQUESTS = Examples({
    "text": ["turn on the kitchen light", "open the left blind", "把客厅的灯打开", "stop"],
    "answer": ["kitchen", "left blind", "客厅", ""],
    "start": [12, 9, 1, None],
    "end": [19, 19, 3, None],
})  # fmt: skip


def spans(**fields) -> tuple[Encoding, SpanEncoder]:
    tokenizer = fields.pop("tokenizer", "bpe")
    inputs = {"text": TextInput(tokenizer=tokenizer, vocab_size=400)}
    encoding = Encoding.fit(inputs, {"where": SpanTarget(**fields)}, REQUESTS)
    encoder = encoding.targets["where"]
    assert isinstance(encoder, SpanEncoder)
    return encoding, encoder


def logits_for(targets: torch.Tensor, n: int) -> torch.Tensor:
    """Logits that are sure of these places."""
    logits = torch.zeros(len(targets), 1 + n, 2)
    for row, (start, end) in enumerate(targets.tolist()):
        logits[row, start, 0] = logits[row, end, 1] = 9.0
    return logits


@pytest.mark.parametrize("tokenizer", ["bpe", "characters"])
def test_spans_go_to_tokens_and_back(tokenizer):
    encoding, encoder = spans(tokenizer=tokenizer)
    encoded = encoding.encode(REQUESTS)
    targets = encoded.targets["where"].batch(np.arange(4))["targets"]
    assert targets[3].tolist() == [0, 0]
    assert (targets[:3] > 0).all()
    answer = logits_for(targets, 40)
    for row, wanted in enumerate(REQUESTS["answer"]):
        said = encoder.completed(encoder.answers(answer, row), row, encoded.inputs, REQUESTS)
        assert said["probability"] > 0.9
        if tokenizer == "bpe" and wanted == "客厅":
            # so few texts make one token of the whole request: an answer is never less than a token
            assert said["prediction"] == REQUESTS["text"][row]
            continue
        assert said["prediction"] == wanted
        if wanted:
            assert (said["start"], said["end"]) == (REQUESTS["start"][row], REQUESTS["end"][row])
    assert encoder.part().may_be_empty


def test_words_of_a_list_stand_in_a_text_with_spaces():
    words = Examples(
        {
            "text": [["turn", "on", "the", "Kitchen", "light"], ["stop", "it"]],
            "answer": ["Kitchen light", "it"],
        }
    )
    inputs = {"text": TextInput(tokenizer="words", vocab_size=300)}
    encoding = Encoding.fit(inputs, {"where": SpanTarget()}, words)
    encoded = encoding.encode(words)
    targets = encoded.targets["where"].batch(np.arange(2))["targets"]
    assert targets.tolist() == [[4, 5], [2, 2]]
    encoder = encoding.targets["where"]
    said = encoder.completed(encoder.answers(logits_for(targets, 5), 0), 0, encoded.inputs, words)
    assert said["prediction"] == "Kitchen light"
    assert not encoder.part().may_be_empty


def test_both_ends_may_be_given():
    encoding, encoder = spans(column=None, start="start", end="end")
    by_text, _ = spans()
    targets = [
        e.encode(REQUESTS).targets["where"].batch(np.arange(3))["targets"] for e in (encoding, by_text)
    ]
    assert torch.equal(*targets)
    assert encoding.encode(REQUESTS).targets["where"].batch(np.array([3]))["targets"].tolist() == [
        [-100, -100]
    ]
    assert encoder.truth(REQUESTS) == ["kitchen", "left blind", "客厅", None]


def test_the_second_of_equal_words_is_meant_where_its_place_is_given():
    twice = Examples({"text": ["light the light", "a light"], "answer": ["light", "light"], "start": [10, 2]})
    inputs = {"text": TextInput(tokenizer="words", vocab_size=300)}
    for start, wanted in ((None, 1), ("start", 3)):
        encoding = Encoding.fit(inputs, {"where": SpanTarget(start=start)}, twice)
        targets = encoding.encode(twice).targets["where"].batch(np.arange(2))["targets"]
        assert targets.tolist() == [[wanted, wanted], [2, 2]]


def test_an_answer_never_ends_before_it_starts_nor_is_too_long():
    _, encoder = spans(longest=2)
    logits = torch.zeros(1, 7, 2)
    logits[0, 5, 0], logits[0, 2, 1] = 9.0, 9.0  # ends before it starts
    logits[0, 4, 0], logits[0, 6, 1] = 5.0, 5.0
    start, end = encoder.answers(logits, 0)["prediction"]
    assert (start, end) in {(5, 5), (5, 6)}
    logits = torch.zeros(1, 7, 2)
    logits[0, 1, 0], logits[0, 6, 1] = 9.0, 9.0
    start, end = encoder.answers(logits, 0)["prediction"]
    assert 0 <= end - start < 2


def test_answers_beyond_what_is_read_are_not_learnt():
    inputs = {"text": TextInput(tokenizer="words", vocab_size=300, max_len=3)}
    encoding = Encoding.fit(inputs, {"where": SpanTarget()}, Examples({"text": ["a b c d"], "answer": ["b"]}))
    long = Examples({"text": ["a b c d", "a b c d"], "answer": ["c d", "b c"]})
    assert encoding.encode(long).targets["where"].batch(np.arange(2))["targets"].tolist() == [
        [-100, -100],
        [2, 3],
    ]


def test_what_does_not_stand_in_the_text_is_refused():
    encoding, _ = spans()
    with pytest.raises(DataError, match=r"example 1, column 'answer': must stand in the text; got 'cellar'"):
        encoding.encode(Examples({"text": ["the kitchen"], "answer": ["cellar"]}))
    placed, _ = spans(start="start")
    with pytest.raises(DataError, match="must stand in the text at character 3"):
        placed.encode(Examples({"text": ["the kitchen"], "answer": ["kitchen"], "start": [3]}))
    ends, _ = spans(column=None, start="start", end="end")
    with pytest.raises(DataError, match="start and end must lie in order in the 11 characters"):
        ends.encode(Examples({"text": ["the kitchen"], "start": [4], "end": [12]}))
    with pytest.raises(DataError, match="no example has an answer"):
        Encoding.fit(
            {"text": TextInput()}, {"where": SpanTarget()}, Examples({"text": ["a"], "answer": [""]})
        )
    with pytest.raises(ConfigError, match="column must be given, or both start and end"):
        SpanTarget.from_dict({"column": None, "start": "start"})
    with pytest.raises(ConfigError, match="end must be left out"):
        SpanTarget.from_dict({"end": "end"})
