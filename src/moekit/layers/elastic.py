"""What one call may change of a model's routing: how many experts a token takes, and of which it may choose.

The model stays as it is; the setting travels with the call, down to each router in its `RoutingContext`:

    model(ids, elastic=Elastic(top_k=1)) ─► Backbone ─► MoE ─► RoutingContext.elastic ─► Router

A router follows a setting as if its layer's configuration said so: the answer with `Elastic(top_k=1)` is that of the
same weights under `top_k: 1`, with combine weights normalised over the experts that were in fact chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from moekit.config.errors import ConfigError, require


@dataclass(frozen=True)
class Elastic:
    """The routing of one call; None leaves what the layer's configuration says.

    Attributes:
        top_k: experts per token (with a router of variable number, the most a token may take).
        n_experts: only the first so many experts may be chosen; null experts stand open always.
        top_p: of the chosen experts a token takes the fewest whose probabilities reach this together, at least one.

    Errors: `ConfigError` for a value below 1, or a `top_p` outside (0, 1].

    >>> Elastic(top_k=1, n_experts=4)
    Elastic(top_k=1, n_experts=4, top_p=None)
    >>> str(Elastic(top_k=1, n_experts=4)), bool(Elastic())
    ('k=1 n=4', False)
    """

    top_k: int | None = None
    n_experts: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "n_experts"):
            value = getattr(self, name)
            require(value is None or (isinstance(value, int) and value >= 1), f"elastic.{name}", value,
                    "must be a whole number of at least 1")  # fmt: skip
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            "elastic.top_p",
            self.top_p,
            "must be above 0 and at most 1",
        )

    def __bool__(self) -> bool:
        return bool(self.given)

    def __str__(self) -> str:
        short = {"top_k": "k", "n_experts": "n", "top_p": "p"}
        return " ".join(f"{short[name]}={value}" for name, value in self.given.items()) or "as configured"

    @property
    def given(self) -> dict[str, int | float]:
        """What is set, by name.

        >>> Elastic(top_p=0.9).given
        {'top_p': 0.9}
        """
        # by hand: every layer asks for every token that is written
        values = {"top_k": self.top_k, "n_experts": self.n_experts, "top_p": self.top_p}
        return {name: value for name, value in values.items() if value is not None}


def require_fits(
    elastic: Elastic,
    router: str,
    accepts: Collection[str],
    n_choices: int,
    n_null: int,
    top_k: int,
    known: Callable[[], Collection[str]],
) -> None:
    """Raise `ConfigError` unless a router can follow `elastic`.

    Args:
        elastic: the setting of the call.
        router: registered name, for the message.
        accepts: names of what this router can follow.
        n_choices: experts it chooses from, null ones included.
        n_null: null experts among them.
        top_k: experts per token where the call does not say.
        known: gives the names of routers that can follow it, for the message.
    """
    for name, value in elastic.given.items():
        if name not in accepts:
            raise ConfigError(
                f"elastic.{name} cannot be set with router {router!r}: "
                + (
                    "its rule leaves no such choice to a call"
                    if accepts
                    else "it has no number of experts to choose"
                )
                + f"; got {value}. Routers that can: {', '.join(sorted(known()))}"
            )
    n_open = n_choices if elastic.n_experts is None else min(elastic.n_experts + n_null, n_choices)
    k = top_k if elastic.top_k is None else elastic.top_k
    prefix, real = elastic.n_experts, n_choices - n_null
    if prefix is not None:
        require(prefix <= real, "elastic.n_experts", prefix, f"must be in 1..n_experts ({real})")
    require(k <= n_open, "elastic.top_k", k, f"must be at most the experts to choose from ({n_open})",
            "Set a smaller top_k with so few experts")  # fmt: skip
