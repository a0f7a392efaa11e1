"""What an attack does to a model: right answers and routes without it, under it, and under noise of its size.

Robust accuracy is the share of answers that are right without attack and after every restart of it. A route changes
where the experts of a token in a layer are another set, or where the heaviest of them is another (Puigcerver et al.
2022, arXiv:2210.10253). Noise as large as the attack, drawn as often, says how much of that any change of this size
does.

A model may only look robust because its gradients lead nowhere. `gradient_checks` looks for the signs of that
(Athalye et al. 2018, arXiv:1802.00420; Carlini et al. 2019, arXiv:1902.06705).

Shape legend: N answers or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.adversarial import AttackConfig
from moekit.config.errors import ConfigError
from moekit.data.encoding.base import Continuous
from moekit.data.loader import Batch
from moekit.data.task_loader import TaskBatch
from moekit.layers.plan import RoutingPlan
from moekit.models.task_heads import IGNORED
from moekit.observe.choices import NONE, choices_of
from moekit.observe.recorder import layers_of
from moekit.train.adversarial import class_logits
from moekit.train.attack import (
    Changes,
    ascend,
    draws,
    moved,
    places_of,
    routing_divergence,
    under_attack,
)

AnyBatch = Batch | TaskBatch
# an accuracy may differ by so much for no reason, of some hundred examples
SLACK = 0.02
# what may be left of the accuracy where everything is within reach
LEFT = 0.05
WAYS = ("clean", "attack", "noise")


def changed_routes(plan: RoutingPlan, other: RoutingPlan) -> tuple[Tensor, Tensor]:
    """`[N]` bool of the tokens that count: whether they have another set of experts, and another heaviest one.

    >>> from moekit.layers.plan import RoutingContext
    >>> def plan(*experts):
    ...     weights = torch.tensor([[0.7, 0.3]] * len(experts))
    ...     return RoutingPlan.from_choices(torch.tensor(experts), weights, 4, RoutingContext((1, len(experts))))
    >>> sets, heaviest = changed_routes(plan([0, 1], [0, 1], [0, 1]), plan([0, 1], [1, 0], [0, 3]))
    >>> sets.tolist(), heaviest.tolist()
    ([False, False, True], [False, True, False])
    """
    before, after = choices_of(plan).experts, choices_of(other).experts
    width = max(before.shape[1], after.shape[1])
    before, after = (
        torch.nn.functional.pad(one, (0, width - one.shape[1]), value=NONE) for one in (before, after)
    )
    if width == 0:
        return torch.zeros(len(before), dtype=torch.bool), torch.zeros(len(before), dtype=torch.bool)
    sets = (before.sort(dim=1).values != after.sort(dim=1).values).any(dim=1)
    heaviest = before[:, 0] != after[:, 0]
    if plan.token_mask is not None:
        sets, heaviest = sets[plan.token_mask], heaviest[plan.token_mask]
    return sets.cpu(), heaviest.cpu()


@dataclass
class _Sums:
    """Counts over batches.

    Attributes: right: by target and way, answers that are right; asked: by target, answers; losses: by way, summed over
        targets; targets: what they were summed over. changed: by way, of each layer tokens with another set and with
        another heaviest expert; tokens: of each layer.
    """

    right: dict[str, dict[str, int]] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))
    targets: int = 0
    examples: int = 0
    changed: dict[str, list[list[int]]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)

    def routes(self, way: str, flags: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Of each layer, which tokens have another set and another heaviest expert."""
        found = self.changed.setdefault(way, [[0, 0] for _ in flags])
        self.tokens = self.tokens or [0] * len(flags)
        for layer, (sets, heaviest) in enumerate(flags):
            found[layer][0] += int(sets.sum())
            found[layer][1] += int(heaviest.sum())
            if way == "attack":
                self.tokens[layer] += len(sets)


@dataclass
class _Worst:
    """What several attempts on a batch did: answers that were right after all, routes that any changed, the loss."""

    right: dict[str, Tensor]
    loss: float
    routes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, right: Mapping[str, Tensor], before: Any, after: Any) -> None:
        self.right = {name: one & right[name] for name, one in self.right.items()}
        self.loss = max(self.loss, float(after.loss))
        found = [changed_routes(*plans) for plans in zip(before.routing, after.routing, strict=True)]
        known = self.routes or [(torch.zeros_like(one), torch.zeros_like(other)) for one, other in found]
        self.routes = [(a | c, b | d) for (a, b), (c, d) in zip(known, found, strict=True)]


def measure_attack(
    model: nn.Module, batches: Iterable[AnyBatch], attack: AttackConfig, *,
    continuous: Mapping[str, Continuous | None] | None = None, restarts: int = 1, seed: int = 0,
    source: nn.Module | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What an attack does to the answers and the routes of a model, JSON-ready.

    Args:
        model: of a task, or a language model; it is attacked in evaluation mode.
        batches: with targets, on the model's device.
        attack: its size and steps.
        continuous: of a task's inputs, what can be moved (`moekit.train.attack.continuous_inputs`).
        restarts: attacks on each example, and draws of noise: an answer counts that is right after all of
            them (under attack, without it as well), and a route that any of them changed.
        seed: of the starts and of the noise.
        source: the model whose gradients are followed, where it is another one: a transferred attack.

    Errors: `ConfigError` for what cannot be attacked.
    """
    sums, layers = _Sums(), layers_of(model)
    for number, batch in enumerate(batches):
        _measure_batch(
            model, source or model, batch, attack, continuous or {}, restarts, (seed, number), sums
        )
    if sums.targets == 0:
        raise ConfigError("there is nothing to attack: no example has an answer")
    report: dict[str, Any] = {
        "attack": {**attack.to_dict(), "restarts": restarts, "transferred": source is not None},
        "examples": sums.examples,
        "accuracy": {
            target: {way: right / sums.asked[target] for way, right in ways.items()}
            for target, ways in sums.right.items()
        },
        "loss": {way: total / sums.targets for way, total in sums.losses.items()},
        "routes": {},
        "layers": [],
    }
    total = sum(sums.tokens)
    for way, each in sums.changed.items():
        report["routes"][way] = {
            kind: sum(layer[place] for layer in each) / max(total, 1)
            for place, kind in enumerate(("set", "heaviest"))
        }
    for place, layer in enumerate(layers if sums.tokens else ()):
        row: dict[str, Any] = {"layer": layer.name, "experts": layer.n_experts}
        for way, each in sums.changed.items():
            n = max(sums.tokens[place], 1)
            row[way] = {"set": each[place][0] / n, "heaviest": each[place][1] / n}
        report["layers"].append(row)
    return report


def _measure_batch(
    model: nn.Module, source: nn.Module, batch: AnyBatch, attack: AttackConfig,
    continuous: Mapping[str, Continuous | None], restarts: int, seed: tuple[int, int], sums: _Sums,
) -> None:  # fmt: skip
    arguments: dict[str, Any] = batch.arguments()
    targets = arguments["targets"]
    if isinstance(batch, Batch) and not bool(batch.token_mask.all()):
        arguments = {**arguments, "token_mask": batch.token_mask}
    places = places_of(source, arguments, attack, continuous)

    def right(out: Any) -> dict[str, Tensor]:
        return {
            name: (logits.argmax(dim=-1) == wanted)[wanted != IGNORED]
            for name, (logits, wanted) in class_logits(model, out, targets).items()
        }

    with under_attack(model), under_attack(source):
        with torch.no_grad():
            before = model(**arguments)
            guide = before if source is model else source(**arguments)
        clean = right(before)
        found = {
            "clean": _Worst(clean, float(before.loss)), "attack": _Worst(clean, float(before.loss)),
            "noise": _Worst({name: torch.ones_like(one) for name, one in clean.items()}, -float("inf")),
        }  # fmt: skip
        objective = _objective(source, arguments, places, attack, guide)
        for restart in range(restarts):
            chance = draws(*seed, restart, 1)
            tried = {
                "attack": ascend(objective, places, attack, draws(*seed, restart)),
                "noise": {name: place.noise(attack, chance) for name, place in places.items()},
            }
            for way, changes in tried.items():
                with torch.no_grad():
                    after = model(**moved(arguments, places, changes))
                found[way].add(right(after), before, after)
    for way, worst in found.items():
        for name, one in worst.right.items():
            sums.right.setdefault(name, dict.fromkeys(WAYS, 0))[way] += int(one.sum())
        sums.losses[way] += worst.loss * before.n_targets
        if way != "clean":
            sums.routes(way, worst.routes)
    for name, one in clean.items():
        sums.asked[name] = sums.asked.get(name, 0) + len(one)
    sums.targets += before.n_targets
    sums.examples += len(targets) if isinstance(targets, Tensor) else len(next(iter(targets.values())))


def _objective(
    model: nn.Module, arguments: Mapping[str, Any], places: Any, attack: AttackConfig, before: Any
) -> Callable[[Changes], Tensor]:
    def objective(changes: Changes) -> Tensor:
        out = model(**moved(arguments, places, changes))
        if attack.objective == "routing":
            return routing_divergence(before.routing, out.routing)
        loss: Tensor = out.loss
        return loss

    return objective


def gradient_checks(
    model: nn.Module, batches: Sequence[AnyBatch], attack: AttackConfig, *,
    continuous: Mapping[str, Continuous | None] | None = None, source: nn.Module | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Signs that the gradients of a model mislead the attack, JSON-ready: each with its accuracy, rule and verdict.

    Args:
        model, batches, attack, continuous: as for `measure_attack`, its objective the loss.
        source: another model for the same answers; attacks made on it should do no more harm than those on the model.

    A model that fails one is less robust than the attack says. One that passes all may still be: an attack is an upper
    bound.
    """

    def accuracy(config: AttackConfig, way: str = "attack", **more: Any) -> float:
        found = measure_attack(model, batches, config, continuous=continuous, **more)["accuracy"]
        if not found:
            raise ConfigError("checks count right answers, and no target here is one class. Leave them out")
        return float(sum(ways[way] for ways in found.values()) / len(found))

    known = accuracy(attack)
    wide = attack.replace(epsilon=max(1.0, 10 * attack.epsilon), step_size=None)
    least, most = known - 2 * SLACK, known - SLACK
    rows = [
        ("everything within reach", accuracy(wide), f"at most {LEFT:.0%}", lambda value: value <= LEFT),
        ("2.5 times the steps", accuracy(attack.replace(steps=round(2.5 * attack.steps), step_size=attack.stride)),
         f"at least {least:.1%}", lambda value: value >= least),
        ("three restarts", accuracy(attack, restarts=3), f"at least {least:.1%}", lambda value: value >= least),
        ("one step", accuracy(attack.replace(steps=1, step_size=attack.epsilon, random_start=False)),
         f"at least {most:.1%}", lambda value: value >= most),
        ("noise", accuracy(attack, "noise"), f"at least {most:.1%}", lambda value: value >= most),
    ]  # fmt: skip
    if source is not None:
        rows.append(
            ("attack made on the other model", accuracy(attack, source=source), f"at least {most:.1%}",
             lambda value: value >= most)
        )  # fmt: skip
    return [
        {"check": name, "accuracy": value, "rule": rule, "passed": passed(value)}
        for name, value, rule, passed in rows
    ]
