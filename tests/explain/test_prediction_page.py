"""The page of one prediction: what it holds, and that a browser draws it."""

from __future__ import annotations

import re

import pytest
import torch
from made_records import HOSTILE
from test_explain_page import ADDRESS, Page, dumped

from moekit.config.model import ModelConfig
from moekit.data.documents import Document
from moekit.data.tokenizer import train_tokenizer
from moekit.explain.page import render_prediction_page
from moekit.explain.predictions import explain_text
from moekit.models.build import build_model


@pytest.fixture(scope="module")
def html() -> str:
    """Of a text and a model whose name is markup."""
    torch.manual_seed(0)
    model = build_model(ModelConfig.from_dict({
        "vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 16, "init_std": 0.3,
        "moe": {"n_experts": 4, "top_k": 2, "d_expert": 8},
    })).eval()  # fmt: skip
    tokenizer = train_tokenizer([Document(HOSTILE * 50, "english", "a")], vocab_size=300)
    return render_prediction_page(
        explain_text(model, tokenizer, f"{HOSTILE}中文\n", swaps=[(0, 1, 2)], title=HOSTILE)
    )


def test_it_says_what_was_measured(html):
    page = Page(html)
    assert {attributes["data-chart"] for tag, attributes in page.tags if "data-chart" in attributes} == {
        "effects"
    }
    wanted = ("What each expert does", "nothing stands in its place", "Experts exchanged", "What the model expects",
              "中文"[0], "Experts, means over their tokens", HOSTILE)  # fmt: skip
    for words in wanted:
        assert words in page.text, words
    assert html.count("<script>alert") == 0
    assert not ADDRESS.search(page.scripts[-1][1] + page.styles + page.text)


@pytest.mark.slow
def test_a_browser_draws_it(html, tmp_path):
    dom, complaints = dumped(html, tmp_path)
    assert complaints == []
    assert "<canvas" in dom
    tips = re.findall(r'data-tip="([^"]*)"', dom)
    said = [tip for tip in tips if "without it for this token alone, on the next token: expert" in tip]
    assert len(said) > 5
    assert all("next best: expert" in tip and "margin" in tip for tip in said)
    assert re.search(r"then “.+” with \d+\.\d%, place \d+; expected", said[0])
    assert "<script>alert" not in dom
