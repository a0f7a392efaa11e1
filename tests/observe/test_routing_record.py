"""What a record holds, against plans worked by hand; written, read and added up."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError, DataError
from moekit.layers.moe import MoE
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.observe.choices import choices_of
from moekit.observe.record import LayerInfo, RoutingRecord, joined
from moekit.observe.recorder import Recorder, layers_of

LAYERS = (LayerInfo("first", 3, "softmax"), LayerInfo("second", 2, "softmax"))


def plans(mask: torch.Tensor | None = None) -> list[RoutingPlan]:
    """Two texts of two tokens: token 0 chooses 2 and 0, token 1 chooses 1 and 2, 2 as 0, 3 as 1; then 0, 1, 0, 0."""
    context = RoutingContext((2, 2), mask)
    choices = torch.tensor([[0, 2], [1, 2], [0, 2], [1, 2]])
    weights = torch.tensor([[0.1, 0.9], [0.6, 0.4], [0.1, 0.9], [0.6, 0.4]])
    probs = torch.tensor([[0.1, 0.0, 0.9], [0.0, 0.6, 0.4], [0.1, 0.0, 0.9], [0.0, 0.6, 0.4]])
    first = RoutingPlan.from_choices(choices, weights, 3, context, router_probs=probs)
    second = RoutingPlan.from_choices(torch.tensor([[0], [1], [0], [0]]), torch.ones(4, 1), 2, context)
    return [first, second]


def recorded(mask: torch.Tensor | None = None, **fields) -> RoutingRecord:
    recorder = Recorder(LAYERS, ("news", "code"), tokens=1.0, **fields)
    recorder.add(
        plans(mask), token_ids=torch.tensor([[7, 8], [9, 7]]), groups=torch.tensor([0, 1]),
        targets=torch.tensor([[8, -100], [7, 5]]), step=3,
    )  # fmt: skip
    return recorder.record(run="runs/x-1")


def test_sums_by_hand():
    record = recorded()
    assert record.arrays["tokens"].tolist() == [2, 2]
    assert record.of(0, "counts").tolist() == [[1, 1, 2], [1, 1, 2]]
    np.testing.assert_allclose(record.of(0, "weights"), [[0.1, 0.6, 1.3]] * 2, rtol=1e-6)
    np.testing.assert_allclose(record.of(0, "probs"), [[0.1, 0.6, 1.3]] * 2, rtol=1e-6)
    np.testing.assert_allclose(record.of(0, "margin"), [0.8 + 0.2] * 2, rtol=1e-6)
    entropy = -(0.1 * np.log(0.1) + 0.9 * np.log(0.9) + 0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    np.testing.assert_allclose(record.of(0, "entropy"), [entropy] * 2, rtol=1e-6)
    assert record.of(0, "requested").tolist() == [2, 2, 4]
    assert record.of(0, "dropped").tolist() == [0]
    np.testing.assert_allclose(record.of(0, "violation"), [4 / (8 / 3) - 1, 1])
    assert record.of(0, "pairs").tolist() == [[2, 0, 2], [0, 2, 2], [2, 2, 4]]
    # the heaviest: 2, 1, 2, 1; then 0, 1, 0, 0
    assert record.of(0, "flow").tolist() == [[0, 0], [1, 1], [2, 0]]
    assert record.of(1, "counts").tolist() == [[1, 1], [2, 0]]
    assert not record.has(1, "flow")
    assert not record.has(1, "probs")
    assert record.counts(1).tolist() == [3, 1]


def test_rows_of_tokens():
    record = recorded()
    assert record.n_token_rows == 4
    assert record.of(0, "token/experts").tolist() == [[2, 0], [1, 2], [2, 0], [1, 2]]
    np.testing.assert_allclose(record.of(0, "token/weights")[1], [0.6, 0.4], rtol=1e-3)
    assert record.arrays["token/id"].tolist() == [7, 8, 9, 7]
    assert record.arrays["token/target"].tolist() == [8, -1, 7, 5]
    assert record.arrays["token/predicted"].tolist() == [-1] * 4
    assert record.arrays["token/group"].tolist() == [0, 0, 1, 1]
    assert record.arrays["token/text"].tolist() == [0, 0, 1, 1]
    assert record.arrays["token/position"].tolist() == [0, 1, 0, 1]
    assert set(record.arrays["token/step"].tolist()) == {3}
    assert np.isnan(record.of(1, "token/entropy")).all()


def test_padding_counts_nowhere():
    record = recorded(torch.tensor([True, False, True, True]))
    assert record.arrays["tokens"].tolist() == [1, 2]
    assert record.of(0, "counts").tolist() == [[1, 0, 1], [1, 1, 2]]
    np.testing.assert_allclose(record.of(0, "probs")[0], [0.1, 0.0, 0.9], rtol=1e-6)
    assert record.arrays["token/id"].tolist() == [7, 9, 7]


def test_a_sample_keeps_the_sums():
    recorder = Recorder(LAYERS, tokens=0.5, most=5)
    for _ in range(10):
        recorder.add(plans())
    record = recorder.record()
    assert record.n_tokens == 40
    assert record.n_token_rows == 5
    assert record.of(0, "counts").tolist() == [[20, 20, 40]]
    assert recorder.record().info == {"share_of_tokens": 0.5}
    nothing = Recorder(LAYERS)
    nothing.add(plans())
    assert nothing.record().n_token_rows == 0
    assert not nothing.record().has(0, "pairs")


def test_written_and_read(tmp_path):
    record = recorded()
    again = RoutingRecord.load(record.save(tmp_path / "routing"))
    assert again.layers == record.layers
    assert again.groups == record.groups
    assert again.info == {"share_of_tokens": 1.0, "run": "runs/x-1"}
    assert set(again.arrays) == set(record.arrays)
    for name, array in record.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
        assert again.arrays[name].dtype == array.dtype


def test_two_records_add_up():
    whole = Recorder(LAYERS, ("news", "code"), tokens=1.0)
    for _ in range(2):
        whole.add(
            plans(), token_ids=torch.tensor([[7, 8], [9, 7]]), groups=torch.tensor([0, 1]),
            targets=torch.tensor([[8, -100], [7, 5]]), step=3,
        )  # fmt: skip
    both, expected = recorded() + recorded(), whole.record()
    for name, array in expected.arrays.items():
        if name != "token/text":
            np.testing.assert_allclose(both.arrays[name], array, err_msg=name)
    with pytest.raises(ConfigError, match="groups"):
        recorded() + Recorder(LAYERS).record()


def test_damaged_records_say_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match=r"holds no routing record: it has no routing\.json"):
        RoutingRecord.load(tmp_path)
    folder = recorded().save(tmp_path / "r")
    said = json.loads((folder / "routing.json").read_text("utf-8"))
    (folder / "routing.json").write_text(json.dumps({**said, "version": 99}), "utf-8")
    with pytest.raises(DataError, match="version 99"):
        RoutingRecord.load(folder)
    said["layers"][0]["n_experts"] = 4
    (folder / "routing.json").write_text(json.dumps(said), "utf-8")
    with pytest.raises(DataError, match=r"0/counts must have shape \[2, 4\]; got \(2, 3\)"):
        RoutingRecord.load(folder)


def test_a_damaged_file_is_named(tmp_path):
    recorder = Recorder([LayerInfo("moe", 4, "softmax")])
    folder = recorder.record().save(tmp_path)
    whole = (folder / "routing.safetensors").read_bytes()
    (folder / "routing.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"routing\.safetensors cannot be read"):
        RoutingRecord.load(folder)
    (folder / "routing.safetensors").unlink()
    with pytest.raises(DataError, match=r"routing\.safetensors cannot be read"):
        RoutingRecord.load(folder)
    (folder / "routing.safetensors").write_bytes(whole)
    said = json.loads((folder / "routing.json").read_text())
    del said["groups"]
    (folder / "routing.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match=r"routing\.json is no routing record: 'groups'"):
        RoutingRecord.load(folder)


@pytest.mark.parametrize("router", ["softmax", "expert_choice", "soft", "random", "top_p"])
def test_routers_of_every_kind(router):
    torch.manual_seed(0)
    layer = MoE(8, d_expert=8, n_experts=4, top_k=2, router=router)
    plan = layer(torch.randn(2, 6, 8)).routing
    chosen = choices_of(plan)
    assert chosen.experts.shape[0] == 12
    # weights of a token stand in falling order, and are those of the plan
    assert (chosen.weights[:, :-1] >= chosen.weights[:, 1:]).all()
    expected = torch.zeros(12) if plan.slots is None else plan.slots.combine.flatten(0, 1).sum(dim=1)
    if plan.slots is None:
        expected.index_add_(0, plan.token_index, plan.row_weight.detach())
    torch.testing.assert_close(chosen.weights.sum(dim=1), expected.detach())
    some = choices_of(plan, torch.tensor([3, 7]))
    k = some.experts.shape[1]
    assert torch.equal(some.experts, chosen.experts[[3, 7], :k])
    recorder = Recorder([LayerInfo("moe", plan.n_experts, router)], tokens=1.0)
    recorder.add([plan])
    assert recorder.record().counts(0).sum() == plan.tokens_per_expert.sum()


def test_layers_of_a_model():
    from moekit.config.model import ModelConfig
    from moekit.models.build import build_model

    model = build_model(ModelConfig.from_dict({
        "vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 16,
        "moe": {"n_experts": 4, "top_k": 1, "d_expert": 8, "null_experts": {"zero": 1}},
    }))  # fmt: skip
    layers = layers_of(model)
    assert [layer.name for layer in layers] == [
        "backbone.layers.0.feed_forward",
        "backbone.layers.1.feed_forward",
    ]
    assert (layers[0].n_experts, layers[0].n_null_experts, layers[0].router) == (5, 1, "softmax")
    assert [layers[0].label(expert) for expert in (0, 3, 4)] == ["0", "3", "null 0"]


def test_parts_of_other_widths_join():
    parts = (
        np.array([[3]], dtype=np.int16),
        np.array([[1, 2]], dtype=np.int16),
        np.zeros((0, 3), dtype=np.int16),
    )
    assert joined(*parts).tolist() == [[3, -1, -1], [1, 2, -1]]
    assert joined(np.array([0.5]), np.array([0.25])).tolist() == [0.5, 0.25]
