"""A linear chain over tags: the loss of whole sequences, and the best of them.

A sequence weighs the sum of what each token says of its tag and of how well each tag follows the one before it; its
probability is its share among all sequences (Lafferty, McCallum & Pereira 2001; on top of a network: Lample et al.
2016, arXiv:1603.01360). What BIO tags rule out is ruled out in training too, which learns more than doing so in
prediction alone (Papay, Klinger & Padó 2022, arXiv:2106.07306).

Shape legend: B examples, T tokens, C tags.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IGNORED = -100
# a weight that no sequence can make up for; not infinite, because differences of infinities have no gradient
RULED_OUT = -1e4


class TagChain(nn.Module):
    """Weights of tags after each other, `[C, C]`, and of the first one, `[C]`; all of it in float32.

    Args:
        labels: names of the tags.
        bio: whether I-X may follow B-X and I-X alone, and start nothing.

    >>> chain = TagChain(["B-X", "I-X", "O"], bio=True)
    >>> scores = torch.tensor([[[0.0, 3.0, 1.0], [0.0, 2.0, 1.0]]])
    >>> chain.best(scores).argmax(dim=-1).tolist()  # by themselves: I-X, I-X
    [[0, 1]]
    """

    def __init__(self, labels: Sequence[str], bio: bool = False) -> None:
        super().__init__()
        n = len(labels)
        self.follows = nn.Parameter(torch.zeros(n, n))
        self.starts = nn.Parameter(torch.zeros(n))
        follows, starts = bio_rules(labels) if bio else (torch.zeros(n, n), torch.zeros(n))
        self.register_buffer("never_follows", follows * RULED_OUT, persistent=False)
        self.register_buffer("never_starts", starts * RULED_OUT, persistent=False)

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self.follows.float() + self.never_follows, self.starts.float() + self.never_starts  # type: ignore[operator]

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Minus the log probability of the examples' tags, summed over examples.

        Args:
            scores: `[B, T, C]` of each token's tags.
            targets: `[B, T]`; -100 where a tag is not known: all tags are summed over there, and behind the last known
                one the chain has ended.
        """
        known = targets != IGNORED
        places = torch.arange(targets.shape[1], device=targets.device)
        last = torch.where(known, places, -1).amax(dim=1)
        others = torch.ones_like(scores, dtype=torch.bool).scatter(2, targets.clamp(min=0)[..., None], False)
        held = scores.masked_fill(others & known[..., None], RULED_OUT)
        # both sums by one loop: over the sequences that hold to the targets, and over all
        sums = self._log_sums(torch.cat([held, scores]), (places <= last[:, None]).repeat(2, 1))
        fitting, every = sums.chunk(2)
        return torch.where(last >= 0, every - fitting, 0.0).sum()

    def _log_sums(self, scores: Tensor, real: Tensor) -> Tensor:
        """`[B]`: log of the summed weights of all sequences (forward algorithm)."""
        follows, starts = self._weights()
        reached = scores[:, 0] + starts
        for place in range(1, scores.shape[1]):
            further = torch.logsumexp(reached[:, :, None] + follows, dim=1) + scores[:, place]
            reached = torch.where(real[:, place, None], further, reached)
        return torch.logsumexp(reached, dim=1)

    def best(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, T, C]`: the weight of the best sequence that has this tag at this token.

        The largest of each token is its tag in the best sequence of all, the one that Viterbi's algorithm finds. `mask`
        `[B, T]` is False at padding, which must stand behind the tokens.
        """
        follows, starts = self._weights()
        n = scores.shape[1]
        before = [scores[:, 0] + starts]
        for place in range(1, n):
            before.append((before[-1][:, :, None] + follows).amax(dim=1) + scores[:, place])
        behind = [torch.zeros_like(before[0])]
        for place in range(n - 1, 0, -1):
            further = (follows + (scores[:, place] + behind[-1])[:, None]).amax(dim=2)
            behind.append(further if mask is None else torch.where(mask[:, place, None], further, 0.0))
        return torch.stack(before, dim=1) + torch.stack(behind[::-1], dim=1)


def bio_rules(labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What BIO tags rule out: `[C, C]` 1 where the second may not follow the first, `[C]` 1 where none may start.

    >>> follows, starts = bio_rules(["B-X", "I-X", "O"])
    >>> follows[2].tolist(), starts.tolist()
    ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0])
    """
    inside = [label[2:] if label.startswith("I-") else None for label in labels]
    kinds = [label[2:] if label.startswith(("B-", "I-")) else None for label in labels]
    follows = [[float(to is not None and to != kind) for to in inside] for kind in kinds]
    return torch.tensor(follows), torch.tensor([float(to is not None) for to in inside])
