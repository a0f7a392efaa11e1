"""Experts per token and open experts by the call: as if the configuration said so, or refused."""

import pytest
import torch

from moekit import MoE, MoEConfig
from moekit.config.errors import ConfigError
from moekit.layers.elastic import Elastic
from moekit.layers.routing import ROUTERS

D, E = 16, 8
TOP_K = {
    "softmax": {},
    "softmax-before": {"name": "softmax", "normalize": "before"},
    "softmax-ones": {"name": "softmax", "normalize": "ones"},
    "sigmoid": {},
    "noisy_topk": {},
    "group_limited": {},
    "mlp": {},
    "neurons": {},
    "top_p": {"name": "top_p", "p": 0.7},
}
PREFIX = [name for name in TOP_K if name != "group_limited"]


def layer(name="softmax", **fields):
    fields = {
        "n_experts": E,
        "d_expert": 8,
        "top_k": 2,
        "router": {"name": name, **TOP_K.get(name, {})},
        **fields,
    }
    return MoE(D, MoEConfig.from_dict(fields))


def same_weights(name, top_k, like, **fields):
    made = layer(name, top_k=top_k, **fields)
    made.load_state_dict(like.state_dict())
    return made


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.filterwarnings("ignore::moekit.config.errors.UntaughtRouterWarning")
def test_k_of_the_call_equals_k_of_the_configuration(name, k, training):
    one = layer(name, capacity_factor=1.0)
    other = same_weights(name, k, one, capacity_factor=1.0)
    x = torch.randn(3, 7, D)
    torch.manual_seed(1)
    got = one.train(training)(x, elastic=Elastic(top_k=k))
    torch.manual_seed(1)  # the noise of noisy_topk
    want = other.train(training)(x)
    assert torch.equal(got.hidden_states, want.hidden_states)
    assert got.aux_losses.keys() == want.aux_losses.keys()
    assert all(torch.equal(got.aux_losses[loss], want.aux_losses[loss]) for loss in want.aux_losses)
    assert torch.equal(got.routing.requested, want.routing.requested)


def test_nothing_stays_behind_on_the_layer():
    one, x = layer(), torch.randn(9, D)
    before = one(x).hidden_states
    assert not torch.equal(one(x, elastic=Elastic(top_k=1)).hidden_states, before)
    assert torch.equal(one(x).hidden_states, before)
    assert torch.equal(one(x, elastic=Elastic()).hidden_states, before)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "noisy_topk", "mlp", "top_p"])
def test_a_prefix_of_experts_equals_a_layer_of_these_experts_alone(name):
    one = layer(name).eval()
    n = 3
    small = layer(name, n_experts=n).eval()
    small.load_state_dict(
        {key: value[:n] if value.shape[0] == E else value for key, value in one.state_dict().items()}
    )
    x = torch.randn(2, 9, D)
    got, want = one(x, elastic=Elastic(n_experts=n)), small(x)
    assert torch.allclose(got.hidden_states, want.hidden_states, atol=1e-6)
    assert got.routing.requested[n:].sum() == 0
    for loss, value in want.aux_losses.items():
        assert torch.allclose(got.aux_losses[loss], value, atol=1e-6), loss


BALANCES = {"load_balance": 0.01, "importance": 0.1, "load": 0.1, "router_z": 0.001}


def first_experts(name, one, n, **fields):
    """A layer of the first `n` experts of another one, null experts kept."""
    small = layer(name, n_experts=n, **fields)
    nulls = one.config.null_experts.total
    kept = [*range(n), *range(E, E + nulls)]
    small.load_state_dict({
        key: value if value.shape == small.state_dict()[key].shape else value[kept[: small.state_dict()[key].shape[0]]]
        for key, value in one.state_dict().items()
    })  # fmt: skip
    return small


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "noisy_topk"])
@pytest.mark.parametrize("nulls", [0, 3])
def test_every_loss_and_the_capacity_are_those_of_the_open_experts_alone(name, nulls):
    fields = {"balance": BALANCES, "null_experts": {"zero": nulls}, "capacity_factor": 0.8}
    one = layer(name, **fields).eval()
    small = first_experts(name, one, 3, **fields).eval()
    x = torch.randn(4, 9, D)
    got, want = one(x, elastic=Elastic(n_experts=3)), small(x)
    assert got.aux_losses.keys() == want.aux_losses.keys()
    for loss, value in want.aux_losses.items():
        assert got.aux_losses[loss].item() == pytest.approx(value.item(), abs=1e-5), loss
    assert int(got.routing.n_dropped) == int(want.routing.n_dropped) > 0
    assert torch.allclose(got.hidden_states, want.hidden_states, atol=1e-6)


def test_the_load_of_noisy_routing_counts_open_experts_alone():
    one = layer("noisy_topk", balance=BALANCES).train()
    small = first_experts("noisy_topk", one, 3, balance=BALANCES).train()
    for made in (one, small):  # without noise the two draw the same
        made.router.noise_weight.data.fill_(-50.0)
    x = torch.rand(4, 9, D)
    got, want = one(x, elastic=Elastic(n_experts=3)).aux_losses, small(x).aux_losses
    assert got["load"].item() == pytest.approx(want["load"].item(), rel=0.2)


def test_a_prefix_of_everything_changes_nothing():
    one = layer(null_experts={"zero": 2}, balance=BALANCES, capacity_factor=1.0)
    x = torch.randn(30, D)
    got, want = one(x, elastic=Elastic(n_experts=E)), one(x)
    assert torch.equal(got.hidden_states, want.hidden_states)
    for loss, value in want.aux_losses.items():
        assert torch.equal(got.aux_losses[loss], value), loss


def test_a_bias_cannot_make_a_closed_expert_stand_for_its_family():
    one = layer("sigmoid", families=True, balance={"bias_update_rate": 0.1})
    one.router.family.copy_(torch.tensor([0, 1, 2, 3] * 2))
    one.router.expert_bias[5] = 1.0  # behind the prefix, of the family of expert 1
    small = layer("sigmoid", n_experts=4, families=True, balance={"bias_update_rate": 0.1})
    small.load_state_dict(
        {key: value[:4] if value.shape[0] == E else value for key, value in one.state_dict().items()}
    )
    x = torch.randn(50, D)
    got, want = one(x, elastic=Elastic(n_experts=4)), small(x)
    assert torch.equal(got.routing.requested[:4], want.routing.requested)
    assert torch.allclose(got.hidden_states, want.hidden_states, atol=1e-6)


@pytest.mark.parametrize("name", PREFIX)
def test_closed_experts_get_no_gradient_and_none_is_lost_to_infinity(name):
    one = layer(name, balance={"load": 0.1, "importance": 0.1}).train()
    out = one(torch.randn(2, 9, D), elastic=Elastic(top_k=2, n_experts=3))
    (out.hidden_states.square().sum() + sum(out.aux_losses.values())).backward()
    for key, parameter in one.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    assert one.experts.w_in.grad[3:].abs().sum() == 0 < one.experts.w_in.grad[:3].abs().sum()


def test_a_bias_cannot_open_a_closed_expert():
    one = layer("sigmoid", balance={"bias_update_rate": 0.1})
    one.router.expert_bias[5] = 100.0
    x = torch.randn(20, D)
    assert one(x).routing.requested[5] == 20
    assert one(x, elastic=Elastic(n_experts=5)).routing.requested[5:].sum() == 0


def test_null_experts_stand_open_whatever_the_prefix():
    one = layer(null_experts={"zero": 2}, top_k=1, router={"name": "softmax", "normalize": "before"})
    plan = one(torch.randn(300, D), elastic=Elastic(n_experts=1)).routing
    assert plan.requested[1:E].sum() == 0
    assert (plan.requested[E:] > 0).all()


def test_top_p_by_hand():
    one = layer(top_k=3, n_experts=4)
    with torch.no_grad():  # logits are log probabilities 0.5, 0.3, 0.15, 0.05 for the token (1, 0, ...)
        one.router.weight.zero_()
        one.router.weight[:, 0] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    x = torch.zeros(1, D)
    x[0, 0] = 1
    for p, weights in [(0.4, [1.0]), (0.6, [0.625, 0.375]), (0.81, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95])]:
        plan = one(x, elastic=Elastic(top_p=p)).routing
        assert plan.row_weight.tolist() == pytest.approx(weights), p
        assert int(plan.requested.sum()) == len(weights)


def test_top_p_of_the_call_is_top_p_of_the_router():
    one = layer("top_p").eval()
    other = MoE(D, MoEConfig(n_experts=E, d_expert=8, top_k=2, router={"name": "top_p", "p": 0.1})).eval()
    other.load_state_dict(one.state_dict())
    x = torch.randn(30, D)
    assert torch.equal(one(x, elastic=Elastic(top_p=0.1)).hidden_states, other(x).hidden_states)
    assert not torch.equal(one(x).hidden_states, other(x).hidden_states)


def test_routers_without_k_refuse(recwarn):
    options = {"rule": {"rules": [{"experts": ["0"], "keywords": ["a"]}]}}
    for name, cls in ROUTERS.items():
        if cls.elastic or not cls.__module__.startswith("moekit.") or name in options or name == "oracle":
            continue
        top_k = 1 if name == "switch" else 2
        one = layer(name, top_k=top_k)
        with pytest.raises(ConfigError, match=r"elastic.top_k cannot be set with router '.*softmax"):
            one(torch.zeros(1, 8, D), token_ids=torch.zeros(1, 8, dtype=torch.long), elastic=Elastic(top_k=1))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": 9}, r"elastic.top_k must be at most the experts to choose from \(8\); got 9"),
        ({"n_experts": 9}, r"elastic.n_experts must be in 1..n_experts \(8\); got 9"),
        ({"n_experts": 1}, r"elastic.top_k must be at most the experts to choose from \(1\); got 2"),
        ({"top_k": 0}, "elastic.top_k must be a whole number of at least 1; got 0"),
        ({"top_p": 1.5}, "elastic.top_p must be above 0 and at most 1; got 1.5"),
    ],
)
def test_values_that_cannot_be(setting, message):
    with pytest.raises(ConfigError, match=message):
        layer()(torch.zeros(1, D), elastic=Elastic(**setting))
