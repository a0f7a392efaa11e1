"""The league trains every causal router on equal terms and ranks them by loss."""

from __future__ import annotations

import json

import pytest

from moekit.config.errors import ConfigError
from moekit.layers.routing import ROUTERS
from moekit.models.accounting import active_parameters
from moekit.recipes import league

NON_CAUSAL = {"base", "expert_choice", "soft"}


class FakeTokenizer:
    vocab_size = 4096

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 4096 for character in text]


class FakeData:
    tokenizer = FakeTokenizer()


@pytest.fixture
def contestants(monkeypatch):
    """The configurations that would have been trained; each run's loss falls with its place in the alphabet."""
    seen = []

    def contestant(config, data):
        seen.append(config)
        loss = 5.0 - 0.01 * len(seen)
        return {
            "loss": loss, "bits": loss / 2, "max_violation": 0.5, "entropy": 0.9, "active": 2.0, "seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(league, "_contestant", contestant)
    monkeypatch.setattr(league, "prepare", lambda config: FakeData())
    return seen


def test_every_causal_router_and_the_dense_twin_take_part(contestants, tmp_path):
    result = league.run_league(out=tmp_path, steps=7, quiet=True)
    names = {row[0] for row in result["table"]["rows"]}
    built_in = {name for name, cls in ROUTERS.items() if cls.__module__.startswith("moekit.")}
    assert names & (built_in | {"dense twin"}) == (built_in - NON_CAUSAL) | {"dense twin"}
    assert {config.train.steps for config in contestants} == {7}
    assert json.loads((tmp_path / "league.json").read_text("utf-8")) == result


def test_all_have_about_equal_active_parameters_and_the_same_balancing(contestants, tmp_path):
    league.run_league(out=tmp_path, steps=7, quiet=True)
    by_name = {config.name: config for config in contestants}
    reference = active_parameters(by_name["softmax"].model)
    for name, config in by_name.items():
        if name == "top_p":  # chooses fewer than the most it may take
            continue
        assert active_parameters(config.model) == pytest.approx(reference, rel=0.02), name
    losses = {config.model.moe.balance for config in contestants if config.model.moe is not None}
    assert len({(b.load_balance, b.bias_update_rate) for b in losses}) == 1


def test_rows_are_ranked_by_loss_and_seeds_are_averaged(contestants, tmp_path):
    result = league.run_league(out=tmp_path, steps=7, seeds=2, routers=["softmax", "hash"], quiet=True)
    # losses 4.99, 4.98 (dense twin), 4.97, 4.96 (softmax), 4.95, 4.94 (hash)
    assert [row[0] for row in result["table"]["rows"]] == ["hash", "softmax", "dense twin"]
    assert result["table"]["rows"][0][1] == "4.945 ± 0.007"
    assert [config.train.seed for config in contestants] == [0, 1] * 3


def test_an_unknown_router_is_an_error_before_anything_trains(contestants, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'softmax'"):
        league.run_league(out=tmp_path, routers=["softmaxx"], quiet=True)
    assert contestants == []
