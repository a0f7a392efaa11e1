"""Records of transformers' models hold what their own routers say, whoever computes the experts."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "convert"))
from transformers_families import tiny_model

import moekit
from moekit.config.errors import ConfigError
from moekit.convert.transformers import undo
from moekit.layers.plan import RoutingContext
from moekit.observe.foreign import ForeignRouting, _plan, record_model
from moekit.observe.record import RoutingRecord

pytestmark = pytest.mark.filterwarnings("ignore::moekit.convert.transformers.MoekitFallbackWarning")
FAMILIES = ("olmoe", "mixtral", "qwen3_moe")


def ids(batch=3, length=9, seed=0):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def own_choices(model, token_ids, k=2):
    """`[layers][T, K]` experts of the largest logits that the model itself answers."""
    with torch.no_grad():
        out = model(token_ids, output_router_logits=True)
    return [logits.topk(k, dim=-1).indices for logits in out.router_logits], out


@pytest.mark.parametrize("kernels", [False, True], ids=["own", "moekit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_model_s_own_logits(family, kernels):
    model, token_ids = tiny_model(family), ids()
    if kernels:
        moekit.use_in_transformers(model)
        assert model.get_experts_implementation() == {"": "moekit"}
    chosen, out = own_choices(model, token_ids)
    record = record_model(model, [token_ids])
    assert record.source == "foreign"
    assert len(record.layers) == len(chosen) == 2
    assert record.n_tokens == 27
    n_experts = record.layers[0].n_experts
    for layer, index in enumerate(chosen):
        expected = torch.bincount(index.flatten(), minlength=n_experts)
        assert record.counts(layer).tolist() == expected.tolist()
        assert record.of(layer, "token/experts").tolist() == index.tolist()
        probs = out.router_logits[layer].float().softmax(dim=-1)
        torch.testing.assert_close(
            torch.from_numpy(record.of(layer, "probs")[0]).float(), probs.sum(dim=0), rtol=1e-5, atol=1e-5
        )
        entropy = float(torch.special.entr(probs).sum())
        assert float(record.of(layer, "entropy")[0]) == pytest.approx(entropy, rel=1e-5)
    assert record.arrays["token/id"].tolist() == token_ids.flatten().tolist()
    assert record.arrays["token/target"].reshape(3, 9)[:, :-1].tolist() == token_ids[:, 1:].tolist()
    assert record.arrays["token/predicted"].tolist() == out.logits.argmax(dim=-1).flatten().tolist()


def test_both_ways_to_compute_give_one_record():
    model, token_ids = tiny_model("olmoe"), ids()
    own = record_model(model, [token_ids])
    moekit.use_in_transformers(model)
    ours = record_model(model, [token_ids])
    undo(model)
    for layer in range(2):
        assert own.of(layer, "token/experts").tolist() == ours.of(layer, "token/experts").tolist()


def test_the_model_is_left_as_it_was():
    model, token_ids = tiny_model("mixtral").train(), ids()
    before = model.eval()(token_ids).logits
    model.train()
    record_model(model, [token_ids])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.eval()(token_ids).logits, before)


def test_padding_counts_nowhere_and_groups_are_kept(tmp_path):
    model, token_ids = tiny_model("olmoe"), ids()
    mask = torch.ones_like(token_ids)
    mask[1, 5:] = 0
    batch = {"input_ids": token_ids, "attention_mask": mask, "groups": torch.tensor([1, 0, 1])}
    record = record_model(model, [batch, batch], groups=("a", "b"), corpus="made up")
    assert record.arrays["tokens"].tolist() == [2 * 5, 2 * 18]
    assert record.of(0, "counts").sum(axis=1).tolist() == [2 * 2 * 5, 2 * 2 * 18]
    assert record.n_token_rows == 2 * 23
    alone = record_model(model, [token_ids[1:2, :5]])
    assert record.of(0, "counts")[0].tolist() == (2 * alone.counts(0)).tolist()
    # the last token before the padding has none to predict
    rows = (record.arrays["token/text"] == 1) & (record.arrays["token/position"] == 4)
    assert record.arrays["token/target"][rows].tolist() == [-1]
    again = RoutingRecord.load(record.save(tmp_path))
    assert again.layers == record.layers
    assert again.info["corpus"] == "made up"


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe",
                                    "minimax_m2", "ernie4_5_moe", "lfm2_moe", "hunyuan_v1_moe"])  # fmt: skip
def test_other_families(family):
    model, token_ids = tiny_model(family), ids()
    with ForeignRouting(model) as routing, torch.no_grad():
        model(token_ids)
        plans = routing.plans(token_ids.shape)
    record = record_model(model, [token_ids])
    assert len(plans) == len(record.layers) >= 1
    for layer, plan in enumerate(plans):
        assert record.counts(layer).sum() == 2 * 27
        assert plan.tokens_per_expert.tolist() == record.counts(layer).tolist()
        assert plan.router_probs is not None
        torch.testing.assert_close(plan.router_probs.sum(dim=1), torch.ones(27))


def test_sigmoid_routers_are_told_from_what_they_answer():
    model, token_ids = tiny_model("deepseek_v3"), ids()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                torch.nn.init.normal_(parameter)
    with ForeignRouting(model) as routing, torch.no_grad():
        model(token_ids)
        (plan,) = routing.plans(token_ids.shape)
    sigmoid = plan.router_logits.sigmoid()
    torch.testing.assert_close(plan.router_probs, sigmoid / sigmoid.sum(dim=1, keepdim=True))


def test_experts_of_another_process_are_left_out():
    index, weights = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    plan = _plan(index, weights, torch.zeros(2, 3), 3, RoutingContext((1, 2)))
    assert plan.tokens_per_expert.tolist() == [1, 1, 1]
    assert plan.token_index.tolist() == [0, 1, 1]
    assert plan.row_weight.tolist() == [0.25, 0.5, 0.5]


def test_what_has_no_experts_is_refused():
    with pytest.raises(ConfigError, match="must have experts that follow transformers' common interface"):
        record_model(torch.nn.Linear(2, 2), [])


def test_passes_are_read_one_by_one():
    model, token_ids = tiny_model("olmoe"), ids()
    with ForeignRouting(model) as routing, torch.no_grad():
        model(token_ids)
        model(token_ids)
        with pytest.raises(ConfigError, match=r"54 tokens .* once after each forward pass"):
            routing.plans(token_ids.shape)
