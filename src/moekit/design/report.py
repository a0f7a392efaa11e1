"""What a search found, as JSON, as a table, as a page, as a picture, and as recipes that are ready to train.

It can be written at any moment: everything is made anew from the study and the rows.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moekit import __version__
from moekit.config.atomic import write_json, write_text
from moekit.config.errors import MissingExtraError
from moekit.config.task_run import TaskRunConfig
from moekit.config.train import RunConfig
from moekit.config.yamlio import dump_yaml
from moekit.design.finals import chosen
from moekit.design.front import Design, designs_of, importances, pareto
from moekit.design.page import render_design_page
from moekit.design.picture import write_front
from moekit.design.study import (
    JOURNAL,
    intervals_of,
    open_study,
    read_rows,
    read_settings,
    require_optuna,
    seconds_spent,
)
from moekit.design.subject import Changes, changed
from moekit.train.material import AnyRunConfig

REPORT, PAGE, PICTURE, BEST, FRONT = "report.json", "report.html", "front.png", "best.yaml", "front"
ENDS = ("complete", "pruned", "too slow", "broken", "known")
Report = dict[str, Any]


def write_report(folder: Path, config: AnyRunConfig | None = None) -> Report:
    """Write everything that is known of a search into its folder, and return the report.

    Args:
        folder: of the search.
        config: the default; read from the folder where None.

    Errors: `CheckpointError` for a folder that is no search.
    """
    settings = read_settings(folder)
    config = config_of(settings) if config is None else config
    report = made_report(folder, settings)
    write_json(folder / REPORT, report)
    for point in report["front"]:
        if point["id"] != "default":
            write_recipe(
                folder / FRONT / f"{point['id']}.yaml", config, point["changes"], _origin(report, point["id"])
            )
    for path in (folder / FRONT).glob("*.yaml"):  # of designs that were beaten since
        if path.stem not in {point["id"] for point in report["front"]}:
            path.unlink()
    if report["best"] is not None:
        best = report["best"]
        write_recipe(folder / BEST, config, best["changes"], _origin(report, best["id"]))
    write_text(folder / PAGE, render_design_page(report))
    try:
        write_front(folder / PICTURE, report)
    except MissingExtraError as error:
        report["no_picture"] = str(error)
    return report


def config_of(settings: Mapping[str, Any]) -> AnyRunConfig:
    """The default configuration that a folder keeps."""
    data = {**settings["config"], "runs_dir": "runs"}
    kind: Any = TaskRunConfig if "inputs" in data else RunConfig
    found: AnyRunConfig = kind.from_dict(data)
    return found


def write_recipe(path: Path, config: AnyRunConfig, changes: Changes, origin: str) -> None:
    """A configuration that `moekit train` takes."""
    ready = changed(config, changes).replace(name=f"{config.name}-best", runs_dir="runs")
    about = "\n".join(f"# {line}" for line in origin.splitlines())
    write_text(path, f"{about}\n{dump_yaml(ready.to_dict())}")


def overrides_of(changes: Changes) -> list[str]:
    """The changes as `key=value` for `moekit train recipe:NAME` and `moekit recipes run NAME`.

    >>> overrides_of({"model.d_ff": 300, "model.dense_layers": [0], "epochs": None})
    ['model.d_ff=300', 'model.dense_layers=[0]', 'epochs=null']
    """
    return [f"{key}={_flow(value)}" for key, value in changes.items()]


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str) and not value.isidentifier():
        return f'"{value}"'
    return repr(value) if isinstance(value, float) else str(value)


def trials_of(study: Any, key: str) -> list[dict[str, Any]]:
    """Every trial that was begun and ended, as plain data."""
    states = require_optuna().trial.TrialState
    found = []
    for trial in study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)):
        attributes = trial.user_attrs
        if "id" not in attributes:
            continue
        found.append({
            "number": trial.number, "id": attributes["id"], "changes": attributes["changes"],
            "features": attributes["features"], "cost": attributes["cost"], "seed": attributes["seed"],
            "rungs": attributes.get("rungs", []), "ended": attributes.get("ended", ""),
            "seconds": attributes.get("seconds"), "rung_figures": attributes.get("rung_figures", []),
            "figure": attributes.get("figures", {}).get(key),
            "worse": trial.values[0] if trial.values and attributes.get("ended") == "complete" else None,
        })  # fmt: skip
    return found


def made_report(folder: Path, settings: Mapping[str, Any]) -> Report:
    """Everything that the study and the rows say, ready for JSON."""
    study = open_study(folder) if (folder / JOURNAL).is_file() else None
    trials = trials_of(study, settings["key"]) if study is not None else []
    rows = read_rows(folder)
    axis, limits = settings["axis"], settings["limits"]
    designs = designs_of(trials, [row for row in rows if row["kind"] == "again"])
    known = {design.id: design for design in designs}
    allowed = [design for design in designs if design.within(limits) and math.isfinite(design.mean)]
    front = [allowed[place] for place in pareto([(design.mean, design.cost[axis]) for design in allowed])]
    finals = _finals(rows, settings)
    found = chosen(allowed, limits, settings["repeats"])
    # what whole runs say of the two stands above what trials say of all; nothing beyond the budget is a recipe to take
    picked = next((one for one in allowed if one.id == finals["better"]), None)
    if picked is None:
        pair = [one for one in (found, known.get("default")) if one in allowed]
        picked = min(pair, key=lambda one: one.mean, default=None)
    ended = {name: sum(trial["ended"] == name for trial in trials) for name in ENDS}
    report: Report = {
        "kind": settings["kind"], "title": settings["title"], "key": settings["key"], "higher": settings["higher"],
        "axis": axis, "limits": limits, "moekit_version": __version__, "source": str(folder), "folder": str(folder),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "effort": settings["effort"],
        "seconds": seconds_spent(intervals_of(study, folder)) if study is not None else 0.0,
        "trials": [
            {**{key: trial[key] for key in ("number", "id", "features", "cost", "ended", "seconds")},
             "figure": trial["figure"], "rungs": trial["rung_figures"]}
            for trial in trials
        ],
        "ended": ended,
        "designs": [_said(design) for design in sorted(designs, key=lambda one: one.mean)],
        "front": [_said(design) for design in sorted(front, key=lambda one: one.cost[axis])],
        "default": _said(known["default"]) if "default" in known else None,
        "chosen": _said(found) if found is not None else None,
        "best": None if picked is None else {**_said(picked), "overrides": overrides_of(picked.changes)},
        "importances": importances(trials) if study is not None else {},
        "finals": finals,
    }  # fmt: skip
    report["verdict"], report["notes"] = in_words(report, settings)
    return report


def _said(design: Design) -> dict[str, Any]:
    return {
        "id": design.id, "changes": design.changes, "features": design.features, "cost": design.cost,
        "mean": design.figure, "deviation": design.deviation, "seeds": len(design.values),
    }  # fmt: skip


def _finals(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Whole runs of the default and of the chosen design, by figure; `better` is by validation alone."""
    key, sign = settings["key"], 1 if settings["higher"] else -1
    by: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "final":
            by.setdefault(row["id"], {})[row["seed"]] = row
    others = [name for name in by if name != "default"]
    found: dict[str, Any] = {
        "better": None,
        "seeds": 0,
        "wanted": settings["seeds"],
        "figures": {},
        "chosen": None,
    }
    if "default" not in by or not others:
        return found
    # where a search was given more time and chose anew, the one that has most seeds
    name = max(others, key=lambda one: len(by[one]))
    seeds = sorted(set(by["default"]) & set(by[name]))
    if not seeds:
        return found
    found |= {"seeds": len(seeds), "chosen": name}
    for part in ("validation", "test"):
        for figure in by["default"][seeds[0]][part]:
            values = {one: [by[one][seed][part].get(figure) for seed in seeds] for one in ("default", name)}
            if all(value is not None for each in values.values() for value in each):
                found["figures"][f"{part} {figure}"] = _compared(values["default"], values[name])
    main = found["figures"].get(f"validation {key}")
    if main is not None:
        found["better"] = name if sign * main["difference"] > 0 else "default"
    return found


def _compared(default: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Means, deviations, and the difference of the means with its standard error.

    >>> _compared([1.0, 3.0], [2.0, 2.0])["difference"]
    0.0
    """
    spread = [statistics.stdev(values) if len(values) > 1 else None for values in (default, other)]
    error = None
    if spread[0] is not None and spread[1] is not None:
        error = math.sqrt((spread[0] ** 2 + spread[1] ** 2) / len(default))
    return {
        "default": statistics.fmean(default), "default_deviation": spread[0],
        "chosen": statistics.fmean(other), "chosen_deviation": spread[1],
        "difference": statistics.fmean(other) - statistics.fmean(default), "error": error,
    }  # fmt: skip


def in_words(report: Report, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The result in one sentence, won or lost, and what one must know of it."""
    finals, key, sign = report["finals"], report["key"], 1 if report["higher"] else -1
    notes = [
        f"{len(report['trials'])} trials in {report['seconds'] / 60:.1f} minutes, each {report['effort']:.0%} of a "
        f"whole run: " + ", ".join(f"{n} {name}" for name, n in report["ended"].items() if n) + "."
    ]  # fmt: skip
    if not report["trials"]:
        return "No trial is finished yet.", notes
    own = report["default"]["cost"] if report["default"] else {}
    over = [name for name, most in report["limits"].items() if own.get(name, 0) > most]
    if over:
        notes.append(
            f"The default itself is beyond the budget ({', '.join(over)}); it stands here for comparison."
        )
    if not report["front"] and own:
        least = ", ".join(
            f"{name} {min(trial['cost'].get(name, math.inf) for trial in report['trials']):.4g} (allowed {most:.4g})"
            for name, most in report["limits"].items()
        )
        return f"No design that was tried stays within the budget: the least were {least}.", notes
    if finals["figures"]:
        verdict, more = _verdict(finals, key, sign, report)
        notes = [*more, *notes]
        if finals["seeds"] < finals["wanted"]:
            notes.append(
                f"Only {finals['seeds']} of {finals['wanted']} seeds fitted into the time; the same command with a "
                "larger budget.time goes on."
            )
    else:
        verdict = "The search has no finals yet: what stands here are trials with one or a few seeds."
        notes.append(
            "The best of many trials is partly luck. The same command goes on to whole runs with fresh seeds."
        )
    if not report["importances"]:
        notes.append("There are too few trials to order the choices by importance.")
    return verdict, notes


def _verdict(finals: Mapping[str, Any], key: str, sign: int, report: Report) -> tuple[str, list[str]]:
    """Who won, in one sentence, and by how much at what cost, in others."""
    found = next((one for one in report["designs"] if one["id"] == finals["chosen"]), report["chosen"])
    parts = {name: finals["figures"].get(f"{name} {key}") for name in ("validation", "test")}
    known = {name: one for name, one in parts.items() if one is not None}
    wins = [name for name, one in known.items() if sign * one["difference"] > 0]
    main = known.get("test", known["validation"])
    name = {"design": "design", "tune": "setting"}[report["kind"]]
    if len(wins) == len(known) and _by_chance(main):
        verdict = f"The {name} found is ahead of the default, not beyond chance: {key} {_pair(main)}"
    elif len(wins) == len(known):
        verdict = f"The {name} found beats the default: {key} {_pair(main)}"
    elif wins:
        lost = " and ".join(name for name in known if name not in wins)
        verdict = f"The default is not beaten: better on {wins[0]}, not on {lost}"
    else:
        verdict = f"The default wins: {key} {_pair(main, turned=True)}"
    cost = {"active": "active parameters", "examples": "training examples"}[report["axis"]]
    spent = found["cost"][report["axis"]], report["default"]["cost"][report["axis"]]
    notes = [f"The chosen one has {spent[0]:,.0f} {cost}, the default {spent[1]:,.0f}."]
    for name, one in known.items():
        words = {"validation": "On validation examples", "test": "On test examples, looked at once"}[name]
        chance = ", a difference within two standard errors of these seeds" if _by_chance(one) else ""
        chance = ", with one seed, which says nothing of chance" if one["error"] is None else chance
        notes.append(f"{words}: {key} {_pair(one)} of the default{chance}.")
    return verdict + ".", notes


def _by_chance(figure: Mapping[str, Any]) -> bool:
    """Whether other seeds might turn a difference round: it is within two of its standard errors, or has none."""
    return figure["error"] is None or abs(figure["difference"]) <= 2 * figure["error"]


def _pair(figure: Mapping[str, Any], turned: bool = False) -> str:
    def one(name: str) -> str:
        spread = figure[f"{name}_deviation"]
        return f"{figure[name]:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")

    first, second = ("default", "chosen") if turned else ("chosen", "default")
    return f"{one(first)} against {one(second)}"


def report_table(report: Report) -> dict[str, Any]:
    """The front, the default and the chosen one as a table for a terminal (`moekit.cli.output.print_result`)."""
    names = list(report["default"]["features"]) if report["default"] else []
    shown = {one["id"]: one for one in report["front"]}
    for one in (report["chosen"], report["default"]):
        if one is not None:
            shown.setdefault(one["id"], one)
    rows = []
    for one in shown.values():
        best = " (best)" if report["best"] and one["id"] == report["best"]["id"] else ""
        spread = f" ± {one['deviation']:.4f}" if one["deviation"] is not None else ""
        rows.append(
            [one["id"] + best, f"{one['mean']:.4f}{spread}", one["seeds"], int(one["cost"][report["axis"]])]
            + [one["features"].get(name) for name in names]
        )
    note = [*report["notes"]]
    if report["importances"]:
        ranked = ", ".join(f"{name} {share:.0%}" for name, share in list(report["importances"].items())[:6])
        note.append(f"Importance of the choices: {ranked}.")
    return {
        "title": f"{report['title']}: {report['verdict']}",
        "table": {"columns": ["design", f"validation {report['key']}", "seeds", report["axis"], *names], "rows": rows},
        "note": " ".join(note),
    }  # fmt: skip


def _origin(report: Report, name: str) -> str:
    said = [
        f"moekit {report['kind']} of {report['title']}: {name}, from {report['folder']}.",
        report["verdict"],
    ]
    return "\n".join(textwrap.wrap(" ".join([*said, *report["notes"]]), 110))
