"""The schema of the quickstart's report: whatever is missing or wrong is named."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from quickstart_example import make_report

from moekit.config.errors import DataError
from moekit.evaluate.page import check_report, render_quickstart_page, report_problems


@pytest.fixture
def report() -> dict[str, Any]:
    return make_report()


def test_a_sound_report_survives_json(report: dict[str, Any]) -> None:
    check_report(report)
    check_report(json.loads(json.dumps(report)))


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key of a report, once per list."""
    if isinstance(value, dict):
        return [
            path for key, item in value.items() for path in [(*prefix, key), *paths(item, (*prefix, key))]
        ]
    if isinstance(value, list) and value:
        return paths(value[0], (*prefix, 0))
    return []


FREE = (
    "note",
    "validation_loss",
    "history",
    "schedule",
    "weight_decay",
    "bytes",
    "lr",
    "bits_per_byte",
    "models",
)


def test_every_key_that_is_missing_is_named(report: dict[str, Any]) -> None:
    tried = 0
    for path in paths(report):
        if path[-1] in FREE or set(FREE[5:8]) & set(path[:-1]) or path == ("models", path[-1]):
            continue
        broken = copy.deepcopy(report)
        parent = broken
        for step in path[:-1]:
            parent = parent[step]
        del parent[path[-1]]
        name = ".".join(str(step) for step in path).replace(".0", "[0]")
        assert any(problem.startswith(f"{name} is missing") for problem in report_problems(broken)), name
        tried += 1
    assert tried > 80


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("schema",),
            "moekit.quickstart/2",
            "schema must be 'moekit.quickstart/1'; got 'moekit.quickstart/2'",
        ),
        (("models",), {}, "models must hold at least one of moe, dense, transformer_xl; got none"),
        (
            ("models", "dense", "tokens"),
            "many",
            "models.dense.tokens must be a number of zero or more; got 'many'",
        ),
        (
            ("models", "dense", "tokens"),
            True,
            "models.dense.tokens must be a number of zero or more; got True",
        ),
        (("models", "moe", "sample"), None, "models.moe.sample must be text; got None"),
        (("models", "moe", "bits_per_byte"), {"code": 2.0}, "models.moe.bits_per_byte.mean is missing"),
        (("models", "moe", "curve"), {}, "models.moe.curve must be a list; got {}"),
        (("corpus", "held_out_domain"), 3, "corpus.held_out_domain must be text or null; got 3"),
        (
            ("balance", "layers", 1, "load", 0),
            "x",
            "balance.layers[1].load[0] must be a number or null; got 'x'",
        ),
        (
            ("experts_by_domain", "domains"),
            ["a"],
            "experts_by_domain.layers[0].share must have one row per domain",
        ),
        (("machine",), [], "machine must be an object; got []"),
    ],
)
def test_every_wrong_value_is_named(
    report: dict[str, Any], path: tuple[Any, ...], value: Any, message: str
) -> None:
    parent: Any = report
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    with pytest.raises(DataError) as caught:
        check_report(report)
    assert message in str(caught.value)
    with pytest.raises(DataError):
        render_quickstart_page(report)


def test_an_unknown_model_and_a_misspelt_key_get_the_nearest_name(report: dict[str, Any]) -> None:
    report["models"]["transformerxl"] = report["models"]["transformer_xl"]
    assert "did you mean 'transformer_xl'" in report_problems(report)[0]
    del report["models"]["transformerxl"]
    report["machine"]["memory_byte"] = report["machine"].pop("memory_bytes")
    assert report_problems(report) == ["machine.memory_bytes is missing; there is 'memory_byte'"]
    assert report_problems(None) == ["the report must be an object; got None"]


def test_a_curve_must_rise_in_step(report: dict[str, Any]) -> None:
    points = report["models"]["moe"]["curve"]
    points[3]["step"] = points[2]["step"]
    assert report_problems(report)[0].startswith("models.moe.curve must rise in step")
