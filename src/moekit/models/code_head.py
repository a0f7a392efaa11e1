"""A head that writes a picture: codes of its patches, one after the other, by the model's own causal backbone.

Shape legend: B examples, P patches, D width, K codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.errors import require
from moekit.config.task_vision import CodesHeadConfig
from moekit.models.task_heads import Head, HeadOutput, Hidden, register_head


@register_head("codes")
class CodesHead(Head):
    """Logits `[B, P, K]` of each patch's code, given what the stems read and the codes before it; targets `[B, P]`.

    In training the codes before stand behind the stems' tokens (`added`), so that one pass of the backbone gives all
    logits. Without targets the codes `[B, P]` are drawn one after the other from torch's global generator, and are the
    answer. Patches as words of a language model: van den Oord et al. 2017, arXiv:1711.00937 (there the codebook is
    learnt, here it is given), and Chen et al. 2020, "Generative pretraining from pixels".
    """

    reads_pooled = False

    def __init__(self, config: CodesHeadConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.start = nn.Parameter(torch.randn(d_model) * d_model**-0.5)
        self.codes = nn.Embedding(config.codes, d_model)
        nn.init.normal_(self.codes.weight, std=d_model**-0.5)
        self.places = nn.Parameter(torch.randn(config.length, d_model) * d_model**-0.5)
        self.map = nn.Linear(d_model, config.codes)

    def added(self, targets: Tensor) -> Tensor:
        """`[B, P, D]`: a start, and all codes but the last; the token in place i answers for patch i."""
        require(targets.shape[1] == self.config.length, "targets", tuple(targets.shape),
                f"must hold the codes of {self.config.length} patches")  # fmt: skip
        start = self.start.expand(len(targets), 1, -1)
        return torch.cat([start, self.codes(targets[:, :-1])], dim=1) + self.places

    def run(self, hidden: Hidden, targets: Tensor | None = None) -> HeadOutput:
        if targets is None:
            return HeadOutput(self.drawn(hidden))
        return HeadOutput(self.map(hidden.x[:, -self.config.length :]).float())

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return F.cross_entropy(answer.flatten(0, 1), targets.flatten()), targets.numel()

    def drawn(self, hidden: Hidden) -> Tensor:
        """Codes `[B, P]`, each drawn given those before."""
        assert hidden.onward is not None
        onward = hidden.onward(self.config.length)
        found: list[Tensor] = []
        token = self.start.expand(len(hidden.x), 1, -1)
        for place in self.places:
            state = onward(token + place)
            found.append(draw(self.map(state[:, 0]).float(), self.config.temperature, self.config.top_p))
            token = self.codes(found[-1])[:, None]
        return torch.stack(found, dim=1)


def draw(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """`[B]` drawn from `[B, K]` logits, among the likeliest that hold `top_p` together (Holtzman et al. 2019).

    >>> draw(torch.tensor([[0.0, 5.0, 4.9]]), temperature=1.0, top_p=0.4)      # the first one alone holds that much
    tensor([1])
    """
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        # those before hold less than the share: the likeliest always stays
        stays = ranked.cumsum(dim=-1) - ranked < top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ranked * stays)
    return torch.multinomial(probs, 1)[:, 0]
