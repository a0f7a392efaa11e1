"""Training against attacks: every micro-batch is moved against the model of now, and both are learnt.

    attack (evaluation mode, gradients of inputs alone) ─► given pass ─► moved pass ─► losses ─► what they may reach

What it is made of: attacks and mixed loss of Madry et al. 2018 (arXiv:1706.06083) and Goodfellow et al. 2015
(arXiv:1412.6572); TRADES of Zhang et al. 2019 (arXiv:1901.08573), whose attack is made in evaluation mode as here, so
that no batch statistic is one of inputs that nobody learns from; perturbed embeddings of Miyato et al. 2017
(arXiv:1605.07725) and Zhu et al. 2020 (FreeLB, arXiv:1909.11764); routers and the rest by turns of Zhang et al. 2023
(AdvMoE, arXiv:2308.10110).

Cost of a step with n steps of attack: two forward and backward passes, n forward passes, and n backward passes that
compute no gradient of a weight. A start is drawn from the run's seed, the step and the micro-batch alone, so that a
resumed run makes the attacks that it would have made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError
from moekit.config.moe import BalanceConfig
from moekit.config.train import TrainConfig
from moekit.data.loader import Batch, TrainLoader
from moekit.data.task_loader import TaskBatch, TaskLoader
from moekit.layers.balancing import weighted_aux_loss
from moekit.models.task_heads import IGNORED, ClassifyHead, TagHead
from moekit.models.task_model import TaskModel
from moekit.train.attack import (
    Changes,
    ascend,
    continuous_inputs,
    draws,
    moved,
    places_of,
    require_attackable,
    routing_divergence,
    under_attack,
)
from moekit.train.optimizer import parameter_groups

# what a backward pass is of, and which parameters it may reach; None for all
Learnt = list[tuple[Tensor, list[nn.Parameter] | None]]


class Adversarial:
    """The attack of `train.adversarial` on the model that is trained, and what is learnt of it.

    Args:
        model: of the run.
        config: of training; its `adversarial` is set.
        loader: of the run, whose inputs say what can be moved.
        balance: weights of auxiliary losses.

    Errors: `ConfigError` for what cannot be attacked, or has no routers to train.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, loader: TrainLoader | TaskLoader, balance: BalanceConfig
    ) -> None:
        assert config.adversarial is not None
        self.config, self.seed, self.balance = config.adversarial, config.seed, balance
        self.continuous = {}
        if isinstance(loader, TaskLoader):
            self.continuous = continuous_inputs(loader.data.inputs, self.config)
        self.reads_logits = self.config.loss == "trades"
        try:
            require_attackable(model, self.config, self.continuous)
        except ConfigError as error:
            raise ConfigError(f"train.adversarial.{error}") from None
        if self.config.target != "all" and not routers_of(model):
            raise ConfigError(
                f"train.adversarial.target must be all without routers that learn; got {self.config.target!r}. Set "
                "model.moe, and a router with weights that are trained"
            )
        if self.config.stability and not getattr(model, "moe_layers", ()):
            raise ConfigError("train.adversarial.stability must be 0 for a model without sparse layers")
        if self.config.loss == "trades":
            _require_classes(model)

    def moved(self, model: nn.Module, arguments: Mapping[str, Any], step: int, micro: int) -> dict[str, Any]:
        """The arguments of a call with its inputs moved against the model."""
        config = self.config.at(step)
        places = places_of(model, arguments, config, self.continuous)
        generator = draws(self.seed, step, micro)
        with under_attack(model):
            with torch.no_grad():
                compares = config.loss == "trades" or config.objective == "routing"
                before = model(**arguments) if compares else None

            def objective(changes: Changes) -> Tensor:
                out = model(**moved(arguments, places, changes))
                if config.objective == "routing":
                    return routing_divergence(before.routing, out.routing)  # type: ignore[union-attr]
                if config.loss == "trades":
                    return answer_divergence(model, before, out, arguments["targets"])
                loss: Tensor = out.loss
                return loss

            changes = ascend(objective, places, config, generator)
        return moved(arguments, places, changes)

    def learnt(
        self, model: nn.Module, given: Tensor, out: Any, attacked: Any, batch: Batch | TaskBatch, share: float,
        aux_share: float, step: int,
    ) -> tuple[Learnt, dict[str, float]]:  # fmt: skip
        """What the micro-batch teaches, and what is to be logged.

        Args:
            model: of the run.
            given: its loss without attack, weighted.
            out, attacked: what the model said to the given and to the moved input.
            batch: for its targets.
            share, aux_share: of the micro-batch in the step, of losses and of auxiliary losses.
            step: steps done.
        """
        config = self.config
        said = {"adversarial_loss": float(attacked.loss.detach()) * share}
        if config.loss == "mix":
            aux = weighted_aux_loss(attacked.aux_losses, self.balance) * aux_share
            own, given = config.weight * (attacked.loss * share + aux), (1 - config.weight) * given
        else:
            targets = batch.arguments()["targets"]
            own = config.weight * answer_divergence(model, out, attacked, targets) * share
        if config.stability:
            divergence = routing_divergence(out.routing, attacked.routing) * aux_share
            said["routing_divergence"] = float(divergence.detach())
            own = own + config.stability * divergence
        if config.target == "all":
            return [(given + own, None)], said
        routers = routers_of(model)
        if config.target == "router":
            return [(given, None), (own, routers)], said
        if step % 2:
            known = set(routers)
            rest = [one for one in model.parameters() if one.requires_grad and one not in known]
            return [(given + own, rest)], said
        return [(given + own, routers)], said


def routers_of(model: nn.Module) -> list[nn.Parameter]:
    """The routers' parameters that are trained."""
    groups, named = parameter_groups(model), dict(model.named_parameters())
    return [named[name] for name, group in groups.items() if group in ("routers", "router_vectors")]


def class_logits(model: nn.Module, out: Any, targets: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits `[N, C]` and classes `[N]`, -100 where unknown, of each answer that is one class: by target."""
    if not isinstance(model, TaskModel):
        return {"next token": (out.logits.flatten(0, 1).float(), targets.flatten())}
    found = {}
    for name, head in model.heads.items():
        if name in targets and _says_classes(head):
            logits, wanted = out.answers[name], targets[name]
            found[name] = (logits.reshape(-1, logits.shape[-1]).float(), wanted.reshape(-1))
    return found


def answer_divergence(model: nn.Module, before: Any, after: Any, targets: Any) -> Tensor:
    """Mean of KL(p || q) in nats over what has a target: p the answers `before`, q those `after`."""
    total, count = None, 0
    others = class_logits(model, after, targets)
    for name, (logits, wanted) in class_logits(model, before, targets).items():
        known = wanted != IGNORED
        p, q = logits[known].log_softmax(dim=-1), others[name][0][known].log_softmax(dim=-1)
        one = (p.exp() * (p - q)).sum()
        total, count = one if total is None else total + one, count + int(known.sum())
    assert total is not None
    return total / max(count, 1)


def _says_classes(head: nn.Module) -> bool:
    if isinstance(head, ClassifyHead):
        return not head.config.multi
    return isinstance(head, TagHead) and head.chain is None


def _require_classes(model: nn.Module) -> None:
    if not isinstance(model, TaskModel):
        return
    for name, head in model.heads.items():
        if not _says_classes(head):
            raise ConfigError(
                f"train.adversarial.loss must be mix with target {name!r}: trades compares probabilities of classes, "
                "one right for each example or token"
            )
