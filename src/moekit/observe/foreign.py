"""Routing records of Mixture-of-Experts models of Hugging Face transformers.

What an expert block was asked for is read where it is asked: before each experts module that follows transformers'
common interface (a class decorated with `use_experts_implementation`) runs, its chosen experts and weights are noted,
whatever implementation then computes them: transformers' own or "moekit". Router logits are those that the router
beside it answered. Nothing of the model is replaced; hooks are taken off again.

Shape legend: B texts, S tokens of each, T = B*S, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.errors import require
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.observe.record import LayerInfo, RoutingRecord
from moekit.observe.recorder import ALL, Recorder


@dataclass
class _Seen:
    """One experts module: what it is, and what was asked of it since the last forward pass began."""

    info: LayerInfo
    experts: nn.Module
    router: nn.Module | None
    chosen: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # [T, K] experts and weights
    logits: list[Tensor] = field(default_factory=list)  # [T, E]


class ForeignRouting:
    """A context in which the choices of a transformers model's routers are noted.

    Args:
        model: of transformers, with experts that follow its common interface.

    Errors: `ConfigError` where it has no such experts.

    Example::

        with ForeignRouting(model) as routing:
            out = model(input_ids)
            plans = routing.plans(input_ids.shape)

    Attributes: layers: of the record, in the order in which the model names its modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = list(_expert_layers(model))
        require(
            bool(self._seen), "model", type(model).__name__,
            "must have experts that follow transformers' common interface",
            "Mixtral, OLMoE, Qwen3-MoE, DeepSeek, GPT-OSS and most others do",
        )  # fmt: skip
        self._handles: list[Any] = []

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        return tuple(seen.info for seen in self._seen)

    def __enter__(self) -> ForeignRouting:
        for seen in self._seen:
            self._handles.append(
                seen.experts.register_forward_pre_hook(_note_choices(seen), with_kwargs=True)
            )
            if seen.router is not None:
                self._handles.append(seen.router.register_forward_hook(_note_logits(seen)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def plans(self, batch_shape: Sequence[int], token_mask: Tensor | None = None) -> tuple[RoutingPlan, ...]:
        """The plan of each layer in the forward pass since the last call; forgets it.

        Args:
            batch_shape: (B, S) of that pass.
            token_mask: `[B, S]`, 0 or False at padding.

        Errors: `ConfigError` where a layer did not run, or not on B * S tokens.
        """
        batch, length = batch_shape
        mask = None if token_mask is None or bool(token_mask.all()) else token_mask.reshape(-1).bool()
        context = RoutingContext((batch, length), mask)
        found = []
        for seen in self._seen:
            chosen, logits = seen.chosen, seen.logits
            seen.chosen, seen.logits = [], []
            n = sum(len(index) for index, _ in chosen)
            require(n == batch * length, f"batch_shape of {seen.info.name}", [batch, length],
                    f"must hold the {n} tokens that the layer was asked for",
                    "Call plans() once after each forward pass")  # fmt: skip
            index = torch.cat([one for one, _ in chosen])
            weights = torch.cat([one for _, one in chosen])
            raw = torch.cat(logits).float() if sum(map(len, logits)) == n else None
            found.append(_plan(index, weights, raw, seen.info.n_experts, context))
        return tuple(found)


@torch.no_grad()
def record_model(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]], *, groups: Sequence[str] = (ALL,),
    tokens: float = 1.0, most: int = 200_000, seed: int = 0, **info: Any,
) -> RoutingRecord:  # fmt: skip
    """The routing of a transformers model on batches of token ids.

    Args:
        model: see `ForeignRouting`; used in evaluation mode and given back in the mode it came in.
        batches: `[B, S]` token ids, or what the model is called with, by name: `input_ids`, `attention_mask`... A key
            `groups` `[B]` or `[B, S]` has the numbers of the groups, `texts` those of the documents, `positions`
            `[B, S]` the places in them; none of these is given to the model.
        groups: their names.
        tokens: share of the tokens that get a row of their own.
        most: rows of tokens at most.
        seed: of the sample.
        info: what else the record should say.

    Targets are the next tokens of the same text; what was predicted is the token of the largest logit, where the model
    answers logits.

    Errors: those of `ForeignRouting`.

    Example::

        ids = tokenizer(texts, return_tensors="pt", padding=True)
        record = record_model(AutoModelForCausalLM.from_pretrained(name), [ids])
        record.save("routing")
    """
    routing = ForeignRouting(model)
    recorder = Recorder(routing.layers, groups, tokens=tokens, most=most, source="foreign", seed=seed)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with routing:
            for batch in batches:
                arguments = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                of_group, texts, places = (
                    arguments.pop(name, None) for name in ("groups", "texts", "positions")
                )
                arguments = {name: value.to(device) for name, value in arguments.items()}
                ids, mask = arguments["input_ids"], arguments.get("attention_mask")
                out = model(**arguments)
                logits = getattr(out, "logits", None)
                targets = torch.full_like(ids, -1)
                targets[:, :-1] = ids[:, 1:] if mask is None else ids[:, 1:].where(mask[:, 1:].bool(), -1)
                recorder.add(
                    routing.plans(ids.shape, mask), token_ids=ids, targets=targets, groups=of_group, texts=texts,
                    positions=places,
                    predicted=logits.argmax(dim=-1) if logits is not None and logits.dim() == 3 else None,
                )  # fmt: skip
    finally:
        model.train(was_training)
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    return recorder.record(**{"model": name, **info})


# ---------------------------------------------------------------- modules


def _expert_layers(model: nn.Module) -> Iterable[_Seen]:
    for name, parent in model.named_modules():
        for experts in parent.children():
            if not _is_experts(experts):
                continue
            n_experts = _n_experts(experts)
            router = _router_beside(parent, experts, n_experts)
            kind = "unknown" if router is None else type(router).__name__
            yield _Seen(LayerInfo(name or type(parent).__name__, n_experts, kind), experts, router)


def _is_experts(module: nn.Module) -> bool:
    """Whether the module follows the interface that implementations of experts are written for."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed"))


def _n_experts(experts: nn.Module) -> int:
    """The first dimension of its stacked weights."""
    return max(parameter.shape[0] for parameter in experts.parameters(recurse=False) if parameter.dim() == 3)


def _router_beside(parent: nn.Module, experts: nn.Module, n_experts: int) -> nn.Module | None:
    """The module beside the experts that has a row of weights for each of them."""
    for name, module in parent.named_children():
        if module is not experts and any(word in name for word in ("gate", "router")):
            shapes = [parameter.shape for parameter in module.parameters()]
            if any(len(shape) == 2 and shape[0] == n_experts for shape in shapes):
                return module
    return None


def _note_choices(seen: _Seen) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = {**dict(zip(names, arguments, strict=False)), **named}
        index, weights = given["top_k_index"].detach(), given["top_k_weights"].detach()
        seen.chosen.append((index.flatten(0, -2).long(), weights.flatten(0, -2).float()))

    return hook


def _note_logits(seen: _Seen) -> Any:
    def hook(module: nn.Module, arguments: Any, answer: Any) -> None:
        parts = answer if isinstance(answer, tuple | list) else (answer,)
        for part in parts:
            # logits come first; what else is as wide stands behind them
            if (
                isinstance(part, Tensor)
                and part.is_floating_point()
                and part.shape[-1] == seen.info.n_experts
            ):
                seen.logits.append(part.detach().flatten(0, -2))
                return

    return hook


# ---------------------------------------------------------------- plans


def _plan(
    index: Tensor, weights: Tensor, logits: Tensor | None, n_experts: int, context: RoutingContext
) -> RoutingPlan:
    outside = index >= n_experts  # experts of another process: nothing is computed for them here
    if bool(outside.any()):
        index = index.clamp(max=n_experts - 1)
        weights = weights.masked_fill(outside, 0.0)
        chosen = torch.zeros(len(index), n_experts, dtype=torch.bool, device=index.device)
        rows, ranks = (~outside).nonzero(as_tuple=True)
        chosen[rows, index[rows, ranks]] = True
        if context.token_mask is not None:
            chosen &= context.token_mask[:, None]
        dense = torch.zeros(len(index), n_experts, device=index.device).scatter_add_(1, index, weights)
        return RoutingPlan.from_mask(
            chosen, dense, context, router_logits=logits, router_probs=_probs(logits, None)
        )
    probs = _probs(logits, (index, weights))
    return RoutingPlan.from_choices(
        index, weights, n_experts, context, router_logits=logits, router_probs=probs
    )


def _probs(logits: Tensor | None, chosen: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """`[T, E]` probabilities that sum to 1: of a softmax, or of sigmoids where the weights are in that proportion.

    Which of the two a router takes is read from what it answered, not from its name.
    """
    if logits is None:
        return None
    softmax, sigmoid = logits.softmax(dim=-1), logits.sigmoid()
    sigmoid = sigmoid / sigmoid.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    if chosen is None or chosen[0].shape[1] < 1:
        return softmax
    index, weights = chosen

    def distance(probs: Tensor) -> float:
        """How far weights are from being in proportion to the probabilities of the chosen."""
        of_chosen = probs.gather(1, index)
        if index.shape[1] > 1:
            of_chosen = of_chosen / of_chosen.sum(dim=1, keepdim=True).clamp(min=1e-20)
            share = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-20)
            return float((of_chosen - share).abs().mean())
        return float((of_chosen - weights).abs().mean())

    return sigmoid if distance(sigmoid) < distance(softmax) else softmax
