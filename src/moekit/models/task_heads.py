"""Heads of tasks: hidden states to answers and losses.

Shape legend: B examples, S tokens of all stems, D width, C classes or tags, N numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.base import StrictConfig
from moekit.config.task import ClassifyHeadConfig, RegressHeadConfig, TagHeadConfig, TaskModelConfig
from moekit.layers.elastic import Elastic
from moekit.layers.moe import MoE
from moekit.layers.plan import RoutingPlan
from moekit.models.tag_chain import TagChain
from moekit.models.task_stems import weighted_rows

IGNORED = -100


@dataclass
class Hidden:
    """What heads read.

    Attributes: x `[B, S, D]` after the backbone; mask `[B, S]` or None; pooled `[B, D]`; places: where each stem's
        tokens stand in S; inputs: the arrays that the stems read; stems: themselves, for heads that share their tables;
        onward: where it is causal, the backbone on so many further tokens `[B, 1, D]` behind them, one by one;
        elastic: the routing of the call, for heads with sparse layers of their own.
    """

    x: Tensor
    mask: Tensor | None
    pooled: Tensor
    places: Mapping[str, slice]
    inputs: Mapping[str, Mapping[str, Tensor]]
    stems: Mapping[str, nn.Module] = field(default_factory=dict)
    onward: Callable[[int], Callable[[Tensor], Tensor]] | None = None
    elastic: Elastic | None = None


@dataclass
class HeadOutput:
    """What a head gives.

    Attributes: answer: what the loss is computed of, or what was generated where no targets were given. layer_losses,
        routing: auxiliary losses and plan of each sparse layer of the head's own, in the order of `Head.moe_layers`;
        none where it has no such layers, or generated.
    """

    answer: Tensor
    layer_losses: tuple[dict[str, Tensor], ...] = ()
    routing: tuple[RoutingPlan, ...] = ()


HEADS: dict[str, type[Head]] = {}
H = TypeVar("H", bound="type[Head]")


def register_head(kind: str) -> Callable[[H], H]:
    """Class decorator: the head for configurations of this kind, built by `Head.build`."""

    def add(cls: H) -> H:
        HEADS[kind] = cls
        return cls

    return add


def build_head(config: StrictConfig, model: TaskModelConfig) -> Head:
    """The head that a configuration's `kind` names, for a model of this configuration."""
    return HEADS[config.kind].build(config, model)  # type: ignore[attr-defined]


class Head(nn.Module):
    """Answers of one target.

    A head with sparse layers of its own overrides `run` and `moe_layers`; the others override `answer`.

    Attributes: reads_pooled: whether it answers from `Hidden.pooled`, which may be a vector of its own task.
    """

    reads_pooled: bool = True

    @classmethod
    def build(cls, config: Any, model: TaskModelConfig) -> Head:
        """The head, as `Head(config, d_model)`; those that need more of the model's configuration override it."""
        return cls(config, model.d_model)

    def share(self, stems: Mapping[str, nn.Module]) -> None:
        """Take over what the head shares with stems, once, before any training; nothing by default."""

    @property
    def moe_layers(self) -> list[MoE]:
        """The head's own sparse layers."""
        return []

    def added(self, targets: Tensor) -> Tensor | None:
        """Vectors `[B, N, D]` of the head's own that the backbone reads behind the stems' in training; or None."""
        return None

    @property
    def reads(self) -> list[str]:
        """Inputs that the head reads itself; none by default."""
        return []

    def answer(self, hidden: Hidden) -> Tensor:
        """What the loss is computed of, float32: logits, or numbers in standard deviations."""
        raise NotImplementedError

    def run(self, hidden: Hidden, targets: Tensor | None = None) -> HeadOutput:
        """The answer; heads that read what came before in the target (translation) get it in training."""
        return HeadOutput(self.answer(hidden))

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """The mean loss over the targets that count, and how many do."""
        raise NotImplementedError


@register_head("classify")
class ClassifyHead(Head):
    """Logits `[B, C]`; targets `[B]`, or `[B, C]` zeros and ones with `multi`."""

    def __init__(self, config: ClassifyHeadConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        n = len(config.labels)
        self.map = nn.Linear(d_model, n)
        # the linear model of the field, beside the deep one: it starts at nothing
        self.wide = nn.ParameterDict({name: torch.zeros(size, n) for name, size in config.wide.items()})
        self.wide_bias: nn.Parameter | None = None
        if config.wide_share is not None:
            self.wide_bias = nn.Parameter(torch.zeros(n))
            for fixed in (*self.wide.values(), self.wide_bias):
                fixed.requires_grad_(False)

    @property
    def reads(self) -> list[str]:
        # a fixed map says almost without error what it was fitted to: beside it the rest would learn noise
        return [] if self.training and self.wide_bias is not None else list(self.wide)

    def answer(self, hidden: Hidden) -> Tensor:
        logits = self.map(hidden.pooled).float()
        said: Tensor | None = self.wide_bias
        for name in self.reads:
            bag = hidden.inputs[name]
            one = weighted_rows(self.wide[name], bag["ids"], bag["weights"]).float()
            said = one if said is None else said + one
        if not self.reads or said is None:
            return logits
        share = self.config.wide_share
        if share is None:
            return logits + said
        return (1 - share) * logits.log_softmax(dim=-1) + share * said.log_softmax(dim=-1)

    @torch.no_grad()
    def set_wide(self, tables: Mapping[str, Tensor], bias: Tensor) -> None:
        """Take over wide maps that were fitted elsewhere: `[V, C]` for each bag, and a bias `[C]`."""
        for name, table in tables.items():
            self.wide[name].copy_(table)
        if self.wide_bias is not None:
            self.wide_bias.copy_(bias)

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        if self.config.multi:
            return F.binary_cross_entropy_with_logits(answer, targets.float()), len(targets)
        known = int((targets != IGNORED).sum())
        total = F.cross_entropy(
            answer, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=self.config.smoothing
        )
        return total / max(known, 1), known


@register_head("regress")
class RegressHead(Head):
    """Numbers `[B, N]` in standard deviations; targets `[B, N]` in their own units, NaN where unknown."""

    def __init__(self, config: RegressHeadConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.map = nn.Linear(d_model, len(config.means))
        start = torch.tensor([[1.0], [0.0]]).repeat(1, len(config.means))
        self.wide = nn.ParameterDict({name: start.clone() for name in config.wide})
        if config.wide:
            # the deep model starts with nothing to say beside the means, which are nearly right
            nn.init.zeros_(self.map.weight)
            nn.init.zeros_(self.map.bias)
        self.register_buffer("means", torch.tensor(config.means), persistent=False)
        self.register_buffer("deviations", torch.tensor(config.deviations), persistent=False)

    def answer(self, hidden: Hidden) -> Tensor:
        numbers = self.map(hidden.pooled).float()
        for name, table in self.wide.items():
            numbers = numbers + hidden.inputs[name]["numbers"].float() @ table.float()
        return numbers

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        wanted = (targets - self.means) / self.deviations  # type: ignore[operator]
        known = ~wanted.isnan()
        squared = torch.where(known, answer - wanted.nan_to_num(), 0.0).square().sum()
        return squared / max(int(known.sum()), 1), int(known.any(dim=1).sum())

    def in_units(self, answer: Tensor) -> Tensor:
        """Answers `[B, N]` in the targets' own units, within their bounds."""
        values = answer * self.deviations + self.means  # type: ignore[operator]
        return values if self.config.bounds is None else values.clamp(*self.config.bounds)


@register_head("tag")
class TagHead(Head):
    """Logits `[B, T, C]` for each of one stem's T tokens; targets `[B, T]`, -100 where there is none.

    With `crf` the loss is that of whole sequences, and without targets the answer is the weight of the best sequence
    that has a tag at a token, whose largest are the best sequence of all.
    """

    reads_pooled = False

    def __init__(self, config: TagHeadConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.map = nn.Linear(d_model, len(config.labels))
        self.chain = TagChain(config.labels, config.bio) if config.crf else None

    def answer(self, hidden: Hidden) -> Tensor:
        return self.map(hidden.x[:, hidden.places[self.config.stem]]).float()

    def run(self, hidden: Hidden, targets: Tensor | None = None) -> HeadOutput:
        answer = self.answer(hidden)
        if self.chain is not None and targets is None:
            place = hidden.places[self.config.stem]
            answer = self.chain.best(answer, None if hidden.mask is None else hidden.mask[:, place])
        return HeadOutput(answer)

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """The mean over known tags, and how many they are."""
        known = targets != IGNORED
        if self.chain is not None:
            total = self.chain.loss(answer, targets)
        else:
            total = F.cross_entropy(
                answer.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        return total / max(int(known.sum()), 1), int(known.sum())


class Pooling(nn.Module):
    """One vector `[B, D]` of tokens `[B, S, D]`: their mean, largest values, the first one, or a learned mixture."""

    def __init__(self, kind: str, d_model: int) -> None:
        super().__init__()
        self.kind = kind
        self.score = nn.Linear(d_model, 1) if kind == "attention" else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` `[B, S]` is False at padding; a row of padding alone gives zeros."""
        if self.kind == "first":
            return x[:, 0]
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        if self.kind == "max":
            largest = x.masked_fill(~real[..., None], -torch.inf).amax(dim=1)
            return torch.where(real.any(dim=1, keepdim=True), largest, torch.zeros_like(largest))
        if self.score is not None:
            scores = self.score(x).float().masked_fill(~real[..., None], -1e9)
            share = scores.softmax(dim=1).to(x.dtype)
        else:
            share = (real / real.sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)[..., None]
        return (x * share * real[..., None]).sum(dim=1)
