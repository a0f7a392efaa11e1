"""Labels without times: the loss and both decoders against all paths of a small case, one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from moekit.config.task_transcript import CtcHeadConfig
from moekit.models.ctc_head import CtcHead, best_path, prefix_beam
from moekit.models.task_heads import Hidden


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label)


def all_sums(probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of each label sequence: the sum over every path `[T]` that collapses to it."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        words = collapsed(path)
        found[words] = found.get(words, 0.0) + math.prod(
            probs[time, label] for time, label in enumerate(path)
        )
    return found


def head(labels: str = "xy") -> CtcHead:
    return CtcHead(CtcHeadConfig(labels=tuple(labels), stem="it"), 4)


def test_the_loss_is_that_of_all_paths():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 3)) * 2
    probs = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    targets = torch.tensor([[1, 2], [2, 2], [1, -100]])
    expected = [-math.log(all_sums(probs[row])[words]) for row, words in enumerate([(1, 2), (2, 2), (1,)])]
    loss, counted = head().loss(torch.tensor(logits, dtype=torch.float32), targets)
    assert counted == 5
    assert float(loss) == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_padding_adds_nothing_and_decodes_to_nothing():
    torch.manual_seed(0)
    model = head()
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    long = model.answer(Hidden(x, mask, x[:, 0], {"it": slice(0, 5)}, {}))
    short = model.answer(Hidden(x[:1, :3], None, x[:1, 0], {"it": slice(0, 3)}, {}))
    torch.testing.assert_close(long[0, :3], short[0])
    targets = torch.tensor([[1, 2]])
    torch.testing.assert_close(model.loss(long[:1], targets)[0], model.loss(short, targets)[0])
    for decode in (best_path, lambda logits: prefix_beam(logits, 6)):
        assert decode(long[0].detach().numpy()) == decode(short[0].detach().numpy())


def test_too_many_labels_for_the_frames_count_nothing_and_leave_gradients_finite():
    logits = torch.randn(2, 2, 3, requires_grad=True)
    loss, _ = head().loss(logits, torch.tensor([[1, 1, 2], [1, -100, -100]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert bool((logits.grad[0] == 0).all())
    assert float(logits.grad[1].abs().sum()) > 0


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_beam_finds_the_likeliest_labels(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, 3)) * 1.5
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sums = all_sums(probs)
    assert tuple(prefix_beam(logits, 200)) == max(sums, key=lambda words: sums[words])
    path = tuple(int(label) for label in probs.argmax(axis=1))
    assert tuple(best_path(logits)) == collapsed(path)


def test_the_beam_joins_what_one_path_misses():
    # of 5 frames, each likelier blank than not; but twice the same label needs a blank between
    unsure = np.log(np.array([[0.6, 0.4, 1e-9]] * 2))
    assert best_path(unsure) == []
    assert prefix_beam(unsure, 2) == [1]
    clear = np.log(np.eye(3)[[1, 1, 0, 1, 2]] + 1e-9)
    assert best_path(clear) == prefix_beam(clear, 3) == [1, 1, 2]
