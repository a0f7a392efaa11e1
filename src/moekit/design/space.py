"""What a design may be: number, size and kind of experts, top-k, router, shared experts, placement and balancing.

Sizes are never drawn by themselves: a design names a share of the budget of active parameters, and its experts are
made as wide as that allows. So every design that is drawn is valid and within the budget, and the whole budget can
be reached by each of them. Routers whose number of experts varies from token to token (`top_p`, `threshold`,
`expert_choice`, `soft`) are left out: no width could hold their active parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig, RouterConfig
from moekit.config.task import TaskModelConfig
from moekit.design.budget import Budget
from moekit.design.sizes import Frame, layer_cost, widest
from moekit.design.subject import Changes, changed, require_searchable
from moekit.models.accounting import active_parameters, total_parameters
from moekit.train.material import AnyRunConfig

TOP_K = (1, 2, 4, 8)
RATIOS = (2, 4, 8, 16)
SHARES = (0.5, 0.75, 1.0)
SHARED = (0.0, 0.25, 0.5)
ACTIVATIONS = ("swiglu", "gelu", "relu_squared")
# options of each rule by its name here; with one expert per token, weights that are normalised after the choice are
# always 1, and the task would teach the router nothing
ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "softmax": {"name": "softmax", "options": {"normalize": "after"}},
    "softmax_before": {"name": "softmax", "options": {"normalize": "before"}},
    "sigmoid": {"name": "sigmoid", "options": {}},
    "noisy_topk": {"name": "noisy_topk", "options": {}},
    "sigmoid_raw": {"name": "sigmoid", "options": {"normalize": False}},
    "switch": {"name": "switch", "options": {}},
}
OF_ONE = ("softmax_before", "sigmoid_raw", "switch")
OF_SEVERAL = ("softmax", "softmax_before", "sigmoid", "noisy_topk")


class Draws(Protocol):
    """What a space asks: a trial of Optuna, or anything like it."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


@dataclass(frozen=True)
class Choice:
    """One point of a space.

    Attributes: changes: of the default configuration, by dotted key; empty for the default itself. features: what was
        chosen, in words and numbers, for tables and importances. cost: of what the budget limits.
    """

    changes: Changes
    features: dict[str, Any]
    cost: dict[str, float]


class Space(Protocol):
    """What a search draws from. `axis` names the cost that the front is drawn over."""

    axis: str
    limits: dict[str, float]

    def default(self) -> Choice:
        """The default recipe."""
        ...

    def sample(self, draws: Draws) -> Choice:
        """A valid choice within the limits."""
        ...

    def ideas(self) -> list[dict[str, Any]]:
        """Draws that are tried first."""
        ...


class DesignSpace:
    """Designs of a sparse model around its own backbone.

    Args:
        config: the default, its model fitted to the data.
        budget: `active` and `total` are used here.

    Errors: `ConfigError` where the model has no sparse layers, or where the budget leaves no room for experts.
    """

    axis = "active"

    def __init__(self, config: AnyRunConfig, budget: Budget) -> None:
        require_searchable(config)
        model = config.model
        if not isinstance(model, ModelConfig | TaskModelConfig) or model.moe is None:
            raise ConfigError(
                "model.moe must be set in a search of designs: the default recipe has no sparse layers. "
                "Give it some: model.moe.n_experts=8"
            )
        self.config, self.model, self.moe = config, model, model.moe
        self.frame = Frame.of(model)
        own_active, own_total = active_parameters(model), total_parameters(model)
        self.limits: dict[str, float] = {"active": budget.active.of(own_active)}
        if budget.total is not None:
            self.limits["total"] = budget.total.of(own_total)
        if budget.latency is not None:
            self.limits["latency"] = budget.latency
        self.top_k = TOP_K
        self.placements = placements(model.n_layers)
        known = self.moe.activation
        self.activations = tuple(dict.fromkeys((known, *ACTIVATIONS)))
        self.hashed = _hashable(model)
        least = self.frame.fixed + self.frame.n_layers * self._least_block()
        if self.limits["active"] < least:
            raise ConfigError(
                f"budget.active must be at least {least} for this backbone, of which {self.frame.fixed} are no "
                f"expert's; got {self.limits['active']:.0f}. Raise it, or take a smaller backbone (model.d_model)"
            )
        stored = self.frame.stored + self.frame.n_layers * layer_cost(model.d_model, self._smallest())[1]
        if self.limits.get("total", stored) < stored:
            raise ConfigError(
                f"budget.total must be at least {stored}; got {self.limits['total']:.0f}. Raise it, or leave it out"
            )

    def default(self) -> Choice:
        model, moe = self.model, self.moe
        features = {
            "n_experts": moe.n_experts, "top_k": moe.top_k, "d_expert": moe.d_expert, "share": 1.0,
            "router": _router_name(moe), "activation": moe.activation,
            "shared": round(moe.shared_width / (moe.shared_width + moe.top_k * moe.d_expert), 2),
            "linear_path": moe.linear_path, "placement": _placement_name(model.moe_layers, self.placements),
            "balance": "bias" if moe.balance.bias_update_rate > 0 else "loss",
            "coefficient": moe.balance.bias_update_rate or moe.balance.load_balance,
        }  # fmt: skip
        if self.hashed:
            features["hash_layers"] = sum(
                change.get("router") in ("hash", {"name": "hash"}) for change in model.moe_by_layer.values()
            )
        return Choice({}, features, self.cost(model))

    def sample(self, draws: Draws) -> Choice:
        share = draws.suggest_categorical("share", SHARES)
        top_k = draws.suggest_categorical("top_k", self.top_k)
        ratio = draws.suggest_categorical("experts_per_choice", RATIOS)
        if top_k == 1:
            router = draws.suggest_categorical("router_of_one", OF_ONE)
        else:
            router = draws.suggest_categorical("router", OF_SEVERAL)
        activation = draws.suggest_categorical("activation", self.activations)
        shared = draws.suggest_categorical("shared", SHARED)
        linear = draws.suggest_categorical("linear_path", (False, True))
        placement = "all"
        if len(self.placements) > 1:
            placement = draws.suggest_categorical("placement", tuple(self.placements))
        hashed = draws.suggest_categorical("hash_layers", (0, 1, 2)) if self.hashed else 0
        if draws.suggest_categorical("balance", ("loss", "bias")) == "loss":
            balance = {
                "load_balance": draws.suggest_float("load_balance", 1e-3, 1e-1, log=True),
                "bias_update_rate": 0.0,
            }
        else:
            rate = draws.suggest_float("bias_update_rate", 1e-3, 3e-2, log=True)
            balance = {"load_balance": 0.0, "bias_update_rate": rate}
        moe = self.moe.replace(
            n_experts=top_k * ratio, top_k=top_k, router=ROUTERS[router], activation=activation, linear_path=linear,
            d_expert=self.moe.d_expert, n_shared_experts=0, d_shared=None, shared_gate=False, merged_into=None,
            balance={**self.moe.balance.to_dict(), **balance},
        )  # fmt: skip
        return self._fitted(moe, float(share), float(shared), placement, int(hashed))

    def ideas(self) -> list[dict[str, Any]]:
        """Designs that often win, at the whole budget: more, finer and shared experts, balance by bias, one expert."""
        whole = {"share": 1.0, "activation": self.moe.activation, "linear_path": False, "placement": "all"}
        by_loss = {"balance": "loss", "load_balance": 0.01}
        by_bias = {"balance": "bias", "bias_update_rate": 0.01}
        found: list[dict[str, Any]] = [
            {"top_k": 2, "experts_per_choice": 16, "router": "softmax", "shared": 0.0, **by_loss},
            {"top_k": 4, "experts_per_choice": 8, "router": "sigmoid", "shared": 0.25, **by_bias},
            {
                "top_k": 1,
                "experts_per_choice": 8,
                "router_of_one": "softmax_before",
                "shared": 0.5,
                **by_loss,
            },
            {"top_k": 4, "experts_per_choice": 2, "router": "softmax_before", "shared": 0.0, **by_loss},
        ]
        more = {"hash_layers": 0} if self.hashed else {}
        drop = set() if len(self.placements) > 1 else {"placement"}
        return [
            {name: value for name, value in {**whole, **more, **idea}.items() if name not in drop}
            for idea in found
            if idea["top_k"] in self.top_k
        ]

    def cost(self, model: ModelConfig | TaskModelConfig) -> dict[str, float]:
        """Active and total parameters, in the words of the budget."""
        return {"active": active_parameters(model), "total": total_parameters(model)}

    def _fitted(self, moe: MoEConfig, share: float, shared: float, placement: str, hashed: int) -> Choice:
        """The drawn layer made to fit: fewer experts where too many are stored, else fewer choices and side paths."""
        layers, smallest = self.placements[placement], self._smallest()
        stored, crowded = self.limits.get("total", float("inf")), False
        while True:
            block = self.frame.block(int(self.limits["active"]), share)
            fit = widest(self.model.d_model, moe, shared, block)
            width = self.frame.dense_width(block)
            if fit is not None and (width > 0 or len(layers) == self.model.n_layers):
                if self._stored(fit, width, layers) <= stored:
                    return self._choice(fit, share, shared, placement, width, hashed)
                crowded = True
                if moe.n_experts > 2 * moe.top_k:
                    moe = moe.replace(n_experts=max(2 * moe.top_k, moe.n_experts // 2))
                else:
                    share *= 0.8
            elif moe.top_k > 1:
                ratio, top_k = max(2, moe.n_experts // moe.top_k), moe.top_k // 2
                moe = moe.replace(top_k=top_k, n_experts=top_k * ratio, router=_of_fewer(moe.router, top_k))
            elif moe.linear_path or shared > 0:
                moe, shared = moe.replace(linear_path=False), 0.0
            elif moe.n_experts > 2:
                moe = moe.replace(n_experts=max(2, moe.n_experts // 2))
            elif share < 1 and not crowded:
                share = 1.0
            else:  # the budget was found to hold this one
                return self._choice(smallest, share, 0.0, "all", 0, 0)

    def _choice(
        self, moe: MoEConfig, share: float, shared: float, placement: str, width: int, hashed: int
    ) -> Choice:
        layers = self.placements[placement]
        dense = [index for index in range(self.model.n_layers) if index not in layers]
        by_hash = {
            str(index): {"router": "hash", "balance": {"bias_update_rate": 0.0}} for index in layers[:hashed]
        }
        if by_hash and len(by_hash) == len(layers):  # some layer has to learn where tokens go
            by_hash.popitem()
        changes: Changes = {
            "model.moe": moe.to_dict(), "model.moe_by_layer": by_hash, "model.n_dense_layers": 0, "model.moe_every": 1,
            "model.dense_layers": dense,
        }  # fmt: skip
        if dense:
            changes["model.d_ff"] = width
        features = {
            "n_experts": moe.n_experts, "top_k": moe.top_k, "d_expert": moe.d_expert, "share": round(share, 2),
            "router": _router_name(moe), "activation": moe.activation, "shared": shared,
            "linear_path": moe.linear_path, "placement": placement,
            "balance": "bias" if moe.balance.bias_update_rate > 0 else "loss",
            "coefficient": moe.balance.bias_update_rate or moe.balance.load_balance,
        }  # fmt: skip
        if self.hashed:
            features["hash_layers"] = len(by_hash)
        model = changed(self.config, changes).model
        assert isinstance(model, ModelConfig | TaskModelConfig)
        return Choice(changes, features, self.cost(model))

    def _stored(self, moe: MoEConfig, width: int, layers: Sequence[int]) -> float:
        dense = (self.model.n_layers - len(layers)) * (width * self.frame.row + self.frame.plain)
        return self.frame.stored + len(layers) * layer_cost(self.model.d_model, moe)[1] + dense

    def _smallest(self) -> MoEConfig:
        """The least that still has a choice: one of two narrow experts."""
        return self.moe.replace(
            n_experts=2, top_k=1, d_expert=4, router=ROUTERS["softmax_before"], activation="gelu", linear_path=False,
            n_shared_experts=0, d_shared=None, shared_gate=False, merged_into=None,
        )  # fmt: skip

    def _least_block(self) -> int:
        return layer_cost(self.model.d_model, self._smallest())[0]


def placements(n_layers: int) -> dict[str, tuple[int, ...]]:
    """Which layers are sparse, by a name; the same layers only once.

    >>> placements(2)
    {'all': (0, 1), 'last half': (1,), 'first half': (0,)}
    >>> list(placements(4))
    ['all', 'last half', 'first half', 'every second', 'all but first']
    """
    half = n_layers // 2
    found: dict[str, tuple[int, ...]] = {}
    for name, layers in (
        ("all", range(n_layers)),
        ("last half", range(half, n_layers)),
        ("first half", range(half)),
        ("every second", range(1, n_layers, 2)),
        ("all but first", range(1, n_layers)),
    ):
        if len(layers) and tuple(layers) not in found.values():
            found[name] = tuple(layers)
    return found


def _placement_name(layers: Sequence[int], known: Mapping[str, tuple[int, ...]]) -> str:
    named = [name for name, those in known.items() if those == tuple(layers)]
    return named[0] if named else "layers " + ", ".join(map(str, layers))


def _router_name(moe: MoEConfig) -> str:
    """The name in `ROUTERS` where the rule is one of them."""
    for name, router in ROUTERS.items():
        same = router["name"] == moe.router.name
        given = {"normalize": "after", **moe.router.options} if same and name.startswith("softmax") else None
        if same and (moe.router.options if given is None else given) == router["options"]:
            return name
    return moe.router.name


def _of_fewer(router: RouterConfig, top_k: int) -> RouterConfig:
    """The rule for a layer with fewer choices than were drawn."""
    if top_k > 1:
        return router
    raw = "sigmoid_raw" if router.name == "sigmoid" else "softmax_before"
    return RouterConfig.model_validate(ROUTERS[raw])


def _hashable(model: ModelConfig | TaskModelConfig) -> bool:
    """Whether early layers may route by token id."""
    return isinstance(model, ModelConfig) and model.n_layers > 2
