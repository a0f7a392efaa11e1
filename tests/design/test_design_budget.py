"""Budgets: what they say, and what is said of those that are wrong."""

from __future__ import annotations

import pytest

from moekit.config.errors import ConfigError
from moekit.design.budget import TUNE_LIMITS, Amount, parse_budget


def test_every_limit():
    found = parse_budget("active=0.8M, total=2x, latency=250us, time=1h2m3s")
    assert found.active == Amount(800_000.0)
    assert found.total == Amount(2.0, of_default=True)
    assert found.total.of(1001) == 2002
    assert found.latency == pytest.approx(0.00025)
    assert found.time == 3723


def test_what_is_not_named():
    found = parse_budget("")
    assert found.active == Amount(1.0, of_default=True)
    assert (found.total, found.latency, found.time) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("latency=5", ["budget.latency", "'5'", "with its unit", "latency=5ms"]),
        ("time=20 potatoes", ["budget.time", "'20 potatoes'", "with its unit", "time=20m"]),
        ("time=0s", ["budget.time", "'0s'", "positive", "time=20m"]),
        ("time=-3m", ["budget.time", "'-3m'", "positive"]),
        ("time=1h_2m", ["budget.time", "'1h_2m'"]),
        ("active=many", ["budget.active", "'many'", "positive number", "active=default"]),
        ("active=0", ["budget.active", "'0'", "positive number"]),
        ("active=-4M", ["budget.active", "'-4M'", "positive number"]),
        ("total=4Q", ["budget.total", "'4Q'", "800k or 4M"]),
        ("activ=4M", ["budget.activ", "active"]),
        ("active", ["budget", "'active'", "name=value"]),
        ("active=", ["budget", "'active='", "name=value"]),
        ("active=1M,active=2M", ["budget.active", "twice", "'2M'"]),
    ],
)
def test_what_is_wrong_is_named_with_value_rule_and_remedy(text, parts):
    with pytest.raises(ConfigError) as error:
        parse_budget(text)
    for part in parts:
        assert part in str(error.value)


def test_a_limit_of_the_other_verb():
    with pytest.raises(ConfigError, match=r"budget\.active is no limit"):
        parse_budget("active=1M", TUNE_LIMITS)
    assert parse_budget("examples=2x", TUNE_LIMITS).examples.of(10) == 20
