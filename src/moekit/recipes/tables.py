"""Tables of recipes' results: of one, and of all that a folder holds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moekit.data.task_sources.base import task_sources
from moekit.evaluate.task_metrics import METRICS, metrics
from moekit.recipes.tasks import Recipe, load_recipe, recipe_names

SPARSE, DENSE = "MoE", "dense twin"
# rows of what can be reached at all, which is no baseline
BOUND = "bound: "


def catalogue() -> list[dict[str, Any]]:
    """All recipes: what they do, their data with its licence, variants, and minutes of one seed on two cores."""
    sources = task_sources()
    found = []
    for name in recipe_names():
        recipe = load_recipe(name)
        source = sources.get(recipe.run.get("data", {}).get("source"))
        found.append({
            "recipe": name, "about": recipe.about, "variants": list(recipe.variants), "minutes": recipe.minutes,
            "data": recipe.data or ("" if source is None else source.description),
            "licence": recipe.licence or ("" if source is None else source.licence),
        })  # fmt: skip
    return found


def catalogue_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """What `catalogue` gives, to be read."""
    lines = []
    for entry in entries:
        lines += [entry["recipe"], f"  {entry['about']} About {entry['minutes']} minutes on two cores.",
                  f"  data: {entry['data']} ({entry['licence']})"]  # fmt: skip
        if len(entry["variants"]) > 1:
            lines.append(f"  variants: {', '.join(entry['variants'])}")
    return "\n".join(lines)


def recipe_table(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], recipe: Recipe, variant: str
) -> dict[str, Any]:
    """Columns and rows: each model's figures (mean ± deviation over seeds), parameters, processor
    seconds of training and testing; published ones below."""
    keys = list(dict.fromkeys(key for results in rows.values() for row in results for key in row["scores"]))
    lines: list[list[str]] = []
    for name, results in rows.items():
        figures = [spread([row["scores"][key] for row in results if key in row["scores"]]) for key in keys]
        sizes = [
            f"{results[0][part] / 1e6:.2f} M" if part in results[0] else "–" for part in ("active", "total")
        ]
        taken = [row["processor_seconds"] for row in results if "processor_seconds" in row]
        seconds = f"{statistics.fmean(taken):.0f}" if taken else "–"
        lines.append([f"**{name}**" if name == SPARSE else name, *figures, *sizes, seconds])
    for figure in recipe.published.get(variant, ()):
        where = figure.get("metric", keys[0])
        figures = [f"{figure['figure']:.4g}" if key == where else "–" for key in keys]
        lines.append([f"published: {figure['what']}", *figures, "–", "–", "–"])
    return {"columns": ["model", *_headings(keys), "active", "total", "processor seconds"], "rows": lines}


def spread(values: Sequence[float]) -> str:
    """Mean ± deviation.

    >>> spread([0.5]), spread([0.9, 0.8]), spread([12.0, 14.0]), spread([])
    ('0.5000', '0.8500 ± 0.0707', '13.00 ± 1.41', '–')
    """
    if not values:
        return "–"
    mean = statistics.fmean(values)
    digits = 4 if abs(mean) < 10 else 2
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{more}"


def _headings(keys: Sequence[str]) -> list[str]:
    """The metric alone where one target is measured, else target and metric."""
    targets = {key.split(".")[0] for key in keys if "." in key}
    return [
        (key.split(".", 1)[1] if len(targets) == 1 else key.replace(".", " ", 1)) if "." in key else key
        for key in keys
    ]


def table_of_all(folder: Path, failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """One line for each result in a folder: the main metric of the MoE, of its twin and of the best classical baseline.

    Args:
        folder: that `run_recipe` wrote to.
        failed: errors by recipe and variant.
    """
    lines, commands = [], []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        if "rows" not in result or "recipe" not in result:
            continue
        lines.append(_line(result))
        commands.append(result["seeds"])
    seeds = max(commands, default=1)
    note = (
        "One line a recipe and variant, by its main metric; `moekit recipes run NAME --variant VARIANT` repeats it and "
        "says more. Twin: the same model without experts, with equal active parameters. Experts help: whether the MoE "
        "is better than its twin by more than the deviations of both together; 'equal' where neither is."
    )
    if failed:
        note += " Failed: " + "; ".join(f"{name}: {error}" for name, error in failed.items()) + "."
    columns = ["recipe", "metric", "MoE", "dense twin", "classical baseline", "published", "experts help"]
    return {
        "title": "All recipes", "command": f"moekit recipes run-all --seeds {seeds}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "note": note,
        "table": {"columns": columns, "rows": lines}, "failed": dict(failed or {}),
    }  # fmt: skip


def _line(result: Mapping[str, Any]) -> list[str]:
    recipe = load_recipe(result["recipe"])
    rows = result["rows"]
    key = recipe.measures[0].key if recipe.measures else next(iter(rows[SPARSE][0]["scores"]))
    high = _high(recipe)
    figures = {
        name: [row["scores"][key] for row in found if key in row["scores"]] for name, found in rows.items()
    }
    classical = {
        name: statistics.fmean(f)
        for name, f in figures.items()
        if name not in (SPARSE, DENSE) and not name.startswith(BOUND) and f
    }
    best = (max if high else min)(classical, key=lambda name: classical[name], default=None)
    published = [
        f"{figure['figure']:.4g} ({figure['what']})"
        for figure in recipe.published.get(result["variant"], ())
        if figure.get("metric", key) == key
    ]
    name = recipe.title_of(result["variant"], " ", result["recipe"])
    return [
        name, f"{key.split('.', 1)[-1]} {'↑' if high else '↓'}", spread(figures.get(SPARSE, [])),
        spread(figures.get(DENSE, [])),
        "–" if best is None else f"{classical[best]:.4g} ({best})", "; ".join(published) or "–",
        verdict(figures.get(SPARSE, []), figures.get(DENSE, []), high),
    ]  # fmt: skip


def _high(recipe: Recipe) -> bool:
    metrics()
    return not recipe.measures or METRICS[recipe.measures[0].metric].higher_is_better


def verdict(sparse: Sequence[float], dense: Sequence[float], high: bool = True) -> str:
    """Whether the sparse model is better than its twin by more than both deviations together.

    >>> verdict([0.9, 0.92], [0.8, 0.81]), verdict([0.8, 0.9], [0.82, 0.9]), verdict([0.9], [0.8])
    ('yes', 'equal', 'one seed')
    >>> verdict([0.93, 0.931], [0.95, 0.951]), verdict([0.93, 0.931], [0.95, 0.951], high=False)
    ('no', 'yes')
    """
    if not sparse or not dense:
        return "–"
    if len(sparse) < 2 or len(dense) < 2:
        return "one seed"
    gain = (statistics.fmean(sparse) - statistics.fmean(dense)) * (1 if high else -1)
    noise = (statistics.variance(sparse) + statistics.variance(dense)) ** 0.5
    return "equal" if abs(gain) <= noise else "yes" if gain > 0 else "no"
