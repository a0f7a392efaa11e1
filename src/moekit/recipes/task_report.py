"""`moekit evaluate` of a task's run: its metrics on the test examples, and which experts served whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.config.atomic import write_json, write_text
from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import TaskData
from moekit.data.tables import read_examples
from moekit.data.task_data import columns_of, load_task_data
from moekit.evaluate.page.task import render_task_page
from moekit.models.accounting import active_parameters, total_parameters
from moekit.recipes.experts_of_columns import experts_of_columns
from moekit.recipes.running import measured
from moekit.recipes.tasks import Measure, load_recipe
from moekit.train.run import LoadedTask, load_task_run

# what a target is measured by where no recipe says it, by its kind
METRICS: dict[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "class": (("accuracy", {}), ("macro_f1", {})),
    "number": (("rmse", {}), ("mae", {}), ("r2", {})),
    "tags": (("tag_accuracy", {}),),
    "entity": (("mrr_filtered", {}), ("hits_at_k", {"k": 10})),
    "span": (("exact_match", {}),),
    "sequence": (("chrf", {}), ("exact_match", {})),
    "transcript": (("wer", {}),),
    "boxes": (("mean_average_precision", {}),),
    "mask": (("mean_iou", {}), ("pixel_accuracy", {})),
}


def evaluate_task(
    run: Path | str, *, file: Path | None = None, by: Sequence[str] = (), page: Path | None = None
) -> dict[str, Any]:
    """Metrics, sizes and experts by column of a task's run, JSON-ready.

    Args:
        run: its folder.
        file: examples with answers in place of the test split.
        by: columns whose values the experts are compared for; by default classes that are asked for, and columns of few
            different texts that the model does not read.
        page: an HTML file to write, and the JSON file of that name beside it.

    Errors: those of the run and of the data; `ConfigError` for a column that is not there.
    """
    loaded = load_task_run(run)
    config = loaded.config
    if file is None:
        data = load_task_data(config)
        examples, of = data.test, "the test split"
        own = _own_figures(loaded, data)
        sources = [f"{source.name} ({source.licence})" for source in data.sources]
    else:
        examples = read_examples(file, {}, [*dict.fromkeys([*columns_of(config), *by])])
        of, sources, own = file.name, [file.name], {}
    if len(examples) == 0:
        raise ConfigError(f"{of} has no examples to measure. Name a file of them")
    report = {
        "name": _name(config), "run": str(run), "step": loaded.step, "examples": len(examples), "of": of,
        "metrics": {**measured(loaded, examples, measures_of(config)), **own},
        "active_parameters": active_parameters(config.model), "total_parameters": total_parameters(config.model),
        "experts_by": experts_of_columns(loaded, examples, by), "sources": sources,
    }  # fmt: skip
    if page is not None:
        write_text(page, render_task_page(report))
        write_json(page.with_suffix(".json"), report)
    return report


def measures_of(config: TaskRunConfig) -> list[Measure]:
    """The metrics of the run's recipe; of targets that no recipe measures, those of their kind."""
    found: list[Measure] = []
    if config.recipe is not None:
        found = [
            one
            for one in load_recipe(config.recipe.partition(":")[0]).measures
            if one.target in config.targets
        ]
    seen = {one.target for one in found}
    for name, target in config.targets.items():
        if name not in seen:
            found += [Measure(name, metric, options) for metric, options in METRICS.get(target.kind, ())]
    return found


def _name(config: TaskRunConfig) -> str:
    """The recipe with its variant, where there are several."""
    if config.recipe is None:
        return config.name
    name, _, variant = config.recipe.partition(":")
    return load_recipe(name).title_of(variant, ": ", name)


def _own_figures(loaded: LoadedTask, data: TaskData) -> dict[str, float]:
    """What only the run's recipe measures."""
    if loaded.config.recipe is None:
        return {}
    code = load_recipe(loaded.config.recipe.partition(":")[0]).code()
    return dict(code.measure(loaded, data)) if hasattr(code, "measure") else {}  # type: ignore[union-attr]
