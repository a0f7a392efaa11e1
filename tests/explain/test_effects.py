"""Single experts switched off: where the effect is known, and many edits in a pass against one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.data.documents import Document
from moekit.data.tokenizer import train_tokenizer
from moekit.explain.edits import Off, Swap, edited
from moekit.explain.effects import Ablation, Cell, Reading
from moekit.explain.predictions import explain_text, parse_swap
from moekit.layers.moe import MoE
from moekit.models.build import build_model

TEXT = "ab ba abba 中文 ab"


class Writes(nn.Module):
    """An expert that says the same of every token."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values))

    def forward(self, x):
        return self.values.expand(len(x), -1)


class OneLayer(nn.Module):
    """A layer by itself on fixed vectors `[S, 4]`; expert 1 alone writes the first number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        written = [[0, 1.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 0]]
        self.moe_layers = nn.ModuleList(
            [MoE(4, experts=[Writes(values) for values in written], top_k=2, d_out=4)]
        )
        self.tokens = torch.randn(7, 4)

    def read(self, copies: int) -> Reading:
        out = self.moe_layers[0](self.tokens.expand(copies, -1, -1))
        return Reading(out.hidden_states[:, :, 0], (out.routing,))


def test_an_expert_that_alone_writes_a_number():
    model = OneLayer().eval()
    ablation = Ablation(model, model.read)
    cells = ablation.cells()
    changes = ablation.answers(cells) - ablation.plain.answers
    weights = torch.zeros(7, 4)
    plan = ablation.plain.plans[0]
    weights[plan.token_index, plan.expert_of_row()] = plan.row_weight.detach()
    assert 0 < (weights[:, 1] > 0).sum() < 7
    for cell, change in zip(cells, changes, strict=True):
        expected = torch.zeros(7)
        if cell.expert == 1:
            mine = slice(None) if cell.token is None else cell.token
            expected[mine] = -5 * weights[mine, 1]
        torch.testing.assert_close(change, expected, msg=str(cell))
    assert {cell.expert for cell in cells if cell.token is None} == set(range(4))


def test_what_stands_in_its_place():
    model = OneLayer().eval()
    plain = Ablation(model, model.read)
    token = next(token for token, row in enumerate(plain.chosen(0)) if 1 in row)
    (other,) = set(plain.chosen(0)[token]) - {1}
    weight = float(plain.plain.answers[0, token]) / 5
    shared = Ablation(model, model.read, "share").answers([Cell(0, other, token)])[0, token]
    assert float(shared) == pytest.approx(5.0), "expert 1 has the other's weight too"
    kept = Ablation(model, model.read, "next").answers([Cell(0, other, token)])[0, token]
    assert float(kept) == pytest.approx(5 * weight), "a third expert, which writes elsewhere, has it"


def language_model(**moe):
    torch.manual_seed(0)
    return build_model(ModelConfig.from_dict({
        "vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 16, "max_seq_len": 64,
        "moe": {"n_experts": 4, "top_k": 2, "d_expert": 8, **moe}, "init_std": 0.3,
    })).eval()  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("ab ba " * 50, "x", "a")], vocab_size=300)


def reader(model, ids):
    def read(copies):
        out = model(ids.expand(copies, -1))
        return Reading(out.logits.log_softmax(dim=-1)[:, :, 7], out.routing)

    return read


@pytest.mark.parametrize(
    ("moe", "instead"),
    [({}, "nothing"), ({}, "next"), ({"capacity_factor": 0.9}, "nothing"), ({"router": "random"}, "share")],
    ids=["nothing", "next", "capacity", "random"],
)
def test_many_edits_in_a_pass_are_as_one_by_one(moe, instead):
    model, ids = language_model(**moe), torch.arange(9)
    ablation = Ablation(model, reader(model, ids), instead)
    cells = ablation.cells()
    assert len(cells) > 36
    together = ablation.answers(cells)
    for place, cell in enumerate(cells):
        mask = None if cell.token is None else torch.arange(9) == cell.token
        torch.manual_seed(0)
        with torch.no_grad(), edited(model, {cell.layer: Off([cell.expert], instead, mask)}):
            one = reader(model, ids)(1).answers[0]
        torch.testing.assert_close(together[place], one, rtol=1e-4, atol=1e-5)
        if cell.token is not None and moe == {}:
            before = ablation.plain.answers[0, : cell.token]
            torch.testing.assert_close(together[place, : cell.token], before, rtol=1e-4, atol=1e-5)
    assert (together - ablation.plain.answers).abs().max() > 0.01


def test_an_expert_whose_output_is_zero_has_no_effect(tokenizer):
    model = language_model()
    with torch.no_grad():
        model.moe_layers[1].experts.w_out[2].zero_()
    report = explain_text(model, tokenizer, TEXT)
    found = {(one["layer"], one["expert"]): one["effects"] for one in report["experts"]}
    assert all(abs(value) < 1e-6 for value in found[1, 2].values())
    assert max(abs(value) for value in found[0, 2].values()) > 1e-3


def test_the_only_expert_that_says_anything(tokenizer):
    """With all others silent, a layer without it says nothing: the answers are those of a model without experts."""
    model = language_model()
    silent = language_model()
    with torch.no_grad():
        for layer in silent.moe_layers:
            layer.experts.w_out.zero_()
        model.moe_layers[0].experts.w_out.zero_()
        model.moe_layers[1].experts.w_out[[0, 1, 3]] = 0
        report = explain_text(model, tokenizer, TEXT)
        text = report["texts"][0]
        ids = torch.tensor([text["ids"]])
        following = ids[0, 1:, None]
        said = [
            one(ids).logits[0, :-1].log_softmax(dim=-1).gather(1, following)[:, 0] for one in (model, silent)
        ]
    layer = text["layers"][1]
    asked = [row.index(2) if 2 in row else None for row in layer["experts"]]
    assert sum(rank is not None for rank in asked[:-1]) > 2
    for token, rank in enumerate(asked[:-1]):
        if rank is not None:
            wanted = float(said[1][token] - said[0][token])
            assert layer["effects"]["token"][token][rank] == pytest.approx(wanted, abs=1e-4)
            assert layer["effects"]["text"][token][rank] == pytest.approx(wanted, abs=1e-4)
            assert layer["effects"]["later"][token][rank] == 0, "the last layer is read by no later token"


def test_the_report_of_a_text(tokenizer):
    model = language_model()
    report = explain_text(model, tokenizer, TEXT, swaps=[(0, 1, 3)], title="tiny", source="somewhere")
    text = report["texts"][0]
    n = len(text["tokens"])
    assert "".join(text["tokens"]) == "<|endoftext|>" + TEXT
    assert all(len(layer["experts"]) == len(layer["margin"]) == n for layer in text["layers"])
    for layer in text["layers"]:
        for chosen, weights, other in zip(
            layer["experts"], layer["weights"], layer["next_best"], strict=True
        ):
            assert len(chosen) == 2
            assert sum(weights) == pytest.approx(1, abs=1e-4)
            assert other not in chosen
        assert min(layer["margin"]) >= 0
    answers = text["answers"]
    assert answers[0]["next"] == text["tokens"][1]
    assert (answers[-1]["next"], answers[-1]["probability"]) == (None, None)
    assert text["layers"][0]["effects"]["token"][-1] == [None, None]
    assert None not in text["layers"][0]["effects"]["top"][-1]
    with torch.no_grad(), edited(model, {0: Swap(1, 3)}):
        after = model(torch.tensor([text["ids"]])).logits[0].log_softmax(dim=-1)
    expected = float(after[0, text["ids"][1]]) - answers[0]["log_probability"]
    assert report["swaps"][0]["changes"][0] == pytest.approx(expected, abs=1e-3)
    edits = 2 * 2 * n + len(report["experts"]) + 1
    assert report["cost"]["edits"] == edits
    assert report["cost"]["tokens_read"] == n * (edits + 1)


def test_scopes_limits_and_errors(tokenizer):
    model = language_model()
    keys = {
        scope: set(explain_text(model, tokenizer, "ab", scope=scope)["texts"][0]["layers"][0]["effects"])
        for scope in ("token", "text", "none")
    }
    assert keys == {"token": {"token", "top", "later"}, "text": {"text", "text_top"}, "none": set()}
    with pytest.raises(ConfigError, match=r"limit must be at least .* Shorten the input"):
        explain_text(model, tokenizer, TEXT, limit=100)
    with pytest.raises(ConfigError, match="must have at most 64"):
        explain_text(model, tokenizer, "ab" * 400)
    with pytest.raises(ConfigError, match="at least one character"):
        explain_text(model, tokenizer, "")
    with pytest.raises(ConfigError, match="LAYER:EXPERT:EXPERT"):
        parse_swap("1:2")
    dense = build_model(ModelConfig.from_dict({**model.config.to_dict(), "moe": None}))
    with pytest.raises(ConfigError, match="dense"):
        explain_text(dense, tokenizer, "ab")
