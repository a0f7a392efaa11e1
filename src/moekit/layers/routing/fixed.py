"""Routers that learn nothing: hash, uniform random, and a user's rules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import ConfigError, require
from moekit.config.moe import MoEConfig
from moekit.layers.plan import RoutingContext, RoutingPlan, mean_over_tokens
from moekit.layers.routing.base import LearnedRouter, Router, normalize_chosen, register_router

_TABLE_LIMIT = 1 << 22  # ids times experts that the hash router tabulates


@register_router("hash")
class HashRouter(Router):
    """K distinct experts by a hash of the token id, equal weights (Roller et al. 2021, arXiv 2106.04426).

    Each id ranks all experts by a hash of id and expert, and takes the first K (rendezvous hashing, Thaler and
    Ravishankar 1996). So experts can be taken away: an id that chose none of them keeps its experts, the others go
    to the next of their ranking.
    """

    class Options(StrictConfig):
        seed: int = Field(default=0, ge=0, description="another seed gives another table")
        experts: tuple[int, ...] | None = Field(
            default=None,
            description="numbers that the experts are hashed by, where some were taken away; 0, 1, ... if null",
        )

    options: Options

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        numbers, n = self.options.experts, self.n_experts
        require(numbers is None or len(numbers) == len(set(numbers)) == n, "router(hash).experts", numbers,
                f"must hold n_experts ({n}) different numbers")  # fmt: skip

    _table: Tensor | None = None  # no buffer: it follows from the options, and a checkpoint need not hold it

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        if context.token_ids is None:
            raise ConfigError(
                "router 'hash' chooses by token id; call the layer with token_ids=[...] of its input"
            )
        index = self._choices(context.token_ids.long())  # in a narrower type the hash would wrap to another
        return RoutingPlan.from_choices(index, _equal_weights(index), self.n_experts, context)

    def _choices(self, ids: Tensor) -> Tensor:
        """`[T, K]` experts of token ids `[T]`; on a CPU looked up in a table of all ids so far."""
        if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
            return self._hashed(ids)
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most * self.n_experts >= _TABLE_LIMIT:
            return self._hashed(ids)
        if self._table is None or len(self._table) <= most:
            with torch.inference_mode(False):  # a table made in an evaluation must serve training too
                self._table = self._hashed(torch.arange(most + most // 2 + 1, device="cpu"))
        return self._table.index_select(0, ids)

    def _hashed(self, ids: Tensor) -> Tensor:
        numbers = self.options.experts if self.options.experts is not None else range(self.n_experts)
        experts = torch.tensor(list(numbers), device=ids.device)
        keys = _mix(ids[:, None] * 0x9E3779B1 + experts[None] * 0x85EBCA77 + self.options.seed * 0xC2B2AE3D)
        return keys.topk(self.top_k, dim=-1).indices


@register_router("random")
class RandomRouter(Router):
    """K experts drawn uniformly for every token, in evaluation too: the control of every comparison."""

    class Options(StrictConfig):
        normalize: bool = Field(
            default=True, description="weights of 1 / top_k; false gives each chosen expert a weight of 1"
        )

    options: Options

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        draw = torch.rand(tokens.shape[0], self.n_experts, device=tokens.device)
        index = draw.topk(self.top_k, dim=-1).indices
        weight = _equal_weights(index)
        if not self.options.normalize:
            weight = torch.ones_like(weight)
        return RoutingPlan.from_choices(index, weight, self.n_experts, context)


class Rule(StrictConfig):
    """Send the tokens after (or around) a keyword to an expert.

    `token_ids` holds the keyword as the tokenizer writes it; several spellings are several entries. See
    `keyword_rules`.
    """

    expert: int = Field(ge=0, description="expert that answers")
    token_ids: tuple[tuple[int, ...], ...] = Field(description="sequences of token ids that fire the rule")


@register_router("rule")
class RuleRouter(LearnedRouter):
    """Rules over the input decide or bias the choice of a learned softmax top-k router.

    `function(token_ids [B, S], n_experts) -> scores [B, S, E]` (padding has id -1), or `rules` with keywords,
    give a score per token and expert. With mode "decide", a token with any positive score goes to its
    best-scored experts (at most `top_k`) and all others are routed as learned; with "bias", `strength` times
    the score is added to the logits.

    Keywords hold for the keyword alone ("token"), from it to the end of its document ("onward"), or for the
    whole document ("sequence", which looks ahead and is therefore not causal; nor is a function, unless it
    says so by `function_is_causal`).

    In mode "decide", `otherwise` names one expert for all tokens without a rule, so that nothing is learnt; and `teach`
    trains the learned choice to say what the rules say, so that it goes on in their sense where they are silent.
    """

    class Options(StrictConfig):
        rules: tuple[Rule, ...] = Field(default=(), description="keyword rules")
        function: Any = Field(default=None, description="a callable or its import path 'package.module:name'")
        function_is_causal: bool = Field(
            default=False, description="the function never looks at later tokens"
        )
        mode: Literal["decide", "bias"] = Field(default="decide", description="decide the choice or bias it")
        strength: float = Field(
            default=2.0, gt=0, description="what a score of 1 adds to a logit in mode bias"
        )
        scope: Literal["token", "onward", "sequence"] = Field(
            default="onward", description="where a keyword holds"
        )
        otherwise: int | str | None = Field(
            default=None,
            description="expert (its number or name) of tokens that no rule names, in mode decide; as learned if null",
        )
        teach: float = Field(
            default=0.0,
            ge=0,
            description="weight of a loss by which the learned choice follows the rules (decide)",
        )
        names: tuple[str, ...] = Field(
            default=(), description="names of the experts, for answers and reports"
        )
        keywords: dict[str, tuple[str, ...]] = Field(
            default_factory=dict,
            description="words by the name of an expert: where a text is encoded, they become rules and names",
        )

        @model_validator(mode="after")
        def _callable(self) -> RuleRouter.Options:
            value = self.function
            require(value is None or callable(value) or (isinstance(value, str) and ":" in value), "function",
                    value, "must be a callable or an import path 'package.module:name'")  # fmt: skip
            for name, value in (("otherwise", self.otherwise is not None), ("teach", self.teach > 0)):
                require(not value or self.mode == "decide", name, getattr(self, name), "needs mode: decide")
            require(self.teach == 0 or self.otherwise is None, "teach", self.teach,
                    "must be 0 with otherwise, which leaves no learned choice")  # fmt: skip
            return self

    options: Options

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        opts = self.options
        require(opts.rules or opts.function is not None, "router(rule)", "no rule",
                "needs `rules` or a `function`", "Keywords become rules where a task's text is encoded; elsewhere, see "
                "moekit.layers.routing.keyword_rules")  # fmt: skip
        require(len(opts.names) in (0, self.n_experts), "router(rule).names", list(opts.names),
                f"must be as many as experts ({self.n_experts})")  # fmt: skip
        self.expert_names = opts.names
        self.otherwise = self._numbered(opts.otherwise)
        for rule in opts.rules:
            require(rule.expert < self.n_experts, "router(rule).rules.expert", rule.expert,
                    f"must be below n_experts ({self.n_experts})")  # fmt: skip
        self.function: Callable[..., Tensor] | None = _resolve(opts.function)
        self.causal = opts.scope != "sequence" and (opts.function is None or opts.function_is_causal)
        one_token = all(len(keyword) <= 1 for rule in opts.rules for keyword in rule.token_ids)
        self.reads_history = opts.function is not None or opts.scope != "token" or not one_token

    def _numbered(self, expert: int | str | None) -> int | None:
        """The expert's number."""
        if isinstance(expert, str):
            names = ", ".join(self.expert_names) or "none are given"
            require(expert in self.expert_names, "router(rule).otherwise", expert,
                    f"must be a number or one of the names: {names}")  # fmt: skip
            return self.expert_names.index(expert)
        require(expert is None or 0 <= expert < self.n_experts, "router(rule).otherwise", expert,
                f"must be in 0..{self.n_experts - 1} (n_experts less 1)")  # fmt: skip
        return expert

    def always_normalizes(self, options: StrictConfig) -> bool:
        # where rules teach it, or nothing is left to learn, a weight of 1 does no harm
        return self.options.teach == 0 and self.options.otherwise is None

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        if context.token_ids is None:
            raise ConfigError(
                "router 'rule' reads token ids; call the layer with token_ids=[...] of its input"
            )
        logits = self.logits(tokens)
        scores = self._scores(context).to(logits)
        if self.options.mode == "bias":
            logits = logits + self.options.strength * scores
        probs = logits.softmax(dim=-1)
        index = probs.topk(self.top_k, dim=-1).indices
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, index, True)
        losses: dict[str, Tensor] = {}
        if self.options.mode == "decide":
            if self.otherwise is not None:
                chosen = torch.zeros_like(chosen)
                chosen[:, self.otherwise] = True
            # by score; the learned probabilities break ties
            learned = probs.detach().argsort(dim=-1, descending=True, stable=True)
            by_score = scores.gather(1, learned).argsort(dim=-1, descending=True, stable=True)
            named = learned.gather(1, by_score)[:, : self.top_k]
            by_rule = torch.zeros_like(chosen).scatter_(1, named, scores.gather(1, named) > 0)
            spoken = (scores > 0).any(dim=-1)
            chosen = torch.where(spoken[:, None], by_rule, chosen)
            if self.options.teach > 0:
                losses["rule_teaching"] = self.options.teach * self._unlike(logits, by_rule, spoken, context)
        weights = normalize_chosen(probs * chosen)
        return RoutingPlan.from_mask(
            chosen, weights, context, router_logits=logits, router_probs=probs, losses=losses
        )

    def _unlike(self, logits: Tensor, by_rule: Tensor, spoken: Tensor, context: RoutingContext) -> Tensor:
        """Cross-entropy of the learned probabilities from the rules' experts, each with an equal share; the mean over
        real tokens that a rule names, 0 where none does."""
        counts = spoken if context.token_mask is None else spoken & context.token_mask
        wanted = by_rule / by_rule.sum(dim=-1, keepdim=True).clamp(min=1)
        return mean_over_tokens(-(wanted * logits.log_softmax(dim=-1)).sum(dim=-1), counts)

    def _scores(self, context: RoutingContext) -> Tensor:
        """`[T, E]` scores of function and keywords together."""
        assert context.token_ids is not None
        ids = context.token_ids.view(context.batch_shape)
        segments = torch.zeros_like(ids) if context.segment_ids is None else context.segment_ids.view_as(ids)
        # padding holds no keyword, and a function can tell it apart
        text = ids if context.token_mask is None else ids.masked_fill(~context.token_mask.view_as(ids), -1)
        scores = torch.zeros(*ids.shape, self.n_experts, device=ids.device)
        for rule in self.options.rules:
            hit = torch.zeros_like(ids, dtype=torch.bool)
            for keyword in rule.token_ids:
                hit |= _find(text, segments, keyword)
            scores[..., rule.expert] += _spread(hit, segments, self.options.scope)
        if self.function is not None:
            answer = self.function(text, self.n_experts)
            require(
                answer.shape == scores.shape, "router(rule).function", tuple(answer.shape),
                f"must return scores of shape {tuple(scores.shape)} (batch, sequence, experts)",
            )  # fmt: skip
            scores = scores + answer
        return scores.flatten(0, 1)


def keyword_rules(
    encode: Callable[[str], Sequence[int]], keywords: Mapping[int, Sequence[str]]
) -> list[dict[str, Any]]:
    """Rules for `router={"name": "rule", "rules": keyword_rules(...)}` from words per expert.

    Each word is encoded as it is, with a leading space, capitalised, and both, because tokenizers write these
    apart.

    >>> keyword_rules(lambda text: [ord(c) for c in text], {0: ["ab"]})
    [{'expert': 0, 'token_ids': [[97, 98], [32, 97, 98], [65, 98], [32, 65, 98]]}]
    """
    rules = []
    for expert, words in keywords.items():
        spellings: list[list[int]] = []
        for word in words:
            for text in (word, f" {word}", word.capitalize(), f" {word.capitalize()}"):
                ids = list(encode(text))
                if ids and ids not in spellings:
                    spellings.append(ids)
        rules.append({"expert": expert, "token_ids": spellings})
    return rules


def _find(ids: Tensor, segments: Tensor, keyword: Sequence[int]) -> Tensor:
    """`[B, S]` True at the last token of each occurrence in one document: an earlier one would look ahead."""
    length = len(keyword)
    hit = torch.zeros_like(ids, dtype=torch.bool)
    if length == 0 or length > ids.shape[1]:
        return hit
    found = (ids.unfold(1, length, 1) == torch.tensor(list(keyword), device=ids.device)).all(dim=-1)
    one_document = (segments.unfold(1, length, 1) == segments[:, length - 1 :, None]).all(dim=-1)
    hit[:, length - 1 :] = found & one_document
    return hit


def _spread(hit: Tensor, segments: Tensor, scope: str) -> Tensor:
    """Extend hits over their document: onward from the hit, or all of it."""
    if scope == "token" or not bool(hit.any()):
        return hit
    same_document = segments[:, :, None] == segments[:, None, :]
    if scope == "onward":
        same_document = same_document & torch.ones_like(same_document[0]).tril()
    return (same_document & hit[:, None, :]).any(dim=-1)


def _resolve(function: Any) -> Callable[..., Tensor] | None:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"router(rule).function {function!r} cannot be imported: {error}") from error


def _equal_weights(index: Tensor) -> Tensor:
    return torch.full(index.shape, 1.0 / index.shape[1], device=index.device)


def _mix(keys: Tensor) -> Tensor:
    """A bijective-enough integer hash (the finalizer of MurmurHash3 on 32 bits, kept in int64)."""
    keys = keys & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        keys = ((keys ^ (keys >> shift)) * factor) & 0xFFFFFFFF
    return keys ^ (keys >> 16)
