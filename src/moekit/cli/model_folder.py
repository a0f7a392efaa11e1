"""Verbs for runs, given a model folder instead: what the two have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekit.config.train import RunConfig
from moekit.convert.formats.opening import open_model
from moekit.convert.formats.text import text_of
from moekit.evaluate.run import evaluate_loaded
from moekit.layers.elastic import Elastic
from moekit.train.run import LoadedRun


def evaluate_folder(
    path: Path, overrides: Sequence[str], max_batches: int | None, settings: Sequence[Elastic] = ()
) -> dict[str, Any]:
    """What `moekit evaluate` measures, of a model folder on the text that `text_of` gives."""
    opened = open_model(path)
    data = text_of(opened, overrides)
    config = RunConfig(model=opened.config, **({"data": opened.data} if opened.data is not None else {}))
    steps = [int(entry["steps"]) for entry in opened.history if isinstance(entry.get("steps"), int)]
    loaded = LoadedRun(config, opened.model, data.tokenizer, steps[-1] if steps else 0, opened.path)
    return evaluate_loaded(loaded, data, max_batches, settings)
