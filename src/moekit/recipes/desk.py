"""What only the service desk measures: whether a request's tokens went to the expert of its domain."""

from __future__ import annotations

from typing import Any

import numpy as np

from moekit.data.examples import Examples, TaskData
from moekit.evaluate.task import predict
from moekit.layers.routing.fixed import RuleRouter
from moekit.train.run import LoadedTask

COLUMN = "label"


def measure(loaded: LoadedTask, data: TaskData) -> dict[str, float]:
    """Purity on the test examples, over all requests and, where keywords decide, over those with and without one.

    Purity: the share of a request's combine weight, over its tokens and the sparse layers, that the expert of its
    domain had. Which expert is a domain's: the one of its name, where experts have names; else the assignment, one
    expert for a domain, that is best on the validation examples. A dense model has none.
    """
    names = _names(loaded)
    shares = _shares(loaded, data.test)
    if shares is None:
        return {}
    domains = list(data.test[COLUMN])
    expert_of = dict(zip(names, range(len(names)), strict=True)) if names else _assigned(loaded, data)
    own = np.array([_own(row, expert_of.get(domain)) for row, domain in zip(shares, domains, strict=True)])
    found = {"purity": float(own.mean())}
    spoken = spoken_for(loaded, data.test)
    if spoken is not None:
        found["keyword in"] = float(spoken.mean())
        for name, part in (("purity with keyword", spoken), ("purity without", ~spoken)):
            if part.any():
                found[name] = float(own[part].mean())
    return found


def notes(loaded: LoadedTask, data: TaskData) -> str:
    """How often each domain's requests went to its own expert."""
    shares = _shares(loaded, data.test)
    if shares is None:
        return ""
    names = _names(loaded)
    expert_of = dict(zip(names, range(len(names)), strict=True)) if names else _assigned(loaded, data)
    domains = np.asarray(data.test[COLUMN])
    said = [
        f"{domain} {np.mean([_own(row, expert_of.get(domain)) for row in shares[domains == domain]]):.0%}"
        for domain in sorted(set(domains.tolist()))
    ]
    how = "by the names of the experts" if names else "by the best assignment of experts on validation"
    return f"Share of a domain's tokens that its own expert answered ({how}): {', '.join(said)}."


def spoken_for(loaded: LoadedTask, examples: Examples) -> np.ndarray | None:
    """`[N]` whether a keyword stands in each text; None where no rule decides."""
    router = _router(loaded)
    if not isinstance(router, RuleRouter):
        return None
    encoded = loaded.encoding.inputs["text"].encode(examples)
    keywords = [tuple(ids) for rule in router.options.rules for ids in rule.token_ids]
    found = np.zeros(len(examples), dtype=bool)
    for row in range(len(examples)):
        ids = encoded.batch(np.array([row]))["ids"][0].tolist()
        found[row] = any(_stands_in(keyword, ids) for keyword in keywords)
    return found


def _stands_in(keyword: tuple[int, ...], ids: list[int]) -> bool:
    size = len(keyword)
    return any(tuple(ids[start : start + size]) == keyword for start in range(len(ids) - size + 1))


def _router(loaded: LoadedTask) -> Any:
    layers = loaded.model.backbone.moe_layers
    return layers[0].router if layers else None


def _names(loaded: LoadedTask) -> tuple[str, ...]:
    router = _router(loaded)
    return () if router is None else tuple(router.expert_names)


def _shares(loaded: LoadedTask, examples: Examples) -> np.ndarray | None:
    """`[N, E]` share of each expert of the backbone, the mean over its layers; None where it is dense."""
    layers = len(loaded.model.backbone.moe_layers)
    if layers == 0:
        return None
    found = predict(loaded.model, loaded.encoding, examples, with_experts=True).experts
    return np.stack([row[:layers].mean(axis=0) for row in found])


def _own(shares: np.ndarray, expert: int | None) -> float:
    return 0.0 if expert is None else float(shares[expert])


def _assigned(loaded: LoadedTask, data: TaskData) -> dict[str, int]:
    """The expert of each domain: together the largest share of the validation examples."""
    from scipy.optimize import linear_sum_assignment

    shares = _shares(loaded, data.validation)
    assert shares is not None
    domains = np.asarray(data.validation[COLUMN])
    names = sorted(set(domains.tolist()))
    table = np.stack([shares[domains == name].mean(axis=0) for name in names])
    rows, experts = linear_sum_assignment(-table)
    return {names[row]: int(expert) for row, expert in zip(rows, experts, strict=True)}
