"""`inputs.NAME.unknown`: training tokens that are read as unknown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.task import TextInput
from moekit.data.encoding.text import TextEncoder
from moekit.data.examples import Examples

TEXTS = Examples({"text": ["one two three four five six seven eight"] * 150 + ["one two"] * 50})


def tokens(**fields):
    config = TextInput(tokenizer="words", **fields)
    return TextEncoder.fit(config, TEXTS).encode(TEXTS)


def test_a_share_of_the_training_tokens_is_unknown():
    rows = np.arange(200)
    whole = tokens().batch(rows, np.random.default_rng(0))["ids"]
    assert not (whole == 1).any(), "training has all words"
    found = tokens(unknown=0.3).batch(rows, np.random.default_rng(0))["ids"]
    read = whole != 0
    assert ((found == 0) == ~read).all(), "padding stays padding"
    share = (found[read] == 1).float().mean()
    # 1,300 tokens: a deviation of 0.013
    assert 0.26 < share < 0.34
    kept = read & (found != 1)
    assert torch.equal(found[kept], whole[kept])


def test_other_tokens_each_time_and_the_same_of_the_same_seed():
    encoded, rows = tokens(unknown=0.3), np.arange(20)
    first, other, again = (encoded.batch(rows, np.random.default_rng(seed))["ids"] for seed in (1, 2, 1))
    assert not torch.equal(first, other)
    assert torch.equal(first, again)


def test_what_is_validated_or_predicted_is_read_as_it_is():
    rows = np.arange(200)
    assert torch.equal(tokens(unknown=0.9).batch(rows)["ids"], tokens().batch(rows)["ids"])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_the_share_lies_below_one(share):
    with pytest.raises(ConfigError, match="unknown"):
        TextInput.from_dict({"unknown": share})
