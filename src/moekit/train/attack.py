"""Projected gradient ascent on inputs and on token vectors (Madry et al. 2018, arXiv:1706.06083).

    Place of each input: where it is, its unit, what is valid ─► ascend(objective) ─► a change for each ─► moved call

Pictures, clips, sound and numbers are moved themselves; ids cannot be, so of them the vectors of their stem are (Miyato
et al. 2017, arXiv:1605.07725). A vector's unit is the typical length of a token of the call, so that a model gains
nothing by growing its table.

Shape legend: B examples, S tokens, D width; `...` the axes of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moekit.config.adversarial import AttackConfig
from moekit.config.errors import ConfigError, nearest
from moekit.data.encoding.base import Continuous, Encoded
from moekit.layers.plan import RoutingPlan, mean_over_tokens
from moekit.models.task_model import TaskModel

# name of the vectors of a language model
TOKENS = "tokens"
_STREAM = 0xADE5  # keeps these draws apart from others of the same seed
Changes = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where one input may be moved from.

    Attributes: start: `[B, ...]`, what it is now; zeros for a stem's vectors, to which the change is added. unit: what
        an epsilon of 1 is, broadcasting. low, high: what is valid, or None. real: False where nothing may move, or
        None. each: leading axes whose entries have a length of their own in l2: 1 for examples, 2 for tokens. array:
        of the input, or None for the stem's vectors.
    """

    start: Tensor
    unit: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    real: Tensor | None = None
    each: int = 1
    array: str | None = None

    def inside(self, change: Tensor, epsilon: float, norm: str) -> Tensor:
        """The change nearest to `change` that is allowed. An input that is not valid as it is may stay so."""
        if norm == "linf":
            change = torch.clamp(change / self.unit, -epsilon, epsilon) * self.unit
        else:
            scaled = change / self.unit
            change = scaled * (epsilon / self.length(scaled).clamp(min=1e-12)).clamp(max=1.0) * self.unit
        if self.low is not None and self.high is not None:
            low, high = torch.minimum(self.low, self.start), torch.maximum(self.high, self.start)
            change = torch.clamp(self.start + change, low, high) - self.start
        return change if self.real is None else change * self.real

    def length(self, scaled: Tensor) -> Tensor:
        """Euclidean length of each entry, the other axes of size 1."""
        axes = tuple(range(self.each, scaled.ndim))
        return scaled.square().sum(dim=axes, keepdim=True).sqrt()

    def uphill(self, gradient: Tensor, stride: float, norm: str) -> Tensor:
        """A step of the length `stride` in the direction in which the objective grows fastest."""
        if norm == "linf":
            return gradient.sign() * stride * self.unit
        scaled = gradient * self.unit
        return scaled / self.length(scaled).clamp(min=1e-30) * stride * self.unit

    def anywhere(self, epsilon: float, norm: str, generator: torch.Generator) -> Tensor:
        """A change drawn evenly from all that are within reach, before what is valid is looked at."""
        drawn = torch.empty(self.start.shape)
        if norm == "linf":
            return drawn.uniform_(-epsilon, epsilon, generator=generator).to(self.unit.device) * self.unit
        drawn.normal_(generator=generator)
        size = drawn[0].numel() if self.each == 1 else drawn.shape[-1]
        share = torch.empty(self.length(drawn).shape).uniform_(generator=generator) ** (1 / size)
        drawn *= epsilon * share / self.length(drawn).clamp(min=1e-12)
        return drawn.to(self.unit.device) * self.unit

    def noise(self, config: AttackConfig, generator: torch.Generator) -> Tensor:
        """A random change as large as epsilon allows: each number by epsilon up or down, or a random direction."""
        drawn = torch.empty(self.start.shape).normal_(generator=generator).to(self.unit.device)
        step = drawn.sign() if config.norm == "linf" else drawn / self.length(drawn).clamp(min=1e-12)
        return self.inside(step * config.epsilon * self.unit, config.epsilon, config.norm)


def ascend(
    objective: Callable[[Changes], Tensor],
    places: Mapping[str, Place],
    config: AttackConfig,
    generator: torch.Generator,
) -> Changes:
    """The changes, within reach, that gradient ascent makes `objective` large with.

    Args:
        objective: a number of the changes by name; each example's part must depend on its own changes alone.
        places: of each input.
        config: size, steps and norm.
        generator: on the CPU, for the start.

    >>> weight = torch.tensor([[2.0, -1.0]])
    >>> place = Place(torch.zeros(1, 2), torch.ones(1))
    >>> config = AttackConfig(epsilon=0.5, steps=4)
    >>> ascend(lambda change: (change["x"] * weight).sum(), {"x": place}, config, torch.Generator())["x"].tolist()
    [[0.5, -0.5]]
    """
    changes = {name: torch.zeros_like(place.start) for name, place in places.items()}
    if config.random_start:
        changes = {
            name: place.inside(
                place.anywhere(config.epsilon, config.norm, generator), config.epsilon, config.norm
            )
            for name, place in places.items()
        }
    for _ in range(config.steps):
        changes = {name: change.detach().requires_grad_(True) for name, change in changes.items()}
        gradients = torch.autograd.grad(objective(changes), list(changes.values()), allow_unused=True)
        changes = {
            name: place.inside(
                change.detach() + place.uphill(gradient.float(), config.stride, config.norm),
                config.epsilon, config.norm,
            )
            for (name, change), place, gradient in zip(
                changes.items(), places.values(), _known(gradients, places), strict=True
            )
        }  # fmt: skip
    return {name: change.detach() for name, change in changes.items()}


def _known(gradients: tuple[Tensor | None, ...], places: Mapping[str, Place]) -> Iterator[Tensor]:
    for gradient, place in zip(gradients, places.values(), strict=True):
        yield torch.zeros_like(place.start) if gradient is None else gradient


@torch.no_grad()
def places_of(
    model: nn.Module,
    arguments: Mapping[str, Any],
    config: AttackConfig,
    continuous: Mapping[str, Continuous | None],
) -> dict[str, Place]:
    """Where the inputs of a call may be moved from.

    Args:
        model: of a task, or a language model.
        arguments: of the call.
        config: which inputs, and whether they themselves or their vectors.
        continuous: of a task's inputs, as `continuous_inputs` gives them.

    Errors: `ConfigError` for an input that is not there, or has no numbers to move where these are asked for.
    """
    if not isinstance(model, TaskModel):
        require_attackable(model, config, {})
        segments = arguments.get("segment_ids")
        real = None if segments is None else segments >= 0
        stem: Any = model.stem
        return {TOKENS: _of_vectors(stem(arguments["token_ids"]), real, config.norm)}
    require_attackable(model, config, continuous)
    found = {}
    for name in config.inputs or model.stems:
        array = None if config.space == "embedding" else continuous.get(name)
        given = arguments["inputs"][name]
        if array is None:
            vectors = model.stems[name](**given)
            found[name] = _of_vectors(vectors.x, vectors.mask, config.norm)
        else:
            found[name] = _of_array(given, array)
    return found


def _of_array(given: Mapping[str, Tensor], array: Continuous) -> Place:
    start = given[array.array]
    real = ~start.isnan()  # what is missing is not moved
    if array.lengths is not None:
        places = torch.arange(start.shape[1], device=start.device)
        real = real & (places < given[array.lengths][:, None])[..., None]
    low, high = (None if one is None else one.to(start.device) for one in (array.low, array.high))
    return Place(start, array.unit.to(start.device), low, high, real.to(start.dtype), array=array.array)


def _of_vectors(x: Tensor, real: Tensor | None, norm: str) -> Place:
    x = x.float()
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    squared = (x.square() * mask[..., None]).sum() / mask.sum().clamp(min=1)  # of a token's length
    # the typical length of a token's vector, or the typical size of one of its numbers
    unit = (squared if norm == "l2" else squared / x.shape[-1]).sqrt().reshape(1)
    return Place(torch.zeros_like(x), unit, real=mask[..., None].float(), each=2)


def require_attackable(
    model: nn.Module, config: AttackConfig, continuous: Mapping[str, Continuous | None]
) -> None:
    """Raise `ConfigError` where the inputs of a model cannot be moved as a configuration says."""
    if config.objective == "routing" and not getattr(model, "moe_layers", ()):
        raise ConfigError(
            "objective must be loss for a model without sparse layers: it has no routing to change"
        )
    if not isinstance(model, TaskModel):
        if config.inputs is not None:
            raise ConfigError(
                f"inputs must be null for a language model, which has one; got {list(config.inputs)}"
            )
        if config.space == "input":
            raise ConfigError(
                "space must be auto or embedding for a language model: token ids cannot be moved a little"
            )
        return
    for name in config.inputs or model.stems:
        if name not in model.stems:
            raise ConfigError(
                f"inputs names {name!r}, which the backbone does not read: {nearest(name, list(model.stems))}"
            )
        if config.space == "input" and continuous.get(name) is None:
            raise ConfigError(
                f"space must be auto or embedding for input {name!r}: it holds nothing that can be moved a little "
                "(ids, or numbers with bins). Set space: embedding, or name other inputs"
            )


def continuous_inputs(encoded: Mapping[str, Encoded], config: AttackConfig) -> dict[str, Continuous | None]:
    """What of each input can be moved, with the valid range as the training examples have it."""
    return {name: part.continuous(config.valid_range) for name, part in encoded.items()}


def moved(arguments: Mapping[str, Any], places: Mapping[str, Place], changes: Changes) -> dict[str, Any]:
    """The arguments of a call with its inputs moved.

    NaN stays NaN: a number that is missing is not moved.
    """
    if set(changes) == {TOKENS} and "token_ids" in arguments:
        return {**arguments, "shift": changes[TOKENS]}
    inputs, shifts = dict(arguments["inputs"]), {}
    for name, change in changes.items():
        array = places[name].array
        if array is None:
            shifts[name] = change
        else:
            inputs[name] = {**inputs[name], array: inputs[name][array] + change}
    return {**arguments, "inputs": inputs, **({"shifts": shifts} if shifts else {})}


def draws(*numbers: int) -> torch.Generator:
    """A generator of its own on the CPU for these numbers: an attack changes no other draw."""
    seed = int(np.random.SeedSequence([_STREAM, *numbers]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


@contextmanager
def under_attack(model: nn.Module) -> Iterator[None]:
    """The model as it is used: no dropout, no routing noise, no statistics kept, no gradient of any weight."""
    was_training = model.training
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(was_training)


def routing_divergence(plans: tuple[RoutingPlan, ...], others: tuple[RoutingPlan, ...]) -> Tensor:
    """Mean over sparse layers and tokens of KL(p || q) in nats: p the routing probabilities of `plans`, q of `others`.

    Errors: `ConfigError` where no layer has probabilities.

    >>> from moekit.layers.plan import RoutingContext
    >>> def plan(*probs):
    ...     return (RoutingPlan.from_choices(torch.tensor([[0]]), torch.ones(1, 1), 2, RoutingContext((1, 1)),
    ...         router_probs=torch.tensor([probs])),)
    >>> round(float(routing_divergence(plan(1.0, 0.0), plan(0.5, 0.5))), 4)      # log 2
    0.6931
    """
    found = []
    for plan, other in zip(plans, others, strict=True):
        if plan.router_probs is None or other.router_probs is None:
            continue
        p, q = (one.float().clamp(min=1e-9) for one in (plan.router_probs, other.router_probs))
        found.append(mean_over_tokens((p * (p.log() - q.log())).sum(dim=-1), plan.token_mask))
    if not found:
        raise ConfigError(
            "no sparse layer here has routing probabilities (hash and random routers have none): their routing has "
            "no divergence. Set stability: 0 and objective: loss"
        )
    return torch.stack(found).mean()
