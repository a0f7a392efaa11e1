"""The words of the report, explained in a sentence each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import section

_TERMS = (
    (
        "Mixture of experts (MoE)",
        "A network whose feed-forward blocks are split into many experts, of which each token uses a few.",
        "moe",
    ),
    ("Router", "The small layer that chooses the experts for a token and weighs their answers.", "moe"),
    (
        "Dense twin",
        "An ordinary model of the same shape with one feed-forward block per layer, as large as the experts "
        "that one token of the MoE uses together.",
        "dense",
    ),
    (
        "Transformer-XL",
        "A dense model that carries a memory of the text before from segment to segment (Dai et al. 2019).",
        "transformer_xl",
    ),
    ("Active parameters", "The weights that one token touches; they set the compute per token.", ""),
    ("Total parameters", "All weights stored; they set the memory that the model needs.", ""),
    (
        "FLOPs per token",
        "Floating-point operations for one token, a multiplication and an addition counting as two.",
        "",
    ),
    (
        "Token",
        "A piece of text from the tokenizer’s vocabulary: a word, a part of one, or a few bytes.",
        "",
    ),
    (
        "Loss",
        "The mean of −ln p, where p is the probability that the model gave to the token that came; in nats. "
        "Lower is better.",
        "",
    ),
    (
        "Bits per byte",
        "The summed loss in bits (nats divided by ln 2), divided by the bytes of the text. Comparable across "
        "tokenizers. Lower is better.",
        "",
    ),
    ("Validation text", "Documents of the same domains that no model trained on.", ""),
    ("Held-out domain", "A kind of text that no model trained on at all.", ""),
    ("Load", "The share of routed tokens that an expert receives.", "moe"),
    (
        "Max violation",
        "(largest load − mean load) / mean load, per layer; the report gives the worst layer.",
        "moe",
    ),
    (
        "Load entropy",
        "Entropy of the load divided by its largest possible value; 1 means that all experts get the same.",
        "moe",
    ),
    ("Dead expert", "An expert that received no token of the validation text.", "moe"),
    ("Dropped tokens", "Tokens that an expert at its capacity turned away; 0 in a dropless model.", "moe"),
)


def glossary_section(report: Mapping[str, Any]) -> str:
    """The terms that this report uses; those of a model that is missing are left out."""
    items = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(meaning)}</dd></div>"
        for term, meaning, model in _TERMS
        if not model or model in report["models"]
    )
    return section("glossary", "Words", "", f'<dl class="glossary">{items}</dl>')
