"""Pictures written code by code: generation and training say the same, whatever stands before."""

from __future__ import annotations

import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.task import TaskModelConfig
from moekit.models.build import build_model
from moekit.models.code_head import draw

INPUTS = {
    "ids": ({"sizes": [4]}, {"ids": torch.tensor([[1], [2], [3]])}),
    # texts of different lengths: a mask, and no cache
    "tokens": ({"vocab_size": 9}, {"ids": torch.tensor([[3, 4, 5], [6, 0, 0], [7, 8, 0]])}),
}


def config(stem: str, **head) -> TaskModelConfig:
    return TaskModelConfig.from_dict({
        "d_model": 16, "n_layers": 2, "n_heads": 2, "causal": True, "moe": {"n_experts": 4, "d_expert": 12},
        "stems": {"it": {"kind": stem, **INPUTS[stem][0]}},
        "heads": {"picture": {"kind": "codes", "codes": 7, "length": 6, **head}},
    })  # fmt: skip


@pytest.mark.parametrize("stem", INPUTS)
def test_what_is_drawn_is_what_training_finds_likeliest(stem):
    torch.manual_seed(0)
    model = build_model(config(stem, temperature=1e-6)).eval()
    # random weights agree on one code everywhere: larger ones do not
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        inputs = {"it": INPUTS[stem][1]}
        codes = model(inputs).answers["picture"]
        assert codes.shape == (3, 6)
        assert len(codes.unique()) > 2
        out = model(inputs, {"picture": codes})
    assert torch.equal(out.answers["picture"].argmax(dim=-1), codes)
    assert len(out.routing) == 2
    # alone as in a batch
    alone = {name: array[1:2] for name, array in INPUTS[stem][1].items()}
    with torch.no_grad():
        assert torch.equal(model({"it": alone}).answers["picture"], codes[1:2])


def test_a_code_sees_those_before_it_alone():
    torch.manual_seed(0)
    model = build_model(config("ids")).eval()
    inputs = {"it": INPUTS["ids"][1]}
    codes = torch.tensor([[0, 1, 2, 3, 4, 5]] * 3)
    other = codes.clone()
    other[:, 3] = 6
    with torch.no_grad():
        a, b = (model(inputs, {"picture": part}).answers["picture"] for part in (codes, other))
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4], b[:, 4])


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(20_000, 3)
    torch.manual_seed(1)
    first = draw(logits, 1.0, 1.0)
    shares = torch.bincount(first, minlength=3) / len(first)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)
    torch.manual_seed(1)
    assert torch.equal(draw(logits, 1.0, 1.0), first)
    # squared probabilities: 25 : 9 : 4
    colder = torch.bincount(draw(logits, 0.5, 1.0), minlength=3) / len(first)
    torch.testing.assert_close(colder, torch.tensor([25.0, 9.0, 4.0]) / 38, atol=0.02, rtol=0)
    # the first holds 0.5, with the second 0.8
    assert set(draw(logits, 1.0, 0.5).tolist()) == {0}
    assert set(draw(logits, 1.0, 0.6).tolist()) == {0, 1}


def test_it_stands_alone_on_a_causal_backbone():
    made = config("ids").to_dict()
    with pytest.raises(ConfigError, match=r"causal must be true for heads\.picture"):
        TaskModelConfig.from_dict({**made, "causal": False})
    heads = {**made["heads"], "kind": {"kind": "classify"}}
    with pytest.raises(ConfigError, match=r"heads must hold picture alone.*; got 'picture, kind'"):
        TaskModelConfig.from_dict({**made, "heads": heads})
    model = build_model(config("ids"))
    with pytest.raises(ConfigError, match=r"targets must hold the codes of 6 patches; got \(3, 5\)"):
        model({"it": INPUTS["ids"][1]}, {"picture": torch.zeros(3, 5, dtype=torch.long)})
