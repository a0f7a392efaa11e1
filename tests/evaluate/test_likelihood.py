"""The probability of texts that somebody else wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.likelihood import candidate_likelihoods, log_likelihoods
from moekit.models.task_model import TaskModel
from moekit.train.material import TaskMaterial

QUESTIONS = Examples({
    "question": ["how are you", "who are you", "where is it", "what is it called", "stop"],
    "answer": ["i am well", "a machine", "over there, behind the house", "a house", "well"],
    "label": ["small", "talk", "talk", "small", "talk"],
})  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """An untrained model, with its encoding."""
    config = TaskRunConfig.from_dict({
        "name": "t",
        "inputs": {"text": {"kind": "text", "column": "question", "tokenizer": "words"}},
        "targets": {"said": {"kind": "sequence", "column": "answer", "share": "text", "layers": 1, "smoothing": 0.2},
                    "kind": {"kind": "class", "column": "label"}},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "dropout": 0.5,
                  "moe": {"n_experts": 4, "top_k": 2, "d_expert": 16}},
        "train": {"steps": 1, "batch_size": 2, "device": "cpu"},
    })  # fmt: skip
    many = Examples({name: values * 4 for name, values in QUESTIONS.columns.items()})
    material = TaskMaterial.of(config, TaskData(many, QUESTIONS, QUESTIONS, given_test=True))
    torch.manual_seed(0)
    return TaskModel(material.config.model).eval(), material.encoding


def test_it_is_the_sum_over_the_tokens_of_what_the_decoder_says(made):
    model, encoding = made
    total, tokens = log_likelihoods(model, encoding, QUESTIONS, "said", batch_size=2)
    head = model.heads["said"]
    for row in range(len(QUESTIONS)):
        alone = encoding.encode(QUESTIONS.rows(np.array([row])))
        inputs, targets = alone.arrays(np.array([0]))
        with torch.no_grad():
            states = model(inputs, {"said": targets["said"]}).answers["said"]
        log_probs = (states @ head.output.T).float().log_softmax(dim=-1)
        wanted = log_probs[0].gather(1, targets["said"][0][:, None]).sum().item()
        assert total[row] == pytest.approx(wanted, abs=1e-3)
        assert (
            tokens[row]
            == targets["said"].shape[1]
            == len(encoding.targets["said"].ids([QUESTIONS["answer"][row]])[0])
        )
        assert targets["said"][0, -1] == 0, "the end is part of the text"


def test_all_texts_of_a_length_have_probabilities_that_sum_to_less_than_one(made):
    model, encoding = made
    words = sorted({word for text in QUESTIONS["answer"] for word in text.split()})
    examples = QUESTIONS.rows(np.array([0]))
    total, tokens = candidate_likelihoods(model, encoding, examples, "said", [words])
    assert total.shape == tokens.shape == (1, len(words))
    assert 0 < np.exp(total).sum() < 1


def test_candidates_stand_in_rows_of_their_questions(made):
    model, encoding = made
    texts = [["well", "a machine", "i am well"], ["a house", "well", "over there"], ["a", "b", "well"]]
    chosen = QUESTIONS.rows(np.array([3, 1, 0]))
    total, tokens = candidate_likelihoods(model, encoding, chosen, "said", texts)
    assert total.shape == (3, 3)
    for row, place in ((0, 1), (1, 0), (2, 2)):
        one = Examples({**chosen.rows(np.array([row])).columns, "answer": [texts[row][place]]})
        alone, n = log_likelihoods(model, encoding, one, "said")
        assert total[row, place] == pytest.approx(alone[0], abs=1e-3)
        assert tokens[row, place] == n[0]
    # the same text behind another question is another probability
    assert abs(total[0, 0] - total[1, 1]) > 1e-4


def test_other_targets_generate_nothing(made):
    model, encoding = made
    with pytest.raises(ConfigError, match=r"target 'kind' must be of kind sequence; got class"):
        log_likelihoods(model, encoding, QUESTIONS, "kind")
    with pytest.raises(ConfigError, match=r"target 'kind' must be of kind sequence; got class"):
        candidate_likelihoods(model, encoding, QUESTIONS, "kind", [["small"]] * 5)
