"""Vectors of words: of themselves, of their parts, and of their neighbours as far as they are mixed in."""

from __future__ import annotations

import pytest
import torch

from moekit.config.task import WordStemConfig
from moekit.models.task_stems import build_stem
from moekit.models.word_stem import WordStem

IDS = torch.tensor([[2, 3, 4, 5], [1, 2, 0, 0]])
PARTS = torch.tensor([[[1, 2], [3, 0], [0, 0], [4, 4]], [[1, 2], [5, 0], [0, 0], [0, 0]]])


def stem(mix: int) -> WordStem:
    torch.manual_seed(0)
    made = build_stem(WordStemConfig(vocab_size=6, buckets=7, mix=mix), 8)
    assert isinstance(made, WordStem)
    return made


def test_a_word_is_the_sum_of_its_own_vector_and_of_its_parts():
    made = stem(0)
    out = made(IDS, PARTS)
    expected = made.weight[2] + (made.parts[1] + made.parts[2]) / 2**0.5
    torch.testing.assert_close(out.x[0, 0], expected)
    torch.testing.assert_close(out.x[0, 2], made.weight[4])
    assert out.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert torch.equal(out.ids, IDS)
    # words without an id of their own differ by their parts
    other = made(torch.tensor([[1, 1]]), torch.tensor([[[1, 2], [1, 3]]])).x[0]
    assert not torch.allclose(other[0], other[1])


@pytest.mark.parametrize("mix", [0, 1, 2])
def test_neighbours_reach_as_far_as_they_are_mixed_in(mix):
    made = stem(mix).eval()
    changed = IDS.clone()
    changed[0, 3] = 2
    same = (made(IDS, PARTS).x[0] - made(changed, PARTS).x[0]).abs().amax(dim=-1) == 0
    assert same.tolist() == [place < 3 - mix for place in range(4)]


@pytest.mark.parametrize("mix", [0, 2])
def test_padding_changes_no_word(mix):
    made = stem(mix).eval()
    longer = torch.nn.functional.pad(IDS, (0, 3)), torch.nn.functional.pad(PARTS, (0, 2, 0, 3))
    torch.testing.assert_close(made(*longer).x[:, :4][IDS != 0], made(IDS, PARTS).x[IDS != 0])
