"""Measurements against values worked out by hand, on models whose answers and routing are known."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from moekit.config.model import ModelConfig
from moekit.data.documents import Document
from moekit.data.loader import evaluation_batches
from moekit.data.packing import pack
from moekit.data.tokenizer import train_tokenizer
from moekit.evaluate import metrics
from moekit.evaluate.metrics import (
    DomainResult,
    Setting,
    balance_summary,
    evaluate_split,
    experts_by_domain,
    inference_speeds,
    mean_bits_per_byte,
)
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.models import LanguageModelOutput, build_model

CPU, FLOAT = torch.device("cpu"), torch.float32
# bytes: 11 + 3, 9 (three Chinese characters), 6; an empty text has none and still ends
DOCUMENTS = [
    Document("hello there", "english", "a"),
    Document("yes", "english", "b"),
    Document("中国人", "chinese", "c"),
    Document("", "english", "d"),
    Document("中好", "chinese", "e"),
]
BYTES = {"english": 14, "chinese": 15}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("hello there 中国 hello 中国", "mixed", "x")], 270)


@pytest.fixture(scope="module")
def split(tokenizer):
    return pack(DOCUMENTS, tokenizer)


def setting(batch_size=2, seq_len=4, max_batches=None):
    return Setting(CPU, FLOAT, batch_size, seq_len, max_batches)


class KnownModel(nn.Module):
    """Loses 1 nat on every even target and 2 on every odd one; routes by token id; remembers what it saw.

    Layer 0 sends a token to expert `id % 4`, whose number 1 has no room and drops all of them; layer 1 sends
    every token to expert 3.
    """

    def __init__(self):
        super().__init__()
        self.targets, self.modes, self.tokens = [], [], []

    def forward(
        self, token_ids, *, targets=None, segment_ids=None, token_mask=None, memory=None, return_logits=True
    ):
        assert return_logits is False, "evaluation needs no logits"
        self.modes.append(self.training)
        counted = targets != -100
        self.targets += targets[counted].tolist()
        self.tokens += token_ids[segment_ids >= 0].tolist()
        context = RoutingContext(tuple(token_ids.shape), None if token_mask is None else token_mask.flatten())
        ids = token_ids.flatten()
        probs = torch.full((len(ids), 4), 0.25)
        weight = torch.ones(len(ids), 1)
        first = RoutingPlan.from_choices((ids % 4)[:, None], weight, 4, context, router_probs=probs)
        full = first.expert_of_row() != 1
        second = RoutingPlan.from_choices(
            torch.full_like(ids, 3)[:, None], weight, 4, context, router_probs=probs
        )
        losses = torch.where(targets % 2 == 0, 1.0, 2.0)
        return LanguageModelOutput(
            hidden_states=torch.zeros(*token_ids.shape, 1),
            loss=losses[counted].mean() if counted.any() else torch.zeros(()),
            n_targets=int(counted.sum()),
            routing=(first.keep_rows(full), second),
        )


def documents_of(split, domain):
    """Tokens of the documents of a domain, one array each, the end marker first."""
    number = split.domains.index(domain)
    return [
        split.tokens[split.offsets[i] : split.offsets[i + 1]].astype(int)
        for i in range(split.n_documents)
        if split.domain_index[i] == number
    ]


# --- bits per byte


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (2, 4), (3, 5), (16, 4)])
def test_uniform_predictions_cost_log2_of_the_vocabulary(split, tokenizer, shape):
    """A real model whose logits are all zero: every token costs log2(V), the end of each document too."""
    model = build_model(
        ModelConfig(vocab_size=300, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_seq_len=128)
    )
    nn.init.zeros_(model.stem.weight)
    results = evaluate_split(model, split, tokenizer, setting(*shape))
    assert results.keys() == {"chinese", "english"}
    for domain, result in results.items():
        documents = documents_of(split, domain)
        n_tokens = sum(map(len, documents))
        assert result.n_tokens == n_tokens
        assert result.loss == pytest.approx(math.log(300))
        assert result.bits_per_byte == pytest.approx(math.log2(300) * n_tokens / BYTES[domain])
        assert result.stats == []


@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (3, 5)])
def test_every_token_is_predicted_once_and_weighs_alike(split, tokenizer, shape):
    model = KnownModel()
    results = evaluate_split(model, split, tokenizer, setting(*shape))
    everything = Counter()
    for domain, result in results.items():
        # what follows each token: the next of its document, or the end
        targets = [int(t) for tokens in documents_of(split, domain) for t in [*tokens[1:], tokenizer.end_id]]
        nats = sum(1 if target % 2 == 0 else 2 for target in targets)
        assert result.n_tokens == len(targets)
        assert result.loss == pytest.approx(nats / len(targets), rel=1e-6)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / BYTES[domain], rel=1e-6)
        everything.update(targets)
    assert Counter(model.targets) == everything
    assert Counter(model.tokens) == Counter(split.tokens.tolist())
    assert set(model.modes) == {False}


def test_the_bytes_are_those_of_the_tokens_that_were_predicted(tokenizer):
    """With `max_batches` both sides of the quotient shrink together."""
    split = pack([Document("hello there again " * 40, "mixed", "x")], tokenizer)
    model = build_model(
        ModelConfig(vocab_size=tokenizer.vocab_size, d_model=8, n_layers=1, n_heads=2, d_ff=8)
    )
    nn.init.zeros_(model.stem.weight)
    result = evaluate_split(model, split, tokenizer, setting(2, 8, max_batches=3))["mixed"]
    assert result.n_tokens == 2 * 8 * 3 < split.n_tokens
    # three batches of eight tokens: the first 24 targets of each of two rows, as text
    half = -(-split.n_tokens // 2)
    n_bytes = sum(len(tokenizer.decode(split.tokens[start + 1 : start + 25])) for start in (0, half))
    assert result.bits_per_byte == pytest.approx(math.log2(tokenizer.vocab_size) * 48 / n_bytes)


def test_byte_lengths_of_a_domain_add_up_to_its_text(split, tokenizer):
    lengths = tokenizer.byte_lengths()
    for domain, n_bytes in BYTES.items():
        assert sum(int(lengths[tokens].sum()) for tokens in documents_of(split, domain)) == n_bytes


def test_the_mean_over_domains_is_plain():
    results = {
        name: DomainResult(bits, 0.0, n, [])
        for name, bits, n in (("a", 2.0, 10), ("b", 4.0, 1000), ("c", 3.0, 1))
    }
    assert mean_bits_per_byte(results) == 3.0
    assert math.isnan(mean_bits_per_byte({}))


def test_a_domain_without_text_is_left_out(tokenizer):
    split = pack(DOCUMENTS[:2], tokenizer, domains=["chinese", "english"])
    assert evaluate_split(KnownModel(), split, tokenizer, setting()).keys() == {"english"}
    assert evaluate_split(KnownModel(), pack([], tokenizer), tokenizer, setting()) == {}


# --- balance and experts by domain


@pytest.mark.parametrize("shape", [(1, 100), (2, 4), (3, 5)])
def test_balance_and_experts_by_domain_by_hand(split, tokenizer, shape):
    """Loads from the token ids alone; padding at the ends of rows visits no expert."""
    results = evaluate_split(KnownModel(), split, tokenizer, setting(*shape))
    counts = {
        domain: np.bincount(np.concatenate(documents_of(split, domain)) % 4, minlength=4)
        for domain in results
    }
    table = experts_by_domain(results)
    assert table["domains"] == list(results) == ["chinese", "english"]
    for row, domain in zip(table["layers"][0]["share"], table["domains"], strict=True):
        assert row == pytest.approx((counts[domain] / counts[domain].sum()).tolist())
    assert table["layers"][1] == {"layer": 1, "share": [[0, 0, 0, 1], [0, 0, 0, 1]]}

    total = sum(counts.values())
    load = total / total.sum()
    summary = balance_summary(results)
    assert summary["layers"][0]["load"] == pytest.approx(load.tolist())
    assert summary["layers"][0]["max_violation"] == pytest.approx(load.max() * 4 - 1)
    # one expert of four takes everything: three times too much; it is the worst layer
    assert summary["layers"][1] == {"layer": 1, "load": [0, 0, 0, 1], "max_violation": 3}
    assert summary["max_violation"] == 3
    entropy = -(load[load > 0] * np.log(load[load > 0])).sum() / np.log(4)
    assert summary["load_entropy"] == pytest.approx((entropy + 0) / 2)
    assert summary["route_entropy"] == pytest.approx(math.log(4), rel=1e-6)
    dropped = total[1] / total.sum()
    assert dropped > 0
    assert summary["dropped_share"] == pytest.approx((dropped + 0) / 2)
    assert summary["mean_active_experts"] == pytest.approx((1 - dropped + 1) / 2)
    assert summary["dead_experts"] == int((load < 0.0025).sum()) + 3


def test_a_dense_model_has_no_balance(split, tokenizer):
    model = build_model(ModelConfig(vocab_size=300, d_model=8, n_layers=1, n_heads=2, d_ff=8))
    results = evaluate_split(model, split, tokenizer, setting())
    assert balance_summary(results) == {}
    assert experts_by_domain(results) == {}


# --- speed


class Clock:
    """Time that only the models below move on."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


class Slow(nn.Module):
    """Takes the seconds of a list, one after the other; carries a count as its memory where asked to."""

    def __init__(self, clock, name, seconds, recurrent=False):
        super().__init__()
        self.clock, self.name, self.seconds, self.recurrent = clock, name, iter(seconds), recurrent

    def forward(self, token_ids, *, segment_ids=None, memory=None):
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.clock.calls.append((self.name, memory))
        self.clock.now += next(self.seconds)
        memory = (memory or 0) + 1 if self.recurrent else None
        return LanguageModelOutput(hidden_states=torch.zeros(1), memory=memory)


def test_models_take_turns_and_the_first_batch_does_not_count(split, monkeypatch):
    clock = Clock(monkeypatch)
    models = {
        "a": Slow(clock, "a", [100, 2, 1, 4]),
        "b": Slow(clock, "b", [0.1, 1, 1, 1], recurrent=True),
    }
    batches = list(evaluation_batches(split, 1, 6))[:4]
    speeds = inference_speeds(models, iter(batches), CPU, FLOAT)
    # six tokens in the median of 2, 1 and 4 seconds, and in 1 second
    assert speeds == {"a": 3.0, "b": 6.0}
    assert [name for name, _ in clock.calls] == ["a", "b"] * 4
    # a recurrent model is measured with the memory that its quality is measured with
    assert [memory for name, memory in clock.calls if name == "b"] == [None, 1, 2, 3]
    assert [memory for name, memory in clock.calls if name == "a"] == [None] * 4


def test_speed_from_a_single_batch_or_none(split, monkeypatch):
    clock = Clock(monkeypatch)
    batch = next(iter(evaluation_batches(split, 1, 6)))
    assert inference_speeds({"a": Slow(clock, "a", [2])}, [batch], CPU, FLOAT) == {"a": 3.0}
    assert inference_speeds({"a": Slow(clock, "a", [])}, [], CPU, FLOAT) == {}
