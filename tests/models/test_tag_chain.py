"""The chain of tags against every sequence written out, one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moekit.models.tag_chain import IGNORED, TagChain

LABELS = ["B-X", "B-Y", "I-X", "I-Y", "O"]


def chain(bio: bool) -> TagChain:
    torch.manual_seed(1)
    made = TagChain(LABELS, bio)
    torch.nn.init.normal_(made.follows)
    torch.nn.init.normal_(made.starts)
    return made


def allowed(tags: tuple[int, ...]) -> bool:
    """By the words of the rule: inside follows a beginning or an inside of the same kind."""
    names = ["O", *[LABELS[tag] for tag in tags]]
    return all(not b.startswith("I-") or a in (f"B-{b[2:]}", b) for a, b in itertools.pairwise(names))


def sequences(made: TagChain, scores: torch.Tensor, bio: bool) -> dict[tuple[int, ...], float]:
    """The weight of every sequence of one example `[T, C]`."""
    found = {}
    for tags in itertools.product(range(len(LABELS)), repeat=len(scores)):
        if not bio or allowed(tags):
            steps = sum(float(made.follows[a, b].detach()) for a, b in itertools.pairwise(tags))
            said = sum(float(scores[place, tag]) for place, tag in enumerate(tags))
            found[tags] = float(made.starts[tags[0]].detach()) + steps + said
    return found


@pytest.mark.parametrize("bio", [False, True])
def test_the_loss_is_minus_the_log_of_the_share_of_the_fitting_sequences(bio):
    made = chain(bio)
    scores = torch.randn(4, 4, 5)
    # whole, shorter, one tag unknown between known ones, nothing known
    targets = torch.tensor([[0, 2, 2, 4], [4, 1, IGNORED, IGNORED], [1, IGNORED, IGNORED, 3], [IGNORED] * 4])
    wanted = 0.0
    for row, n in ((0, 4), (1, 2), (2, 4)):
        weights = sequences(made, scores[row, :n], bio)
        known = targets[row, :n].tolist()
        fits = [weight for tags, weight in weights.items()
                if all(t in (tag, IGNORED) for t, tag in zip(known, tags, strict=True))]  # fmt: skip
        assert fits
        wanted += math.log(sum(map(math.exp, weights.values()))) - math.log(sum(map(math.exp, fits)))
    assert float(made.loss(scores, targets).detach()) == pytest.approx(wanted, rel=1e-5)
    assert float(made.loss(scores[3:], targets[3:]).detach()) == 0.0


@pytest.mark.parametrize("bio", [False, True])
def test_the_best_sequence_is_found_and_every_weight_is_that_of_a_best_one(bio):
    made = chain(bio)
    scores = torch.randn(6, 4, 5)
    lengths = [4, 3, 1, 4, 2, 4]
    mask = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    found = made.best(scores, mask).detach()
    for row, n in enumerate(lengths):
        weights = sequences(made, scores[row, :n], bio)
        assert tuple(found[row, :n].argmax(dim=-1).tolist()) == max(weights, key=weights.__getitem__)
        for place, tag in itertools.product(range(n), range(5)):
            through = [w for tags, w in weights.items() if tags[place] == tag]
            if through:
                assert float(found[row, place, tag]) == pytest.approx(max(through), abs=1e-4)
            else:
                assert float(found[row, place, tag]) < -9e3


def test_bio_tags_are_never_broken_however_sure_the_scores_are():
    made = chain(True)
    scores = torch.zeros(1, 5, 5)
    scores[:, :, 3] = 50.0  # I-Y everywhere
    assert made.best(scores).argmax(dim=-1).tolist() == [[1, 3, 3, 3, 3]]


def test_gradients_are_marginals_less_the_targets():
    made = chain(True)
    scores = torch.randn(1, 3, 5, requires_grad=True)
    made.loss(scores, torch.tensor([[1, 3, 4]])).backward()
    weights = sequences(made, scores[0].detach(), True)
    total = sum(map(math.exp, weights.values()))
    wanted = torch.zeros(3, 5)
    for tags, weight in weights.items():
        for place, tag in enumerate(tags):
            wanted[place, tag] += math.exp(weight) / total
    wanted[[0, 1, 2], [1, 3, 4]] -= 1
    torch.testing.assert_close(scores.grad[0], wanted)
