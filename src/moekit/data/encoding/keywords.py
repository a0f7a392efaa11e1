"""Keywords of a router as the token ids of a task's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from moekit.config.errors import require
from moekit.config.moe import MoEConfig
from moekit.config.task import TaskModelConfig
from moekit.data.encoding.base import Encoder
from moekit.data.encoding.text import UNKNOWN, TextEncoder
from moekit.layers.routing import keyword_rules

M = TypeVar("M", bound=TaskModelConfig)


def with_keywords(model: M, inputs: Mapping[str, Encoder]) -> M:
    """The model's configuration in which the `keywords` of routers named `rule` are rules and names of experts.

    A keyword that the vocabulary lacks is left out: its token is that of every unknown word.

    Args:
        model: of a task.
        inputs: the fitted encoders; exactly one of them must read text.

    Errors: `ConfigError` where no input or several are text, for more names than experts, and for an expert none of
        whose words the vocabulary knows.
    """
    changes: dict[str, Any] = {}
    if model.moe is not None:
        changes["moe"] = _with_rules(model.moe, inputs)
    by_layer = {
        index: {**layer, "router": _with_rules(model.moe_of(index), inputs).router.to_dict()}  # type: ignore[arg-type]
        for index, layer in model.moe_by_layer.items()
        if "router" in layer
    }
    if by_layer:
        changes["moe_by_layer"] = {**model.moe_by_layer, **by_layer}
    return model.replace(**changes)


def _with_rules(moe: MoEConfig, inputs: Mapping[str, Encoder]) -> MoEConfig:
    options = moe.router.options
    keywords: Mapping[str, Sequence[str]] = options.get("keywords") or {}
    if moe.router.name != "rule" or not keywords:
        return moe
    texts = [encoder for encoder in inputs.values() if isinstance(encoder, TextEncoder)]
    require(len(texts) == 1, "router(rule).keywords", list(keywords),
            f"need exactly one input of kind text; there are {len(texts)}")  # fmt: skip
    require(len(keywords) <= moe.n_choices, "router(rule).keywords", list(keywords),
            f"must name at most n_experts ({moe.n_choices}) experts")  # fmt: skip
    tokenizer = texts[0].tokenizer
    unknown = tokenizer.token_to_id(UNKNOWN)

    def ids(text: str) -> list[int]:
        found = list(tokenizer.encode(text, add_special_tokens=False).ids)
        return [] if unknown in found else found

    numbered = dict(enumerate(keywords.values()))
    rules = keyword_rules(ids, numbered)
    for rule, name in zip(rules, keywords, strict=True):
        require(rule["token_ids"], f"router(rule).keywords.{name}", list(keywords[name]),
                "must hold a word that the training texts have")  # fmt: skip
    others = [f"other {number}" for number in range(moe.n_choices - len(keywords))]
    told = {**options, "rules": rules, "names": [*keywords, *others]}
    return moe.replace(router={"name": "rule", "options": told})
