"""Every stem with every head: shapes, gradients that reach every part, the balancing loss passed on, weights back."""

from __future__ import annotations

import pytest
import torch

from moekit.config.task import TaskModelConfig
from moekit.config.train import OptimizerConfig
from moekit.data.task_loader import count_known
from moekit.models.build import build_model
from moekit.models.task_heads import HEADS
from moekit.models.task_model import TaskModel
from moekit.models.task_stems import STEMS
from moekit.train.optimizer import build_optimizer

B = 5

# configuration, arrays, and how many tokens the stem gives
torch.manual_seed(0)  # the same inputs in every run
STEM_CASES = {
    "tokens": ({"vocab_size": 11},
               {"ids": torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0], [7, 8, 9, 10], [1, 2, 0, 0], [5, 5, 5, 0]])}, 4),
    "words": ({"vocab_size": 6, "buckets": 9, "mix": 1},
              {"ids": torch.tensor([[2, 3, 4], [1, 0, 0], [5, 1, 0], [3, 3, 3], [2, 0, 0]]),
               "parts": torch.tensor([[[1, 2], [3, 0], [9, 4]], [[0, 0]] * 3, [[5, 6], [7, 8], [0, 0]],
                                      [[1, 1], [2, 2], [3, 3]], [[4, 0], [0, 0], [0, 0]]])}, 3),
    "bag": ({"vocab_size": 7}, {"ids": torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6], [1, 0, 0], [0, 0, 0]]),
                                "weights": torch.rand(B, 3)}, 1),
    "patches": ({"channels": 2, "height": 6, "width": 4, "patch": 2, "convolutions": 1},
                {"pixels": torch.randn(B, 2, 6, 4)}, 6),
    "frames": ({"n_features": 3, "stride": 2},
               {"frames": torch.randn(B, 7, 3), "lengths": torch.tensor([7, 1, 4, 6, 2])}, 4),
    "fields": ({"n_numbers": 2, "sizes": [3, 4], "list_sizes": [2, 3]},
               {"numbers": torch.tensor([[0.1, float("nan")]] * B), "categories": torch.tensor([[2, 3]] * B),
                "lists": torch.rand(B, 5)}, 6),
    "ids": ({"sizes": [4, 5], "products": [[0, 1]], "complex": True},
            {"ids": torch.tensor([[0, 4], [3, 0], [1, 1], [2, 2], [0, 0]])}, 3),
    "profile": ({"size": 6}, {"ids": torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 1], [1, 0, 0], [0, 0, 0]]),
                              "weights": torch.randn(B, 3), "numbers": torch.randn(B, 2),
                              "sizes": torch.tensor([2.0, 1.0, 9.0, 1.0, 0.0])}, 2),
    "tubelets": ({"channels": 1, "length": 4, "height": 4, "width": 6, "patch": 2, "frames": 2},
                 {"clips": torch.randn(B, 4, 1, 4, 6)}, 12),
}  # fmt: skip
GRID = {"stem": "it", "height": 6, "width": 4, "patch": 2}
# configuration, targets, shape of the answer with S tokens; a second case of a head has a word behind its kind
HEAD_CASES = {
    "classify": ({"labels": ["a", "b", "c"]}, lambda s: torch.tensor([0, 1, 2, -100, 1]), lambda s: (B, 3)),
    "regress": ({"means": [1.0, 2.0], "deviations": [1.0, 3.0]},
                lambda s: torch.tensor([[1.0, float("nan")], [0.0, 2.0], [3.0, 1.0], [1.0, 1.0], [2.0, 2.0]]),
                lambda s: (B, 2)),
    "tag": ({"labels": ["O", "X"], "stem": "it"}, lambda s: torch.ones(B, s, dtype=torch.long), lambda s: (B, s, 2)),
    "tag crf": ({"labels": ["B-X", "I-X", "O"], "stem": "it", "crf": True, "bio": True},
                lambda s: torch.tensor([[2, 0, 1, 1, 2, 0][:s] + [2] * max(0, s - 6)] * B)
                .masked_fill(torch.arange(B)[:, None] == 1, -100),
                lambda s: (B, s, 3)),
    "rank": ({"n_entities": 3, "stem": "it", "wide": 1}, lambda s: torch.tensor([0, 1, 2, -100, 1]), lambda s: (B, 3)),
    "sequence": ({"vocab_size": 9, "layers": 1, "max_len": 6},
                 lambda s: torch.tensor([[3, 4, 0], [0, -100, -100], [5, 5, 5], [2, 0, -100], [7, 8, 0]]),
                 lambda s: (B, 3, 8)),
    "span": ({"stem": "it", "may_be_empty": True},
             lambda s: torch.tensor([[0, 0], [1, 1], [-100, -100], [1, 1], [1, 1]]), lambda s: (B, 1 + s, 2)),
    "policy": ({"actions": ["left", "stay", "right"]},
               lambda s: torch.tensor([[0.0, 1.0], [2.0, -0.5], [float("nan"), 1.0], [1.0, 2.0], [1.0, 0.5]]),
               lambda s: (B, 3)),
    "value": ({"mean": 1.0, "deviation": 3.0}, lambda s: torch.tensor([1.0, float("nan"), 0.0, 4.0, -2.0]),
              lambda s: (B,)),
    "detect": ({"labels": ["a", "b"], "typical": [2.0, 3.0], **GRID},
               lambda s: torch.tensor([[[0.0, 1, 2, 2, 1], [4, 0, 2, 3, 0]]] * 4 + [[[0.0] * 5] * 2]),
               lambda s: (B, 6, 7)),
    "segment": ({"classes": 3, "channels": 2, "refine": 4, **GRID},
                lambda s: torch.arange(B * 24).view(B, 6, 4) % 3, lambda s: (B, 3, 6, 4)),
    "codes": ({"codes": 5, "length": 3}, lambda s: torch.tensor([[0, 4, 1]] * B), lambda s: (B, 3, 5)),
    "ctc": ({"labels": ["x", "y"], "stem": "it"}, lambda s: torch.tensor([[1], [2], [1], [2], [-100]]),
            lambda s: (B, s, 3)),
}  # fmt: skip
# heads that need something of the stem or of the model, and the tokens that a head adds to the stem's
STEMS_OF = {"detect": {"patches"}, "segment": {"patches"}, "rank": {"tokens", "ids"}}
FIELDS_OF = {"codes": {"causal": True}}
ADDED = {"codes": 3}
POOLED = {"classify", "regress"}
PAIRS = [(stem, head) for stem in STEM_CASES for head in HEAD_CASES if stem in STEMS_OF.get(head, STEM_CASES)]


def config(stem: str, head: str, **fields) -> TaskModelConfig:
    moe = {
        "n_experts": 4,
        "top_k": 2,
        "d_expert": 6,
        "balance": {"load_balance": 0.1},
        **fields.pop("moe", {}),
    }
    return TaskModelConfig.from_dict({
        "d_model": 8, "n_layers": 2, "n_heads": 2, "moe": moe,
        "stems": {"it": {"kind": stem, **STEM_CASES[stem][0]}},
        "heads": {"answer": {"kind": head.split()[0], **HEAD_CASES[head][0]}},
        **FIELDS_OF.get(head, {}), **fields,
    })  # fmt: skip


def call(model: TaskModel, stem: str, head: str, **more):
    _, arrays, n = STEM_CASES[stem]
    return model({"it": arrays}, {"answer": HEAD_CASES[head][1](n)}, **more)


def test_every_stem_and_head_is_in_the_contract():
    assert set(STEMS) == set(STEM_CASES)
    assert set(HEADS) == {head.split()[0] for head in HEAD_CASES}


@pytest.mark.parametrize(("stem", "head"), PAIRS)
def test_shapes_and_gradients_of_every_part(stem, head):
    torch.manual_seed(0)
    model = build_model(config(stem, head, pooling="attention"))
    out = call(model, stem, head)
    n = STEM_CASES[stem][2]
    assert out.hidden_states.shape == (B, n + ADDED.get(head, 0), 8)
    assert out.answers["answer"].shape == HEAD_CASES[head][2](n)
    assert out.answers["answer"].dtype == torch.float32
    assert out.loss.shape == ()
    assert out.n_targets > 0
    assert len(out.routing) == len(model.moe_layers) >= 2
    (out.loss + sum(out.aux_losses.values())).backward()
    # only what is pooled away may be without a gradient
    spared = set() if head in POOLED else {"pooling.score"}
    if head == "tag crf" and n == 1:
        spared.add("heads.answer.chain.follows")  # one tag follows none
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(spared)) or not spared:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


# a policy's targets are actions with their advantages, of which it needs both
@pytest.mark.parametrize(("stem", "head"), [pair for pair in PAIRS if pair[1] != "policy"])
def test_heads_count_targets_as_the_loader_does(stem, head):
    """The loss of a part of a batch weighs as much as it has targets: both sides must count the same."""
    out = call(build_model(config(stem, head)), stem, head)
    assert out.n_targets == count_known(HEAD_CASES[head][1](STEM_CASES[stem][2]))


@pytest.mark.parametrize(("stem", "head"), PAIRS)
def test_the_balancing_loss_is_passed_on(stem, head):
    """The gradient of the whole loss changes with the coefficient of the loss beneath the head."""
    from moekit.layers.balancing import weighted_aux_loss

    torch.manual_seed(0)
    model = build_model(config(stem, head))
    out = call(model, stem, head)
    assert float(out.aux_losses["load_balance"].detach()) > 0
    totals = {
        coefficient: out.loss + weighted_aux_loss(
            out.aux_losses, model.config.moe.balance.replace(load_balance=coefficient, router_z=0.0)
        )
        for coefficient in (0.0, 0.5)
    }  # fmt: skip
    difference = totals[0.5] - totals[0.0]
    assert float(difference.detach()) == pytest.approx(
        0.5 * float(out.aux_losses["load_balance"].detach()), rel=1e-4
    )
    for layer in model.moe_layers:  # those of the backbone, and of the head where it has some
        (gradient,) = torch.autograd.grad(difference, layer.router.weight, retain_graph=True)
        assert float(gradient.norm()) > 0


@pytest.mark.parametrize(("stem", "head"), PAIRS)
def test_weights_come_back_and_an_optimizer_takes_them(stem, head):
    torch.manual_seed(0)
    model, again = build_model(config(stem, head)).eval(), build_model(config(stem, head)).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(
            call(model, stem, head).answers["answer"], call(again, stem, head).answers["answer"]
        )
    grouped = sum(
        p.numel() for group in build_optimizer(model, OptimizerConfig()).param_groups for p in group["params"]
    )
    assert grouped == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stem", ["tokens", "frames"])
@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
@pytest.mark.parametrize("router", ["softmax", "expert_choice"])
def test_padding_changes_nothing(stem, pooling, router):
    torch.manual_seed(0)
    balance = {"balance": {"load_balance": 0.0, "router_z": 0.0}} if router == "expert_choice" else {}
    model = build_model(config(stem, "classify", pooling=pooling, moe={"router": router, **balance})).eval()
    _, arrays, _ = STEM_CASES[stem]
    if stem == "tokens":
        longer = {"ids": torch.nn.functional.pad(arrays["ids"], (0, 3))}
    else:
        longer = {
            "frames": torch.nn.functional.pad(arrays["frames"], (0, 0, 0, 5), value=9.0),
            "lengths": arrays["lengths"],
        }
        # frames beyond an example's length say nothing, whatever they hold
        for row, length in enumerate(arrays["lengths"].tolist()):
            longer["frames"][row, length:] = 0.0
            arrays["frames"][row, length:] = 0.0
    with torch.no_grad():
        short, long = (model({"it": part}).answers["answer"] for part in (arrays, longer))
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
    if stem == "tokens":
        changed = arrays["ids"].clone()
        changed[0, 2] = 9
        with torch.no_grad():
            assert not torch.allclose(model({"it": {"ids": changed}}).answers["answer"][0], short[0])


def test_later_tokens_are_seen_unless_it_is_causal():
    torch.manual_seed(0)
    for causal in (False, True):
        model = build_model(config("tokens", "tag", causal=causal)).eval()
        ids = torch.tensor([[1, 2, 3, 4]])
        other = torch.tensor([[1, 2, 3, 5]])
        with torch.no_grad():
            a, b = (model({"it": {"ids": part}}).answers["answer"][0, 0] for part in (ids, other))
        assert torch.equal(a, b) == causal


def test_several_stems_and_heads():
    fields = {"d_model": 8, "n_layers": 1, "n_heads": 2, "moe": {"n_experts": 4, "d_expert": 6}}
    stems = {name: {"kind": name, **case[0]} for name, case in STEM_CASES.items()}
    # one that writes a picture stands alone
    heads = {
        name: {"kind": name.split()[0], **case[0]}
        for name, case in HEAD_CASES.items()
        if name not in FIELDS_OF
    }
    heads["regress"]["weight"] = 0.25
    for name, head in heads.items():
        if "stem" in head:
            head["stem"] = "ids" if name == "rank" else "patches" if name in STEMS_OF else "frames"
    model = build_model(TaskModelConfig.from_dict({**fields, "stems": stems, "heads": heads}))
    inputs = {name: case[1] for name, case in STEM_CASES.items()}
    out = model(inputs, {name: HEAD_CASES[name][1](STEM_CASES["frames"][2]) for name in heads})
    assert {name: place.stop - place.start for name, place in out.places.items()} == {
        name: case[2] for name, case in STEM_CASES.items()
    }
    assert set(out.losses) == set(heads)
    expected = sum(out.losses.values()) - 0.75 * out.losses["regress"]
    torch.testing.assert_close(out.loss, expected)
    assert model.modalities is not None
