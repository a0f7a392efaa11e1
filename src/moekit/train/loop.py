"""The training loop: micro-batches into one optimizer step, guarded, logged and resumable at any micro-batch.

    next_batch ─► split ─► forward ─► loss + weighted aux ─► backward ─┐ x accumulation
         ▲                                                            ▼
    after_step (router bias) ◄─ optimizer.step ◄─ finite? clip ◄─ gradients

Everything that a resumed run needs to go on bit for bit is in `tensors()` and `state()`: weights, optimizer,
random generators, data position, gradients and routing counts of a step that is half done, recurrent memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.backbone import BackboneConfig
from moekit.config.errors import CheckpointError, ConfigError, NonFiniteError
from moekit.config.moe import BalanceConfig
from moekit.config.sparse import SparseLayers
from moekit.config.task import TaskModelConfig
from moekit.config.train import TrainConfig
from moekit.data.loader import Batch, TrainLoader
from moekit.data.task_loader import TaskBatch, TaskLoader
from moekit.layers.balancing import weighted_aux_loss
from moekit.layers.elastic import Elastic
from moekit.layers.moe import MoE
from moekit.layers.statistics import RoutingStats, add_stats, routing_stats
from moekit.models.task_experts import Mixture
from moekit.train.adversarial import Adversarial, Learnt
from moekit.train.device import autocast, resolve_device, resolve_dtype
from moekit.train.distill import Distillation
from moekit.train.elastic import drawn, require_elastic
from moekit.train.experts import DynamicExperts, experts_of, follow
from moekit.train.memory import keep_freed_memory
from moekit.train.optimizer import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from moekit.train.schedules import learning_rate_scale

Metrics = dict[str, Any]
AnyBatch = Batch | TaskBatch
AnyLoader = TrainLoader | TaskLoader


class Trainer:
    """Trains one model on one loader; knows nothing of folders or screens.

    Args:
        model: a language model or a task's model of `moekit.models`; moved to the device of `config`.
        config: the training configuration.
        loader: where batches come from.
        should_stop: asked before every micro-batch; True ends `steps()` with the state ready to be saved.
        distillation: a teacher whose answers are learnt as well; part of no checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        loader: AnyLoader,
        should_stop: Callable[[], bool] = lambda: False,
        distillation: Distillation | None = None,
    ) -> None:
        _refuse_quantized(model)
        self.config, self.loader, self.should_stop = config, loader, should_stop
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = model.to(self.device)
        # a language model carries memory and is asked for logits only where somebody reads them
        self.is_language = isinstance(loader, TrainLoader)
        self.distillation = None if distillation is None else distillation.to(self.device)
        # the decoder's layers lie in its backbone, Transformer-XL has its own
        recomputing: Any = getattr(model, "backbone", model)
        recomputing.recompute = config.recompute
        if config.elastic is not None:
            require_elastic(config.elastic, self.moe_layers)
        self.experts = None
        if config.experts is not None:
            most_k = 1 if config.elastic is None else max(config.elastic.k, default=1)
            self.experts = DynamicExperts(model, config.experts, config.steps, config.seed, most_k)
        self.balance = _balance_of(model)
        self.adversarial = None
        if config.adversarial is not None:
            self.adversarial = Adversarial(model, config, loader, self.balance)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.step, self.micro, self.tokens, self.seconds = 0, 0, 0, 0.0
        self._batch_start = loader.state_dict()
        self._memory: list[Any] = [None] * config.accumulation
        self._stats: list[RoutingStats] | None = None
        self._asked: list[list[Tensor]] = []  # of each micro-batch of this step, where they differ in setting
        self.last_stats: list[RoutingStats] = []  # of the step that was finished last
        self.reshaped = False  # whether its end brought other experts
        self._losses: list[float] = []  # of the micro-batches of this step, weighted by their targets
        self._aux: list[dict[str, float]] = []

    @property
    def moe_layers(self) -> list[MoE | Mixture]:
        """The sparse layers of the model."""
        return getattr(self.model, "moe_layers", [])

    def steps(self) -> Iterator[Metrics]:
        """Train until `config.steps` or until told to stop; yields the metrics of each finished step."""
        self.model.train()
        while self.step < self.config.steps and not self.should_stop():
            began, share = time.perf_counter(), 1 - self.micro / self.config.accumulation
            finished = self._one_step()
            elapsed = time.perf_counter() - began
            self.seconds += elapsed
            if finished is None:
                return
            # of a step that was begun before an interruption, only the rest was timed
            finished["tokens_per_second"] = share * self.loader.tokens_per_batch / elapsed
            finished["seconds"] = self.seconds
            yield finished

    def _one_step(self) -> Metrics | None:
        """The rest of the current optimizer step; None where it was interrupted between micro-batches."""
        if self.micro > 0:
            self.loader.load_state_dict(self._batch_start)  # the same batch again
        else:
            self._batch_start = self.loader.state_dict()
        batch = self.loader.next_batch().to(self.device)
        n_targets = max(batch.n_targets, 1)
        parts = batch.split(self.config.accumulation)
        while self.micro < len(parts):
            self._micro_step(parts[self.micro], n_targets)
            self.micro += 1
            if self.micro < len(parts) and self.should_stop():
                return None
        return self._finish_step(batch)

    def _micro_step(self, batch: AnyBatch, n_targets: int) -> None:
        kwargs: dict[str, Any] = {}
        earlier = self._earlier_counts()
        if earlier:
            kwargs["earlier_counts"] = earlier
        if self.config.elastic is not None:
            kwargs["elastic"] = self._drawn(self.micro)
        attack, attacked = self.adversarial, None
        with autocast(self.device, self.dtype):
            if self.is_language:
                wanted = self.distillation is not None or (attack is not None and attack.reads_logits)
                kwargs |= {"memory": self._memory[self.micro], "return_logits": wanted}
            arguments = {**batch.arguments(), **kwargs}
            if attack is not None:
                moved = attack.moved(self.model, arguments, self.step, self.micro)
            out = self.model(**arguments)
            if attack is not None:
                attacked = self.model(**moved)
            matched = None
            if self.distillation is not None and isinstance(batch, Batch):
                matched = self.distillation.loss(batch, out.logits)
        # means over the whole batch: the loss counts by targets, the auxiliary losses by tokens (equally many in each)
        share, aux_share = out.n_targets / n_targets, 1 / self.config.accumulation
        task_loss = out.loss
        if self.distillation is not None and matched is not None:
            task_loss = self.distillation.mixed(out.loss, matched)
        loss = task_loss * share + weighted_aux_loss(out.aux_losses, self.balance) * aux_share
        learnt: Learnt = [(loss, None)] if attack is None else []
        more: dict[str, float] = {}
        if attack is not None and attacked is not None:
            learnt, more = attack.learnt(self.model, loss, out, attacked, batch, share, aux_share, self.step)
        self._require_finite(
            sum(float(one.detach()) for one, _ in learnt), f"loss of micro-batch {self.micro + 1}"
        )
        for number, (one, parameters) in enumerate(learnt, start=1):
            one.backward(inputs=parameters, retain_graph=number < len(learnt))
        if self.is_language:
            # rows of "shuffled" sequences do not go on in the next batch: what went before is another text
            goes_on = isinstance(self.loader, TrainLoader) and self.loader.order == "streams"
            self._memory[self.micro] = out.memory if goes_on else None
        self._losses.append(float(out.loss.detach()) * share)
        self._aux.append({name: float(value.detach()) * aux_share for name, value in out.aux_losses.items()})
        self._aux[-1] |= more
        if matched is not None:
            self._aux[-1]["distillation"] = float(matched.detach()) * share
        if out.routing:
            found = routing_stats(out.routing)
            self._stats = add_stats(self._stats, found)
            if self.config.elastic is not None:
                self._asked.append([stats.requested_per_expert for stats in found])

    def _drawn(self, micro: int) -> Elastic:
        assert self.config.elastic is not None
        return drawn(self.config.elastic, self.config.seed, self.step, micro)

    def _earlier_counts(self) -> list[Tensor] | None:
        """Choices of the experts of each layer in this step so far; only those made at the setting of the next.

        Choices among fewer experts would make the loss call the closed ones underused, and pull tokens to them.
        """
        if self.config.elastic is None:
            return [stats.requested_per_expert for stats in self._stats] if self._stats else None
        here = self._drawn(self.micro)
        same = [asked for micro, asked in enumerate(self._asked) if self._drawn(micro) == here]
        return [torch.stack(layer).sum(dim=0) for layer in zip(*same, strict=True)] or None

    def _finish_step(self, batch: AnyBatch) -> Metrics:
        norm = float(clip_gradients(self.optimizer, self.config.gradient_clip))
        self._require_finite(norm, "gradient norm")
        scale = learning_rate_scale(self.step, self.config.steps, self.config.schedule)
        set_learning_rate(self.optimizer, self.config.optimizer.lr * scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for layer, stats in zip(self.moe_layers, self._stats or [], strict=False):
            layer.router.after_step(stats, scale)
        self.step += 1
        self.tokens += batch.n_tokens
        metrics: Metrics = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": sum(self._losses),
            "gradient_norm": norm,
            "lr": self.config.optimizer.lr * scale,
        }
        for name in self._aux[0]:
            metrics[f"aux/{name}"] = sum(aux[name] for aux in self._aux)
        if self._stats:
            metrics |= balance_metrics(self._stats)
        self.last_stats = self._stats or []
        if self.experts is not None:
            # by name, while the names are those of the optimizer
            before = optimizer_tensors(self.optimizer, self.model)
            said, moments = self.experts.after_step(self.step, self._stats or [], metrics["loss"])
            self.reshaped = bool(moments)
            if moments:
                self._renew_optimizer(follow(before, moments))
            if said:
                metrics["experts"] = said
        self.micro, self._stats, self._asked, self._losses, self._aux = 0, None, [], [], []
        return metrics

    def _renew_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """An optimizer of the parameters that the model has now, with the moments of those that they came from."""
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        load_optimizer_tensors(self.optimizer, self.model, tensors)

    def _require_finite(self, value: float, what: str) -> None:
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteError(
                f"{what} became {value} in step {self.step + 1}; the optimizer was not stepped and the last "
                "checkpoint is unchanged. Lower train.optimizer.lr, lengthen "
                "train.schedule.warmup_steps, or set train.precision: float32, then resume"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run's state, by name; references, not copies."""
        named = {
            f"model.{name}": tensor
            for name, tensor in unique_tensors(self.model.state_dict(keep_vars=True)).items()
        }
        named |= {
            f"optimizer.{name}": tensor
            for name, tensor in optimizer_tensors(self.optimizer, self.model).items()
        }
        named["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            named["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for index, memory in enumerate(self._memory):
            for name, tensor in (memory or {}).items():
                named[f"memory.{index}.{name}"] = tensor
        if self.micro > 0:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    named[f"gradient.{name}"] = parameter.grad
            for index, stats in enumerate(self._stats or []):
                for name, tensor in vars(stats).items():
                    named[f"routing.{index}.{name}"] = tensor
            for micro, asked in enumerate(self._asked):
                named |= {f"asked.{micro}.{index}": counts for index, counts in enumerate(asked)}
        return {name: tensor.detach() for name, tensor in named.items()}

    def state(self) -> dict[str, Any]:
        """Everything else that a resumed run needs, as JSON."""
        return {
            "step": self.step,
            "micro": self.micro,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": self._batch_start if self.micro > 0 else self.loader.state_dict(),
            "layout": self._layout(),
            "losses": self._losses,
            "aux": self._aux,
            **({"experts": self.experts.state()} if self.experts is not None else {}),
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take over what `tensors` and `state` gave; the next step continues as if nothing had happened.

        Errors: `CheckpointError` where a tensor is missing, unknown or of another shape, or where the place in the
        data means nothing here (other batches, another order).
        """
        has_memory = any(name.startswith("memory.") for name in tensors)
        self._require_same_layout(state, bound=state["micro"] > 0 or has_memory)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        if self.experts is None:
            self._require_same_experts(state.get("experts"))
        elif "experts" in state:
            self.experts.load(state["experts"])
            self.optimizer = build_optimizer(self.model, self.config.optimizer)
        load_model_tensors(self.model, groups.get("model", {}))
        load_optimizer_tensors(self.optimizer, self.model, groups.get("optimizer", {}))
        torch.set_rng_state(groups["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in groups["rng"]:
            torch.cuda.set_rng_state(groups["rng"]["cuda"], self.device)
        self.step, self.micro, self.tokens = state["step"], state["micro"], state["tokens"]
        self.seconds = state["seconds"]
        self.loader.load_state_dict(state["data"])
        self._batch_start = dict(state["data"])
        self._losses, self._aux = list(state["losses"]), [dict(aux) for aux in state["aux"]]
        memory = _nested(groups.get("memory", {}), self.device)
        self._memory = [memory.get(index) for index in range(self.config.accumulation)]
        routing = _nested(groups.get("routing", {}), self.device)
        self._stats = [RoutingStats(**routing[index]) for index in sorted(routing)] or None
        asked = _nested(groups.get("asked", {}), self.device)
        self._asked = [[asked[micro][str(n)] for n in range(len(asked[micro]))] for micro in sorted(asked)]
        self.optimizer.zero_grad(set_to_none=True)  # of a step that was begun here, or was not finite
        parameters = dict(self.model.named_parameters())
        for name, gradient in groups.get("gradient", {}).items():
            parameters[name].grad = gradient.to(self.device).clone()

    def _require_same_experts(self, state: Mapping[str, Any] | None) -> None:
        """Raise `CheckpointError` where layers have had experts added or dropped, which `train.experts` alone knows."""
        config = getattr(self.model, "config", None)
        if state is None or not isinstance(config, SparseLayers):
            return
        for layer, n in experts_of(state).items():
            moe = config.moe_of(layer)
            if moe is not None and moe.n_experts != n:
                raise CheckpointError(
                    f"train.experts must be set to go on: layer {layer} has {n} experts in the checkpoint, "
                    f"{moe.n_experts} by the configuration. To change no more of them: train.experts={{}}"
                )

    def _layout(self) -> dict[str, Any]:
        """What the place in the data, the memory and a half-done step are bound to, by configuration key."""
        return {**self.loader.layout(), "train.accumulation": self.config.accumulation}

    def _require_same_layout(self, state: Mapping[str, Any], bound: bool) -> None:
        """`bound`: the state holds gradients or memory of micro-batches, whose number may not change then."""
        here = self._layout()
        # a checkpoint that says nothing of domains is older than the choice of them
        before = {"data.domains": None, **state["layout"]} if "data.domains" in here else state["layout"]
        for key, value in before.items():
            if here[key] != value and (bound or key != "train.accumulation"):
                raise CheckpointError(
                    f"{key} must be {_yaml(value)} as when the checkpoint was saved; got {_yaml(here[key])}. Its place "
                    f"in the data means nothing otherwise: resume with {key}={_yaml(value)}, or start a new run"
                )


def _yaml(value: Any) -> str:
    """A value as an override spells it."""
    return json.dumps(value).replace('"', "")


def balance_metrics(stats: list[RoutingStats]) -> Metrics:
    """What is logged of the routing: the worst layer's balance, each layer's, and the load averaged over layers.

    Layers with different numbers of experts have no expert in common: no load is logged of them.
    """
    loads = [layer.load() for layer in stats]
    equal = len({len(load) for load in loads}) == 1
    return {
        "max_violation": max(layer.max_violation() for layer in stats),
        "dropped_share": sum(layer.dropped_share() for layer in stats) / len(stats),
        "mean_active_experts": sum(layer.mean_active_experts() for layer in stats) / len(stats),
        **({"load": torch.stack(loads).mean(dim=0).tolist()} if equal else {}),
        "by_layer": {
            "load_entropy": [round(layer.load_entropy(), 5) for layer in stats],
            "max_violation": [round(layer.max_violation(), 5) for layer in stats],
            "dead_experts": [layer.dead_experts() for layer in stats],
        },
    }


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into a model; every tensor must be there, of the right shape, and known.

    Errors: `CheckpointError` naming what is missing, unknown or misshapen.
    """
    own = unique_tensors(model.state_dict(keep_vars=True))
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unknown or shapes:
        raise CheckpointError(
            f"the weights do not fit the model: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"of another shape {sorted(shapes)[:3]}. Build the model from the run's own config.yaml"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def unique_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once: tied weights keep their first name."""
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def _nested(named: Mapping[str, Tensor], device: torch.device) -> dict[int, dict[str, Tensor]]:
    """{"0.name": tensor} to {0: {"name": tensor}}."""
    nested: dict[int, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        index, _, rest = name.partition(".")
        nested.setdefault(int(index), {})[rest] = tensor.to(device)
    return nested


def _refuse_quantized(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if isinstance(config, BackboneConfig) and config.is_quantized:
        raise ConfigError(
            "model.moe.quantization and model.linear_quantization must be null to train: 8 and 4 bit weights have no "
            "gradient. Train the model that was quantised, then quantise it again: moekit compress quantize"
        )


def _balance_of(model: nn.Module) -> BalanceConfig:
    config = getattr(model, "config", None)
    if isinstance(config, TaskModelConfig):
        return config.balance
    if isinstance(config, SparseLayers) and config.moe is not None:
        return config.moe.balance
    return BalanceConfig()
