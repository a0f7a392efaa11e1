"""What goes wrong with routers while they train: dead experts, collapse, a load that narrows. Each is said once.

Only layers whose routers learn are watched: a load that a fixed rule gives is no accident. Null experts may stay
without tokens.

Shape legend: L sparse layers, E choices of a layer (the widest one's), K choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from moekit.config.moe import BalanceConfig
from moekit.config.train import TrainConfig
from moekit.layers.statistics import RoutingStats
from moekit.models.task_experts import Mixture
from moekit.observe.recorder import layers_of

DEAD_SHARE = 0.01  # of an even share, as in RoutingStats.dead_experts
NEW = 0.1  # weight of a step in the running load
LOW, HALF = 0.5, 0.5  # load entropy, and an expert's share of the choices, that are a collapse
FALL, BELOW = 0.2, 0.75  # a fall of load entropy within `dead_steps`, and where it must end, to be a trend
PARTS = 10  # of that stretch: how often the entropy is noted


@dataclass(frozen=True)
class Alarm:
    """What is wrong with a layer.

    Attributes: kind: "dead", "collapse" or "entropy". layer, name: which. experts: those meant. message: with remedy.
    """

    kind: str
    layer: int
    name: str
    experts: tuple[int, ...]
    message: str

    def values(self) -> dict[str, Any]:
        """A line of metrics."""
        return {"alarm": self.kind, "layer": self.layer, "layer_name": self.name,
                "experts": list(self.experts), "message": self.message}  # fmt: skip


class RoutingWatch:
    """Looks at the load of every step.

    dead: an expert has had less than 1% of an even share in each of the last `dead_steps` steps.
    collapse: for `collapse_steps` steps the load entropy was below 0.5 and not rising, or one expert had over half of
    the choices (of few experts: 1.8 times an even share). Where tokens choose several experts, 0 is the entropy of a
    layer in which all choose the same ones.
    entropy: load entropy fell by 0.2 within `dead_steps` steps, to below 0.75.

    Args:
        model: with sparse layers, or without.
        config: of training.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config, self.infos = config.alarms, layers_of(model)
        layers: Sequence[Any] = getattr(model, "moe_layers", [])
        moe = getattr(getattr(model, "config", None), "moe", None)
        self._remedies = [_remedy(layer, config, moe is not None) for layer in layers]
        learns = [any(p.requires_grad for p in layer.router.parameters()) for layer in layers]
        self._active = config.alarms is not None and any(learns)
        if not self._active:
            return
        n, widest = len(layers), max(info.n_experts for info in self.infos)
        self._real = np.zeros((n, widest), dtype=bool)
        for number, info in enumerate(self.infos):
            self._real[number, : info.n_experts - info.n_null_experts] = learns[number]
        self._n_real = self._real.sum(axis=1)
        self._idle = np.zeros((n, widest), dtype=np.int64)  # steps without tokens
        self._load = np.zeros((n, widest))  # running share of the choices
        self._slow = np.zeros(n)  # running load entropy
        self._low = np.zeros(n, dtype=np.int64)  # steps of what looks like a collapse
        self._past: list[list[float]] = []
        self._said: set[tuple[str, int, int]] = set()
        self._n_steps = 0

    def step(self, stats: Sequence[RoutingStats]) -> list[Alarm]:
        """What is new after a step with these choices."""
        if not self._active or len(stats) != len(self.infos) or self.config is None:
            return []
        counts = np.zeros(self._real.shape)
        n_tokens = np.zeros(len(stats))
        for number, layer in enumerate(stats):
            counts[number, : len(layer.requested_per_expert)] = layer.requested_per_expert.cpu().numpy()
            n_tokens[number] = float(layer.n_tokens)
        counts *= self._real
        total = counts.sum(axis=1)
        even = total / np.maximum(self._n_real, 1)
        used = counts >= np.maximum(DEAD_SHARE * even, 1e-9)[:, None]
        self._idle = np.where(used | ~self._real, 0, self._idle + 1)
        share = counts / np.maximum(total, 1)[:, None]
        self._load = share if self._n_steps == 0 else (1 - NEW) * self._load + NEW * share
        entropy = self._entropy(total / np.maximum(n_tokens, 1))
        self._slow = entropy if self._n_steps == 0 else self._slow + NEW / 5 * (entropy - self._slow)
        most = self._load.max(axis=1)
        low = ((entropy < LOW) & (entropy < self._slow + 0.01)) | (most > self._half())
        self._low = np.where(low & (self._n_real > 1), self._low + 1, 0)
        self._n_steps += 1
        found = [*self._dead(), *self._collapsed(entropy)]
        if self._n_steps % max(self.config.dead_steps // PARTS, 1) == 0:
            self._past = [*self._past, entropy.tolist()][-PARTS - 1 :]
            found += self._falling(entropy)
        return found

    def _entropy(self, k: np.ndarray) -> np.ndarray:
        """`[L]` load entropy: 1 where all experts have as much, 0 where K of them have everything."""
        spread = -(self._load * np.log(np.maximum(self._load, 1e-300))).sum(axis=1)
        n = np.maximum(self._n_real, 1)
        floor, top = np.log(np.clip(k, 1, n)), np.log(n)
        # with nearly as many choices as experts there is nothing to collapse
        room = np.where(top - floor > 0.1, top - floor, 1.0)
        return np.asarray(np.where(top - floor > 0.1, (spread - floor) / room, 1.0))

    def _half(self) -> np.ndarray:
        return np.maximum(HALF, 1.8 / np.maximum(self._n_real, 1))

    def _dead(self) -> list[Alarm]:
        assert self.config is not None
        found = []
        for number in np.flatnonzero((self._idle >= self.config.dead_steps).any(axis=1)).tolist():
            dead = np.flatnonzero(self._idle[number] >= self.config.dead_steps).tolist()
            new = [expert for expert in dead if self._first("dead", number, expert)]
            if new:
                names = [self.infos[number].label(expert) for expert in new]
                several = "s" if len(new) > 1 else ""
                what = f"expert{several} {', '.join(names)} {'are' if several else 'is'} dead: under 1% of an even " \
                       f"share in each of {self.config.dead_steps} steps"  # fmt: skip
                found.append(self._alarm("dead", number, new, what))
        return found

    def _collapsed(self, entropy: np.ndarray) -> list[Alarm]:
        assert self.config is not None
        found = []
        for number in np.flatnonzero(self._low >= self.config.collapse_steps).tolist():
            if self._first("collapse", number):
                expert = int(self._load[number].argmax())
                what = f"collapses: expert {self.infos[number].label(expert)} has {self._load[number, expert]:.0%} " \
                       f"of the choices, load entropy {entropy[number]:.2f}"  # fmt: skip
                found.append(self._alarm("collapse", number, [expert], what))
        return found

    def _falling(self, entropy: np.ndarray) -> list[Alarm]:
        assert self.config is not None
        found = []
        if len(self._past) <= PARTS:
            return []
        fell = np.array(self._past[0]) - entropy
        for number in np.flatnonzero((fell >= FALL) & (entropy < BELOW)).tolist():
            if ("collapse", number, -1) not in self._said and self._first("entropy", number):
                expert = int(self._load[number].argmax())
                what = f"load entropy fell from {self._past[0][number]:.2f} to {entropy[number]:.2f} in " \
                       f"{self.config.dead_steps} steps; expert {self.infos[number].label(expert)} has most " \
                       f"({self._load[number, expert]:.0%} of the choices)"  # fmt: skip
                found.append(self._alarm("entropy", number, [expert], what))
        return found

    def _first(self, kind: str, layer: int, expert: int = -1) -> bool:
        key = (kind, layer, expert)
        new = key not in self._said
        self._said.add(key)
        return new

    def _alarm(self, kind: str, number: int, experts: Sequence[int], what: str) -> Alarm:
        name = self.infos[number].name
        joint = " " if kind == "collapse" else ": "
        message = f"layer {number} ({name}){joint}{what}. {self._remedies[number]}"
        return Alarm(kind, number, name, tuple(experts), message)

    def take_over(self, before: RoutingWatch) -> None:
        """Go on with what was seen of the layers that still have as many experts; the others begin anew."""
        if not self._active or not before._active or len(self.infos) != len(before.infos):
            return
        self._n_steps, self._past, self._slow = before._n_steps, before._past, before._slow.copy()
        self._load = self._real / np.maximum(self._n_real, 1)[:, None]
        for number, (info, old) in enumerate(zip(self.infos, before.infos, strict=True)):
            if info.n_experts == old.n_experts:
                n = info.n_experts
                self._idle[number, :n], self._load[number, :n] = (
                    before._idle[number, :n],
                    before._load[number, :n],
                )
                self._low[number] = before._low[number]
                self._said |= {key for key in before._said if key[1] == number}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        if not self._active:
            return {}
        return {
            "steps": self._n_steps, "idle": self._idle.tolist(), "load": self._load.tolist(),
            "slow": self._slow.tolist(), "low": self._low.tolist(), "past": self._past,
            "said": sorted(list(key) for key in self._said),
        }  # fmt: skip

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; one of a run without alarms begins anew."""
        if not self._active or not state or np.shape(state["idle"]) != self._idle.shape:
            return
        self._n_steps, self._past = state["steps"], [list(row) for row in state["past"]]
        self._idle, self._load = np.array(state["idle"], dtype=np.int64), np.array(state["load"])
        self._slow, self._low = np.array(state["slow"]), np.array(state["low"], dtype=np.int64)
        self._said = {(kind, layer, expert) for kind, layer, expert in state["said"]}


def _remedy(layer: Any, config: TrainConfig, has_moe: bool) -> str:
    """Which key to change, with the value that it has now."""
    balance: BalanceConfig = layer.config.balance
    key = "model.task_experts.balance" if isinstance(layer, Mixture) and not has_moe else "model.moe.balance"
    if balance.load_balance == balance.bias_update_rate == balance.importance == balance.load == 0:
        return f"Nothing balances this layer: set {key}.load_balance=0.01"
    slower = f"or lower train.optimizer.router_lr_scale ({config.optimizer.router_lr_scale:g} now)"
    for name in ("bias_update_rate", "load_balance", "importance", "load"):
        value = getattr(balance, name)
        if value > 0 and math.isfinite(value):
            return f"Raise {key}.{name} ({value:g} now), {slower}"
    return slower.removeprefix("or ").capitalize()
