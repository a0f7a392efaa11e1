"""Optimizer groups and the bit-exact way of its state through a file."""

import copy

import pytest
import torch
from torch import nn

from moekit.config.errors import CheckpointError, ConfigError
from moekit.config.model import ModelConfig, TransformerXLConfig
from moekit.config.moe import MoEConfig, NullExpertsConfig
from moekit.config.task import TaskModelConfig
from moekit.config.train import OptimizerConfig
from moekit.layers.experts import StackedMLP
from moekit.layers.moe import MoE
from moekit.models.build import build_model
from moekit.train.checkpoints import load_checkpoint, save_checkpoint
from moekit.train.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
)

CONFIG = OptimizerConfig(
    lr=0.01, router_lr_scale=0.5, expert_lr_scale=2.0, embedding_lr_scale=3.0, weight_decay=0.1
)


class Block(nn.Module):
    def __init__(self, **fields):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.moe = MoE(8, n_experts=4, d_expert=6, **fields)


class Model(nn.Module):
    def __init__(self, tied=True, **fields):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(**fields)])
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.embedding(ids)
        for block in self.layers:
            hidden = hidden + block.moe(block.norm(hidden)).hidden_states
        return self.head(hidden)


def full_model(**fields):
    return Model(bias=True, n_shared_experts=1, shared_gate=True,
                 null_experts=NullExpertsConfig(zero=1, copy_input=1, constant=2), **fields)  # fmt: skip


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(10, (4, 12), generator=generator)
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_parameter_of_a_full_model_is_in_its_group():
    groups = parameter_groups(full_model(tied=False))
    moe = "layers.0.moe"
    assert groups == {
        "embedding.weight": "embeddings",
        "layers.0.norm.weight": "vectors",
        "layers.0.norm.bias": "vectors",
        f"{moe}.router.weight": "routers",
        f"{moe}.experts.parts.0.w_in": "experts",
        f"{moe}.experts.parts.0.w_out": "experts",
        f"{moe}.experts.parts.0.b_in": "expert_vectors",  # two axes, the first of which counts experts
        f"{moe}.experts.parts.0.b_out": "expert_vectors",
        f"{moe}.experts.parts.1.vectors": "expert_vectors",
        f"{moe}.experts.parts.1.mix": "experts",
        f"{moe}.shared.mlp.w_in.weight": "matrices",
        f"{moe}.shared.mlp.w_in.bias": "vectors",
        f"{moe}.shared.mlp.w_out.weight": "matrices",
        f"{moe}.shared.mlp.w_out.bias": "vectors",
        f"{moe}.shared.gate.weight": "matrices",
        "head.weight": "matrices",
    }


def test_groups_have_the_scales_and_decay_of_the_configuration():
    model = full_model(tied=False)
    optimizer = build_optimizer(model, CONFIG)
    got = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert got == {
        "matrices": (0.01, 0.1),
        "vectors": (0.01, 0.0),
        "embeddings": (0.03, 0.0),
        "experts": (0.02, 0.1),
        "expert_vectors": (0.02, 0.0),
        "routers": (0.005, 0.1),
    }
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}

    set_learning_rate(optimizer, 0.002)
    got = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert got == pytest.approx({"matrices": 0.002, "vectors": 0.002, "embeddings": 0.006, "experts": 0.004,
                                 "expert_vectors": 0.004, "routers": 0.001})  # fmt: skip


def test_decay_reaches_matrices_only():
    """With gradients of zero AdamW's step is the decay alone: w *= 1 - lr * weight_decay."""
    model = full_model(tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    lr = {"matrices": 0.01, "experts": 0.02, "routers": 0.005}
    for name, group in parameter_groups(model).items():
        value = model.get_parameter(name)
        torch.testing.assert_close(value, torch.full_like(value, 1 - 0.1 * lr.get(group, 0.0)))


def test_tied_output_counts_once_as_embedding():
    model = Model(tied=True)
    assert parameter_groups(model)["embedding.weight"] == "embeddings"
    assert "head.weight" not in parameter_groups(model)
    swapped = nn.Sequential(nn.Linear(4, 10, bias=False), nn.Embedding(10, 4))  # the output stands first
    swapped[0].weight = swapped[1].weight
    assert parameter_groups(swapped) == {"0.weight": "embeddings"}


@pytest.mark.parametrize("tied", [True, False])
def test_groups_of_the_models(tied):
    decoder = build_model(ModelConfig(vocab_size=16, d_model=8, n_layers=2, n_heads=2, d_ff=8, qk_norm="head",
                                      attention_bias=True, tie_embeddings=tied, n_dense_layers=1,
                                      moe=MoEConfig(n_experts=4, d_expert=4)))  # fmt: skip
    recurrent = build_model(TransformerXLConfig(vocab_size=16, d_model=8, n_layers=1, n_heads=2, d_ff=8,
                                                tie_embeddings=tied))  # fmt: skip
    for model in (decoder, recurrent):
        groups = parameter_groups(model)
        assert [name for name, group in groups.items() if group == "embeddings"] == ["stem.weight"]
        assert groups.get("head.weight", "tied") == ("tied" if tied else "matrices")
        for name, parameter in model.named_parameters():
            assert (groups[name] in ("vectors", "expert_vectors")) == (parameter.ndim == 1), name
    assert {
        name.split(".")[-2] for name, group in parameter_groups(decoder).items() if group == "routers"
    } == {"router"}
    assert sum(group == "experts" for group in parameter_groups(decoder).values()) == 2


def test_tables_of_stems_have_a_rate_of_their_own_and_their_maps_have_not():
    model = build_model(TaskModelConfig.from_dict({
        "d_model": 8, "n_layers": 1, "n_heads": 2, "heads": {"it": {"kind": "classify", "labels": ["a", "b"]}},
        "stems": {"text": {"kind": "words", "vocab_size": 5, "buckets": 7, "mix": 1}, "it": {"kind": "patches"}},
    }))  # fmt: skip
    groups = {name: group for name, group in parameter_groups(model).items() if name.startswith("stems.")}
    assert groups == {
        "stems.text.weight": "stems", "stems.text.parts": "stems", "stems.text.neighbours.weight": "matrices",
        "stems.text.neighbours.bias": "vectors", "stems.it.places": "stems", "stems.it.cut.weight": "matrices",
        "stems.it.cut.bias": "vectors",
    }  # fmt: skip
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.01, stem_lr_scale=10.0))
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"matrices": 0.01, "vectors": 0.01, "stems": 0.1})


def test_experts_of_any_structure_and_outside_a_layer():
    modules = [nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8)), nn.Linear(8, 8)]
    layer = MoE(8, experts=modules, top_k=1)
    groups = parameter_groups(nn.ModuleDict({"feed_forward": layer}))
    assert groups["feed_forward.experts.0.0.weight"] == groups["feed_forward.experts.1.weight"] == "experts"
    assert groups["feed_forward.experts.0.0.bias"] == "expert_vectors"
    assert parameter_groups(StackedMLP(2, 4, 4, bias=True)) == {
        "w_in": "experts", "w_out": "experts", "b_in": "expert_vectors", "b_out": "expert_vectors"
    }  # fmt: skip


def test_a_router_inside_an_expert_and_an_expert_inside_a_router():
    inner = nn.ModuleDict(
        {"experts": nn.ModuleList([nn.ModuleDict({"router": nn.Linear(4, 2, bias=False)})])}
    )
    assert parameter_groups(inner) == {"experts.0.router.weight": "routers"}
    outer = nn.ModuleDict(
        {"router": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 2, bias=False)])})}
    )
    assert parameter_groups(outer) == {"router.experts.0.weight": "experts"}


def test_one_tensor_in_two_roles_is_refused():
    model = nn.ModuleDict(
        {"router": nn.Linear(4, 4, bias=False), "experts": nn.ModuleList([nn.Linear(4, 4, bias=False)])}
    )
    model["experts"][0].weight = model["router"].weight
    with pytest.raises(
        ConfigError, match=r"router\.weight.*must have one role.*experts\.0\.weight in experts"
    ):
        build_optimizer(model, CONFIG)


def test_frozen_parameters_are_left_out():
    model = Model()
    for parameter in model.layers.parameters():
        parameter.requires_grad_(False)
    assert set(parameter_groups(model)) == {"embedding.weight"}
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter to train"):
        build_optimizer(model, CONFIG)


def test_fused_on_cpu_and_a_plain_one_where_there_is_no_kernel():
    assert build_optimizer(nn.Linear(2, 2), CONFIG).defaults["fused"] is True
    model = nn.Linear(2, 2, dtype=torch.complex64)  # torch has no fused kernel for complex numbers
    optimizer = build_optimizer(model, CONFIG)
    assert not any(group["fused"] for group in optimizer.param_groups)
    model(torch.ones(1, 2, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()
    assert not build_optimizer(nn.Linear(2, 2, device="meta"), CONFIG).defaults["fused"]


@pytest.mark.parametrize("fused", [True, False])
def test_resume_through_a_file_is_bit_exact(tmp_path, fused):
    torch.manual_seed(0)
    model = full_model(tied=True)
    optimizer = build_optimizer(model, CONFIG)
    if not fused:
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=0.01, fused=False, foreach=False)
        for group in optimizer.param_groups:
            group.update(fused=False)
    train(model, optimizer, 3, seed=1)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(optimizer, model).items()}
    path = save_checkpoint(tmp_path, 3, tensors, {}, keep=1)
    before = copy.deepcopy(optimizer_tensors(optimizer, model))
    train(model, optimizer, 3, seed=2)

    torch.manual_seed(99)
    other = full_model(tied=True)
    other_optimizer = build_optimizer(other, CONFIG)
    if not fused:
        other_optimizer = torch.optim.AdamW(other_optimizer.param_groups, lr=0.01, fused=False, foreach=False)
        for group in other_optimizer.param_groups:
            group.update(fused=False)
    loaded, _ = load_checkpoint(path)
    other.load_state_dict({name[6:]: value for name, value in loaded.items() if name.startswith("model.")})
    state = {name[10:]: value for name, value in loaded.items() if name.startswith("optimizer.")}
    load_optimizer_tensors(other_optimizer, other, state)
    after = optimizer_tensors(other_optimizer, other)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
        assert value.dtype == after[name].dtype

    train(other, other_optimizer, 3, seed=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    # what was loaded is a copy: training on must not have changed it
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_a_fresh_optimizer_has_no_state_and_loading_none_clears_it():
    model = Model()
    optimizer = build_optimizer(model, CONFIG)
    assert optimizer_tensors(optimizer, model) == {}
    train(model, optimizer, 1, seed=0)
    assert optimizer_tensors(optimizer, model)
    load_optimizer_tensors(optimizer, model, {})
    assert optimizer_tensors(optimizer, model) == {}


def test_an_expert_that_never_had_a_token_has_no_state_and_still_resumes():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = build_optimizer(model, CONFIG)
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer_tensors(optimizer, model))
    assert {name.split(".")[0] for name in state} == {"0"}
    load_optimizer_tensors(optimizer, model, state)
    assert optimizer_tensors(optimizer, model).keys() == state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"embeding.weight.exp_avg": torch.ones(1)}), "did you mean 'embedding.weight'"),
        (lambda s: s.update({"embedding.weight.exp_avg": torch.ones(10, 9)}), r"is \[10, 9\]"),
        (lambda s: s.update({"embedding.weight.exp_avg": torch.ones(10, 8).double()}), r"torch\.float64"),
        (lambda s: s.pop("embedding.weight.exp_avg_sq"), "'embedding.weight' lacks exp_avg_sq"),
    ],
)
def test_state_of_another_model_is_refused_and_changes_nothing(change, message):
    model = Model()
    optimizer = build_optimizer(model, CONFIG)
    train(model, optimizer, 1, seed=0)
    state = copy.deepcopy(optimizer_tensors(optimizer, model))
    changed = dict(state)
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_tensors(optimizer, model, changed)
    assert all(torch.equal(value, state[name]) for name, value in optimizer_tensors(optimizer, model).items())


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match="not in the model"):
        optimizer_tensors(build_optimizer(Model(), CONFIG), Model())
