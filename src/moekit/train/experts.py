"""Experts that come and go while a model trains: when a layer is reshaped, and the optimizer with it.

    after each step ─► note the load ─► every `every` steps: revive or drop, split, grow, shrink
                                              └► new layer (models.reshape_experts) ─► new optimizer, moments copied

What is decided depends on the routing and the seed alone and is noted in the checkpoint, so a resumed run decides the
same. Between two looks nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moekit.config.elastic import DynamicExpertsConfig
from moekit.config.errors import require
from moekit.layers.routing import LearnedRouter
from moekit.layers.statistics import RoutingStats
from moekit.models.language_model import LanguageModel
from moekit.models.reshape_experts import Reshape, reshape_layer, shaped_like

_BYTES = 16  # of a parameter in training: weight, gradient and two moments, each float32


class DynamicExperts:
    """Decides and carries out the changes of `train.experts`.

    Args:
        model: a decoder whose sparse layers have `families: true`; changed in place.
        config: what to do when.
        n_steps: of the whole run.
        seed: of the perturbations.
        most_k: the most experts that a token may take in training, where that is more than `top_k`.

    Errors: `ConfigError` where the model's layers cannot change.
    """

    def __init__(
        self, model: nn.Module, config: DynamicExpertsConfig, n_steps: int, seed: int, most_k: int = 1
    ) -> None:
        require(isinstance(model, LanguageModel) and model.moe_layers, "train.experts", "set",
                "must be null but for a sparse decoder")  # fmt: skip
        assert isinstance(model, LanguageModel)
        self.model, self.config, self.n_steps, self.seed = model, config, n_steps, seed
        self.most_k = most_k
        self.layers = model.config.moe_layers
        for layer in model.moe_layers:
            require(layer.config.families, "model.moe.families", False, "must be true with train.experts",
                    "Set model.moe.families: true")  # fmt: skip
            require(isinstance(layer.router, LearnedRouter), "moe.router", layer.router.name,
                    "must be softmax or sigmoid with train.experts")  # fmt: skip
            require(config.grow_to is None or config.grow_to >= layer.config.n_experts, "train.experts.grow_to",
                    config.grow_to, f"must be at least n_experts ({layer.config.n_experts})")  # fmt: skip
        self.grown = False
        self.over_budget = False  # and nothing can be dropped any more: said once
        self._counts = [[0] * layer.config.n_experts for layer in model.moe_layers]
        self._idle = [[0] * layer.config.n_experts for layer in model.moe_layers]
        self._losses: list[float] = []

    def after_step(
        self, step: int, stats: Sequence[RoutingStats], loss: float
    ) -> tuple[list[str], dict[str, Any]]:
        """Note a finished step; what changed, in words, and how the optimizer's moments of each parameter follow."""
        for number, layer in enumerate(stats):
            taken = layer.requested_per_expert.tolist()
            least = self.config.dead_share * sum(taken) / max(len(taken), 1)
            for expert, n in enumerate(taken):
                self._counts[number][expert] += n
                self._idle[number][expert] = 0 if n > least else self._idle[number][expert] + 1
        self._losses = [*self._losses, loss][-2 * self.config.stall_steps :]
        said: list[str] = []
        moments: dict[str, Any] = {}
        due = step % self.config.every == 0
        growing = self._grows(step)
        for number in range(len(self.layers)):
            if due:
                self._dead(number, step, said, moments)
            if growing:
                self._grow(number, step, said, moments)
            elif due:
                self._split(number, step, said, moments)
        if due or growing:
            self._shrink(step, said, moments)
        if due:
            self._counts = [[0] * len(counts) for counts in self._counts]
        self.grown = self.grown or growing
        return said, moments

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to decide the same, as JSON."""
        return {"n_experts": self.n_experts(), "grown": self.grown, "over_budget": self.over_budget,
                "counts": self._counts, "idle": self._idle, "losses": self._losses}  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave; the model gets its layers' sizes, their weights are loaded afterwards."""
        shaped_like(self.model, experts_of(state))
        self.grown, self._losses = state["grown"], list(state["losses"])
        self.over_budget = state["over_budget"]
        self._counts = [list(counts) for counts in state["counts"]]
        self._idle = [list(idle) for idle in state["idle"]]

    def n_experts(self) -> dict[str, int]:
        """Experts of each sparse layer, by its number as text, as JSON has it."""
        sparse = zip(self.layers, self.model.moe_layers, strict=True)
        return {str(index): layer.config.n_experts for index, layer in sparse}

    def _grows(self, step: int) -> bool:
        config = self.config
        if self.grown or config.grow_to is None:
            return False
        if config.at is not None and step >= config.at * self.n_steps:
            return True
        n = config.stall_steps
        if config.stall_below is None or len(self._losses) < 2 * n:
            return False
        return sum(self._losses[:n]) / n - sum(self._losses[n:]) / n < config.stall_below

    def _grow(self, number: int, step: int, said: list[str], moments: dict[str, Any]) -> None:
        """Split the most loaded experts, and their halves again, until there are `grow_to`."""
        assert self.config.grow_to is not None
        n, before = len(self._counts[number]), len(self._counts[number])
        while n < self.config.grow_to:
            chosen = self._by_load(number)[: self.config.grow_to - n]
            self._reshape(number, Reshape.split(range(n), self._families(number), chosen), step, moments)
            n = len(self._counts[number])
        if n > before:
            said.append(f"layer {self.layers[number]}: {before} experts became {n}")

    def _split(self, number: int, step: int, said: list[str], moments: dict[str, Any]) -> None:
        config, counts = self.config, self._counts[number]
        if config.split_above is None or config.grow_to is None:
            return
        mean = sum(counts) / len(counts)
        over = [expert for expert in self._by_load(number) if counts[expert] > config.split_above * mean]
        chosen = over[: max(config.grow_to - len(counts), 0)]
        if chosen:
            reshape = Reshape.split(range(len(counts)), self._families(number), chosen)
            self._reshape(number, reshape, step, moments)
            said.append(f"layer {self.layers[number]}: split expert {', '.join(map(str, chosen))}")

    def _dead(self, number: int, step: int, said: list[str], moments: dict[str, Any]) -> None:
        after = self.config.revive_after or self.config.drop_after
        if after is None:
            return
        dead = [expert for expert, idle in enumerate(self._idle[number]) if idle >= after]
        if self.config.revive_after is not None:
            for expert in dead:
                source = self._by_load(number)[0]
                revived = Reshape.revive(self._families(number), expert, source)
                # one that was revived just now has a share of the load and may be copied again
                if self._idle[number][source] >= after or len(set(revived.families)) < self._least(number):
                    continue
                self._reshape(number, revived, step, moments)
                said.append(f"layer {self.layers[number]}: dead expert {expert} became a copy of {source}")
        elif dead:
            self._drop(number, dead, step, said, moments)

    def _shrink(self, step: int, said: list[str], moments: dict[str, Any]) -> None:
        """Drop the least loaded expert of all layers again and again until the state of training fits."""
        budget = self.config.memory_bytes
        if budget is None or self.over_budget:
            return
        while _BYTES * sum(p.numel() for p in self.model.parameters()) > budget:
            shares = []
            for number, counts in enumerate(self._counts):
                total = max(sum(counts), 1)
                shares += [(n * len(counts) / total, number, expert) for expert, n in enumerate(counts)]
            if not any(
                self._drop(number, [expert], step, said, moments) for _, number, expert in sorted(shares)
            ):
                said.append(
                    "no expert can be dropped any more, and the model is over train.experts.memory_bytes"
                )
                self.over_budget = True
                return

    def _drop(
        self, number: int, experts: Sequence[int], step: int, said: list[str], moments: dict[str, Any]
    ) -> bool:
        """Drop as many of `experts`, first ones first, as leave the families that are needed."""
        families = self._families(number)
        kept = list(range(len(families)))
        for expert in experts:
            rest = [other for other in kept if other != expert]
            if len({families[other] for other in rest}) >= self._least(number):
                kept = rest
        if len(kept) == len(families):
            return False
        self._reshape(number, Reshape.keep(families, kept), step, moments)
        said.append(
            f"layer {self.layers[number]}: dropped {len(families) - len(kept)} experts, {len(kept)} stay"
        )
        return True

    def _reshape(self, number: int, reshape: Reshape, step: int, moments: dict[str, Any]) -> None:
        layer = self.layers[number]
        seed = (self.seed, step, layer)
        for name, change in reshape_layer(self.model, layer, reshape, self.config.perturbation, seed).items():
            moments.setdefault(name, []).append(change)
        copies = [reshape.sources.count(source) for source in reshape.sources]
        counts, idle = self._counts[number], self._idle[number]
        self._counts[number] = [counts[s] // n for s, n in zip(reshape.sources, copies, strict=True)]
        self._idle[number] = [0 if n > 1 else idle[s] for s, n in zip(reshape.sources, copies, strict=True)]

    def _by_load(self, number: int) -> list[int]:
        """Experts of a layer, the most loaded first."""
        counts = self._counts[number]
        return sorted(range(len(counts)), key=lambda expert: -counts[expert])

    def _families(self, number: int) -> list[int]:
        family = self.model.moe_layers[number].router.family
        assert family is not None
        return [int(value) for value in family.tolist()]

    def _least(self, number: int) -> int:
        """Families that a layer must keep: a token takes one expert of each."""
        return max(self.model.moe_layers[number].config.top_k, self.most_k)


def experts_of(state: Mapping[str, Any]) -> dict[int, int]:
    """Experts of each sparse layer by its number, from what `DynamicExperts.state` gave."""
    return {int(layer): n for layer, n in state["n_experts"].items()}


def follow(tensors: Mapping[str, Tensor], moments: Mapping[str, Any]) -> dict[str, Tensor]:
    """An optimizer's tensors by name, those of changed parameters picked as the parameters were; counters stay."""
    found = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        changed = tensor
        for change in moments.get(name, ()) if key != "step" else ():
            changed = change(changed)
        found[full] = changed.clone()
    return found
