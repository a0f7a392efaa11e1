"""Reports of records: figures worked by hand, alarms, words, samples."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from made_records import HOSTILE, large_record, small_record

from moekit.data.documents import Document
from moekit.data.tokenizer import train_tokenizer
from moekit.explain import summary
from moekit.explain.specialists import Verdict
from moekit.explain.summary import evenly, summarise
from moekit.explain.summary_tokens import characteristic_tokens, pieces, sample_texts, saturation_by_step
from moekit.observe.record import LayerInfo, RoutingRecord


@pytest.fixture(scope="module")
def report():
    return summarise(small_record())


def test_figures_by_hand(report):
    first, second = report["layers"]
    assert first["load"] == [0.5, 0.5, 0.0]
    assert first["load_entropy"] == pytest.approx(math.log(2) / math.log(3), rel=1e-4)
    assert first["max_violation"] == 0.5, "4 against a mean of 8/3"
    assert first["violation_of_batches"] == 1.5
    assert (first["dead"], first["overloaded"]) == ([2], [])
    assert (first["route_entropy"], first["margin"]) == (0.75, 0.25)
    assert first["route_entropy_share"] == pytest.approx(0.75 / math.log(3), rel=1e-4)
    assert (first["drop_share"], second["drop_share"]) == (0.0, 0.125)
    assert first["shares"] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert (second["dead"], second["overloaded"], second["load_entropy"]) == ([0, 1], [2], 0.0)
    assert first["claim"]["value"] == 1.0
    assert second["claim"]["value"] == 0.0
    assert first["flow"] == {"links": [[0, 2, 4], [1, 2, 4]], "total": 8, "covered": 1.0}
    assert second["flow"] is None
    assert first["co_activation"] is None, "one choice each: nothing is chosen together"
    assert first["vocabulary"] is None, "no id has eight tokens"
    assert first["history"] is None
    assert first["entropy_by_frequency"] == [[1, 1, 0.75], [2, 3, 0.75]]


def test_it_says_what_it_is_made_of(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["title"] == "by-hand"
    assert (report["n_tokens"], report["n_experts"], report["n_layers"]) == (8, 6, 2)
    assert report["sampling"]["used"] == 8
    assert "all 8 rows" in report["sampling"]["words"]
    assert report["groups"] == report["shown_groups"] == ["中文", HOSTILE]


def test_alarms_and_what_to_do(report):
    found = {(alarm["kind"], alarm["layer"]): alarm for alarm in report["alarms"]}
    assert set(found) == {("collapsed", 1), ("dead", 0), ("dead", 1), ("overloaded", 1), ("dropped", 1)}
    assert report["alarms"][0]["kind"] == "collapsed", "the worst comes first"
    assert found["dead", 0]["experts"] == [2]
    assert "model.moe.balance" in found["dead", 0]["remedy"]
    assert "model.moe.balance" not in found["dead", 1]["remedy"], "nothing balances a hash router"
    assert "capacity_factor" in found["dropped", 1]["remedy"]
    assert report["verdict"].startswith("Routing has collapsed in 1 of 2 sparse layers")


def test_null_experts_are_neither_dead_nor_overloaded():
    record = small_record()
    arrays = {**record.arrays, "1/requested": np.array([4, 4, 0])}
    nulls = (record.layers[0], LayerInfo("second", 3, "softmax", (), 1))
    layer = summarise(replace(record, layers=nulls, arrays=arrays))["layers"][1]
    assert (layer["dead"], layer["load_entropy"], layer["labels"]) == ([], 1.0, ["0", "1", "null 0"])


def test_a_claim_that_ablation_does_not_support_is_marked():
    record = large_record(4000, n_layers=1, n_groups=2)
    experts = (record.arrays["token/group"][:, None] * 2 + np.arange(2)).astype(np.int16)
    record = replace(record, arrays={**record.arrays, "0/token/experts": experts})
    plain = summarise(record)
    assert plain["layers"][0]["claim"]["holds"]
    assert plain["layers"][0]["claim"]["words"] == "above both nulls; not tested by ablation"

    def judged(first: str, second: str) -> list[Verdict]:
        return [
            Verdict(0, group, (0,), 0.6, 0.5, 0.0, 0.3, way, 0.01, 0.01, 0.0, -0.01, 0.01, (0.0,), ruling)
            for group, ruling in ((0, first), (1, second))
            for way in ("nothing", "next")
        ]

    missed = summarise(record, verdicts=judged("not supported", "contrary"))
    words = "not supported by ablation; contrary for 1 of 2 groups"
    assert missed["layers"][0]["claim"]["words"] == words
    assert "1 of them not supported by ablation" in missed["verdict"]
    assert missed["verdict"].endswith(
        "Ablation supports 0 of 2 groups’ own experts with nothing in their place, 1 contrary."
    )
    assert len(missed["causes"]) == 4
    held = summarise(record, verdicts=judged("not supported", "supported"))
    assert held["layers"][0]["claim"]["words"] == (
        "above both nulls, supported by ablation for 1 of 2 groups with nothing in their place, "
        "1 of 2 groups with the next best"
    )
    assert "not supported" not in held["verdict"]
    assert "supports 1 of 2" in held["verdict"]


def test_a_router_that_draws_makes_no_claim():
    report = summarise(large_record(20_000, n_layers=1))
    assert report["layers"][0]["claim"]["words"] == "not above chance"
    assert report["verdict"].endswith("no layer tells the groups apart better than chance.")


def test_characteristic_tokens_by_hand():
    """Id 3 has 10 tokens, 9 of them at expert 0, which has 12 of 20: z = (9 - 6) / sqrt(10 * 0.6 * 0.4) = 1.94."""
    experts = np.array([[0]] * 9 + [[1]] + [[0]] * 3 + [[1]] * 7)
    ids = np.array([3] * 10 + [4] * 10)
    assert characteristic_tokens(experts, ids, 2, score=1.93) == [[["3", 9, 0.9]], [["4", 7, 0.7]]]
    assert characteristic_tokens(experts, ids, 2, score=1.94) == [[], []]
    assert characteristic_tokens(experts, np.full(20, -1), 2) == [[], []]


def test_parts_of_a_character_are_joined():
    tokenizer = train_tokenizer([Document("plain text", "english", "a")], vocab_size=257)
    ids = tokenizer.encode("a中b")
    assert len(ids) == 5
    assert pieces(ids, tokenizer, [False] * 5) == ["a", "", "", "中", "b"]
    gap = [False, False, True, False, False]
    assert pieces(ids, tokenizer, gap)[0] == "a"
    assert "中" not in "".join(pieces(ids, tokenizer, gap)), (
        "bytes from both sides of a gap make no character"
    )
    assert pieces([3, 4], None, [False, False]) == ["3", "4"]


def test_sample_texts_take_as_many_of_each_group():
    texts = sample_texts(small_record())
    assert [text["group"] for text in texts] == ["中文", HOSTILE]
    assert texts[1]["gap"] == [False, False, True, False], "position 2 is missing"
    assert texts[0]["layers"][0]["experts"] == [[0]] * 4
    many = sample_texts(large_record(50_000), texts=9, length=20)
    assert [text["group"] for text in many].count("group 1") == 3
    assert all(len(text["ids"]) == 20 for text in many)
    assert many == sample_texts(large_record(50_000), texts=9, length=20), "the same seed, the same texts"


def test_evenly_takes_one_of_each_stretch():
    rng = np.random.Generator(np.random.PCG64(1))
    taken = evenly(np.arange(1000), 10, rng)
    assert (taken // 100).tolist() == list(range(10))


def test_routes_that_settle():
    """60 tokens read at three steps: at the first one a third of the last choices were made already."""
    last = np.arange(60, dtype=np.int16)[:, None] % 4
    early = np.where(np.arange(60)[:, None] % 3 == 0, last, (last + 1) % 4).astype(np.int16)
    same = {name: np.tile(np.arange(60, dtype=np.int32), 3) for name in ("id", "position", "text")}
    arrays = {f"token/{name}": values for name, values in same.items()}
    arrays |= {
        "token/step": np.repeat([0, 10, 20], 60),
        "0/token/experts": np.concatenate([early, last, last]),
    }
    record = RoutingRecord((LayerInfo("a", 4, "softmax"),), ("all",), "training", arrays)
    assert saturation_by_step(record, 0) == {"step": [0, 10, 20], "share": pytest.approx([1 / 3, 1, 1])}


def test_a_record_of_sums_alone_makes_a_report():
    record = small_record()
    sums = {name: array for name, array in record.arrays.items() if "token/" not in name}
    report = summarise(replace(record, arrays=sums))
    assert report["texts"] == []
    assert report["layers"][0]["claim"] is None
    assert "sums alone" in report["sampling"]["words"]


def test_very_many_groups_are_put_together():
    report = summarise(large_record(30_000, n_layers=1, n_groups=60))
    assert len(report["shown_groups"]) == summary.GROUPS == len(report["layers"][0]["shares"])
    assert report["shown_groups"][-1] == "37 smaller groups"
    assert sum(report["layers"][0]["shares"][-1]) == pytest.approx(1, abs=1e-3)


def test_history_is_thinned():
    history = summarise(large_record(2000, n_layers=1))["layers"][0]["history"]
    assert len(history["step"]) == summary.MOMENTS
    assert (history["step"][0], history["step"][-1]) == (0, 9990)
