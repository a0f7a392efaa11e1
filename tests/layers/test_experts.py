"""Experts: stacked, of any structure, null, shared; and the errors of their configuration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from moekit import MoE, MoEConfig
from moekit.config.errors import ConfigError
from moekit.config.moe import NullExpertsConfig
from moekit.layers.experts import MLP, ModuleExperts, NullExperts, SharedExpert, StackedMLP

# ---------------------------------------------------------------- null experts


def test_null_experts_by_hand() -> None:
    nulls = NullExperts(NullExpertsConfig(zero=1, copy_input=1, constant=1), d_model=2)
    with torch.no_grad():
        nulls.vectors.copy_(torch.tensor([[10.0, 20.0]]))
        # logits (ln 3 * x0, 0): for x0 = 1 the input has share 3/4, for x0 = 0 it has 1/2
        nulls.mix.copy_(torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]]))
    rows = torch.tensor([[1.0, 2.0], [0.0, 4.0], [5.0, 6.0], [torch.inf, 8.0]])
    out = nulls(rows, torch.tensor([2, 1, 1]))  # constant, copy, zero: in this order
    assert out.tolist() == [pytest.approx(r) for r in ([3.25, 6.5], [5.0, 12.0], [5.0, 6.0], [0.0, 0.0])]


def test_null_experts_are_chosen_like_the_others_and_learn() -> None:
    layer = MoE(4, d_expert=3, n_experts=2, top_k=2, null_experts={"constant": 1, "zero": 2})
    out = layer(torch.randn(50, 4))
    assert out.routing.tokens_per_expert.shape == (5,)
    assert (out.routing.tokens_per_expert > 0).all()
    out.hidden_states.square().sum().backward()
    assert layer.experts.parts[1].vectors.grad.any()


def test_top_k_counts_null_experts() -> None:
    MoE(4, d_expert=3, n_experts=2, top_k=3, null_experts={"copy_input": 1})
    with pytest.raises(ConfigError, match=r"moe.top_k must be in 1..n_experts \(3\); got 4"):
        MoE(4, d_expert=3, n_experts=2, top_k=4, null_experts={"copy_input": 1})


# ---------------------------------------------------------------- modules


class OfWidth(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, rows: Tensor) -> Tensor:
        assert rows.shape[0] > 0, "called without a row"
        return rows[:, :1].expand(-1, self.width)


def test_modules_without_a_row_are_not_called() -> None:
    experts = ModuleExperts([OfWidth(3), OfWidth(3)])
    out = experts(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 2]))
    assert out.tolist() == [[2.0] * 3, [4.0] * 3]
    assert experts(torch.zeros(0, 2), torch.tensor([0, 0])).shape == (0, 3)


def test_modules_give_answers_of_another_width() -> None:
    layer = MoE(4, experts=[OfWidth(7), OfWidth(7)], combine="vote_soft")
    assert layer(torch.randn(3, 4)).hidden_states.shape == (3, 7)
    assert layer.config.n_experts == 2


def test_errors_of_modules() -> None:
    with pytest.raises(ConfigError, match=r"experts must hold n_experts \(3\) modules; got 2"):
        MoE(4, MoEConfig(n_experts=3), experts=[OfWidth(4), OfWidth(4)])
    with pytest.raises(ConfigError, match=r"must be torch\.nn\.Module instances"):
        MoE(4, experts=[OfWidth(4), torch.relu])
    layer = MoE(4, experts=[OfWidth(4), OfWidth(5)], top_k=2)
    with pytest.raises(ConfigError, match=r"experts must all return vectors of one width; got \[4, 5\]"):
        layer(torch.randn(2, 4))


@pytest.mark.parametrize(
    "path", [{"n_shared_experts": 1}, {"linear_path": True}, {"null_experts": {"zero": 1}}]
)
def test_answers_of_width_one_do_not_broadcast_into_another_path(path: dict) -> None:
    layer = MoE(4, experts=[OfWidth(1), OfWidth(1)], top_k=2, **path)
    with pytest.raises(ConfigError, match=r"experts must return vectors of width 4; got 1"):
        layer(torch.randn(8, 4))


# ---------------------------------------------------------------- width, shared and linear path


def test_output_width() -> None:
    layer = MoE(4, d_expert=3, n_experts=2, d_out=6, linear_path=True)
    assert layer(torch.randn(2, 5, 4)).hidden_states.shape == (2, 5, 6)
    for path in ({"n_shared_experts": 1}, {"null_experts": {"zero": 1}}):
        with pytest.raises(ConfigError, match=r"d_out must be d_model"):
            MoE(4, d_expert=3, n_experts=2, d_out=1, **path)


def test_linear_path_is_y_equals_xw_plus_weighted_experts() -> None:
    layer = MoE(4, d_expert=3, n_experts=2, linear_path=True)
    x = torch.randn(5, 4)
    whole = layer(x).hidden_states
    with torch.no_grad():
        layer.experts.w_out.zero_()
    torch.testing.assert_close(layer(x).hidden_states, x @ layer.linear.weight.t())
    assert not torch.allclose(whole, layer(x).hidden_states)


def test_shared_expert_sees_every_token_and_its_gate_is_a_sigmoid() -> None:
    shared = SharedExpert(2, 3, activation="relu", gated=True)
    with torch.no_grad():
        shared.gate.weight.copy_(torch.tensor([[math.log(3), 0.0]]))
    x = torch.tensor([[1.0, 5.0], [0.0, 2.0]])
    torch.testing.assert_close(shared(x), shared.mlp(x) * torch.tensor([[0.75], [0.5]]))
    # padding visits no expert, but the shared one sees all positions
    layer = MoE(2, d_expert=3, n_experts=2, n_shared_experts=1)
    out = layer(x, token_mask=torch.tensor([False, True]))
    torch.testing.assert_close(out.hidden_states[0], layer.shared(x)[0])


@pytest.mark.parametrize(
    ("fields", "width"), [({"n_shared_experts": 2}, 12), ({"n_shared_experts": 2, "d_shared": 5}, 5)]
)
def test_shared_width(fields: dict, width: int) -> None:
    assert MoE(4, d_expert=6, n_experts=2, **fields).shared.mlp.w_out.weight.shape == (4, width)
    for lonely in ({"d_shared": 3}, {"shared_gate": True}):
        with pytest.raises(ConfigError, match="needs n_shared_experts of at least 1"):
            MoE(4, **lonely)


def test_mlp_is_laid_out_like_one_stacked_expert() -> None:
    mlp, stacked = MLP(4, 6, bias=True), StackedMLP(1, 4, 6, bias=True)
    with torch.no_grad():
        stacked.w_in[0], stacked.w_out[0] = mlp.w_in.weight, mlp.w_out.weight
        stacked.b_in[0], stacked.b_out[0] = mlp.w_in.bias, mlp.w_out.bias
    rows = torch.randn(5, 4)
    torch.testing.assert_close(mlp(rows), stacked(rows, torch.tensor([5])))


def test_initial_weights_keep_the_scale_of_a_linear_layer() -> None:
    stacked = StackedMLP(4, 64, 100)
    assert stacked.w_in.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert stacked.w_out.std().item() == pytest.approx(100**-0.5, rel=0.05)
    assert not StackedMLP(2, 4, 4, bias=True).b_in.any()


# ---------------------------------------------------------------- the front door


def test_config_object_and_keyword_arguments_give_the_same_layer() -> None:
    by_config = MoE(4, MoEConfig(n_experts=3, d_expert=5, top_k=1))
    by_keywords = MoE(d_model=4, n_experts=3, d_expert=5, top_k=1)
    assert by_config.config == by_keywords.config
    with pytest.raises(ConfigError, match="not both; got config and top_k"):
        MoE(4, MoEConfig(), top_k=1)
    with pytest.raises(ConfigError, match=r"moe\.top_kk is not a known key: did you mean 'top_k'"):
        MoE(4, top_kk=1)
    with pytest.raises(ConfigError, match="d_model must be at least 1; got 0"):
        MoE(0)
    with pytest.raises(ConfigError, match=r"router 'sofmax' is unknown: did you mean 'softmax'"):
        MoE(4, router="sofmax")
    with pytest.raises(ConfigError, match=r"router\(softmax\)\.normalise is not a known key"):
        MoE(4, router="softmax", router_options={"normalise": "after"})


def test_wrong_shapes_say_what_was_expected() -> None:
    layer = MoE(4, d_expert=3)
    with pytest.raises(ConfigError, match=r"hidden_states must end in d_model \(4\); got \(2, 5\)"):
        layer(torch.randn(2, 5))
    with pytest.raises(
        ConfigError, match=r"token_mask must have the leading shape of hidden_states \(2,\); got \(3,\)"
    ):
        layer(torch.randn(2, 4), token_mask=torch.ones(3, dtype=torch.bool))


def test_mask_of_zeros_and_ones_is_as_good_as_a_bool_one() -> None:
    layer, x = MoE(4, d_expert=3), torch.randn(3, 4)
    ones = torch.tensor([1, 0, 1])
    assert torch.equal(
        layer(x, token_mask=ones).hidden_states, layer(x, token_mask=ones.bool()).hidden_states
    )


def test_weight_scale_multiplies_the_routed_answer() -> None:
    plain, scaled = MoE(4, d_expert=3), MoE(4, d_expert=3, weight_scale=2.5)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(6, 4)
    torch.testing.assert_close(scaled(x).hidden_states, 2.5 * plain(x).hidden_states)
