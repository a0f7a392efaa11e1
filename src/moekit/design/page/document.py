"""The page of a search, in the style of `moekit explain`: sections, the report as JSON, style and scripts in one."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from moekit.config.atomic import json_ready
from moekit.evaluate.charts.numbers import format_count
from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import section
from moekit.evaluate.page.document import page_style, theme_script
from moekit.explain.page.document import LIBRARY, SCRIPTS, report_json

Report = Mapping[str, Any]
EXPLAIN = "moekit.explain.page"


def render_design_page(report: Report) -> str:
    """A self-contained HTML page for a report of `moekit.design.report`; it loads nothing and runs no other script."""
    # behind the figures of explain, which ours join, and before what draws them
    scripts = [_asset(EXPLAIN, name) for name in SCRIPTS]
    scripts.insert(SCRIPTS.index("text.js"), _asset(__package__, "figures.js"))
    own = theme_script() + "\n(() => {\n" + "\n".join(scripts) + "\n})();\n"
    library = _asset(EXPLAIN, LIBRARY)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in (library, own))
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    name, version = escape(report["title"]), escape(report["moekit_version"])
    when = escape(report["created"][:16].replace("T", " "))
    parts = _sections(report)
    links = " ".join(f'<a href="#{identity}">{escape(title)}</a>' for identity, title, _ in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>moekit {escape(report["kind"])}: {name}</title>
<link rel="icon" href="data:,">
<style>{page_style()}
{_asset(EXPLAIN, "explain.css")}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">moekit {escape(report["kind"])} · {name} · {when} · version {version}
<button type="button" id="theme" hidden>Dark</button></p>
<h1>{escape(report["verdict"])}</h1>
<p class="lead">{" ".join(map(escape, report["notes"]))}</p>
{_tiles(report)}
<nav aria-label="Sections">{links}</nav>
<noscript><p>The figures and the sorting of tables need JavaScript; tables can be read without it.</p></noscript>
</header>
{"".join(html for _, _, html in parts)}
<footer>Made by moekit {version} from <code>report.json</code>, which lies beside this page. Charts: Apache ECharts
6.1.0, Apache License 2.0.</footer>
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="report">{report_json(json_ready({**report, "layers": [], "texts": []}))}</script>
<script>{library}</script>
<script>{own}</script>
</body>
</html>
"""


def _tiles(report: Report) -> str:
    best = report["best"]
    cells = [
        (str(len(report["trials"])), "trials"),
        (str(report["ended"]["pruned"]), "given up early"),
        (f"{report['seconds'] / 60:.0f} min", "spent"),
        (str(len(report["front"])), "designs on the front"),
    ]
    if best is not None:
        cells += [(_number(best["mean"]), f"validation {report['key']} of the best"),
                  (format_count(best["cost"][report["axis"]]), f"{report['axis']} of the best")]  # fmt: skip
    shown = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for value, name in cells)
    return f'<dl class="tiles">{shown}</dl>'


def _sections(report: Report) -> list[tuple[str, str, str]]:
    word = "more" if report["higher"] else "less"
    found = []
    if report["finals"]["figures"]:
        found.append(("finals", "Chosen against default", section(
            "finals", "The chosen one against the default",
            f"Both trained from scratch for a whole run with {report['finals']['seeds']} seeds that nothing was chosen "
            "by: mean ± deviation. Test examples were looked at here alone, once.",
            _table("Finals", ["figure", "default", "chosen", "difference", "standard error"], _final_rows(report)),
        )))  # fmt: skip
    if report["designs"]:
        cost = {"active": "active parameters", "examples": "training examples"}[report["axis"]]
        found.append(("front", "Front", section(
            "front", "What more buys",
            f"Each point is a design by its {cost} and its figure on validation examples ({word} is better). The front "
            "holds those that no other one beats in both.",
            _figure("design_front", "Most trials have one seed: of points close together neither is better."),
        )))  # fmt: skip
    if report["importances"]:
        found.append(("importance", "Importance", section(
            "importance", "Which choices mattered",
            "How much each choice tells the best quarter of all trials from the rest (PED-ANOVA), as shares. Trials "
            "that were given up count as what they were: not among the best.",
            _figure("design_importance", "A choice that hardly varied among the trials cannot matter here."),
        )))  # fmt: skip
    if report["trials"]:
        found.append(("history", "History", section(
            "history", "Trial by trial", "The figure of each finished trial, and the best so far.",
            _figure("design_history", "Trials that were given up early have no figure at the end."),
        )))  # fmt: skip
    if report["designs"]:
        names = list(report["designs"][0]["features"])
        head = [
            "design",
            f"validation {report['key']}",
            "deviation",
            "seeds",
            report["axis"],
            "total",
            "latency (ms)",
            *names,
        ]
        found.append(("designs", "All designs", section(
            "designs", "All designs", "With a finished trial, best first.",
            _table("Designs", head if report["axis"] == "active" else [*head[:5], *names],
                   [_design_row(report, one, names) for one in report["designs"]]),
        )))  # fmt: skip
    if report["best"] is not None and report["best"]["overrides"]:
        lines = escape("\n".join(report["best"]["overrides"]))
        found.append(("recipe", "Recipe", section(
            "recipe", "The best as a recipe", "best.yaml beside this page holds all of it: moekit train best.yaml. "
            "As changes of the default it is:", f"<pre>{lines}</pre>",
        )))  # fmt: skip
    return found


def _final_rows(report: Report) -> list[list[str]]:
    def spread(figure: Mapping[str, Any], name: str) -> str:
        more = figure[f"{name}_deviation"]
        return _number(figure[name]) + (f" ± {_number(more)}" if more is not None else "")

    return [
        [
            name,
            spread(one, "default"),
            spread(one, "chosen"),
            _number(one["difference"]),
            _number(one["error"]),
        ]
        for name, one in report["finals"]["figures"].items()
    ]


def _design_row(report: Report, one: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    marks = [
        mark
        for mark, other in (("best", report["best"]), ("front", None))
        if (other and other["id"] == one["id"])
        or (mark == "front" and any(p["id"] == one["id"] for p in report["front"]))
    ]
    name = one["id"] + (f" ({', '.join(marks)})" if marks else "")
    row = [
        name,
        _number(one["mean"]),
        _number(one["deviation"]),
        str(one["seeds"]),
        f"{one['cost'][report['axis']]:.0f}",
    ]
    if report["axis"] == "active":
        latency = one["cost"].get("latency")
        row += [f"{one['cost']['total']:.0f}", "–" if latency is None else f"{1000 * latency:.2f}"]
    return row + [str(one["features"].get(feature, "")) for feature in names]


def _figure(kind: str, caption: str) -> str:
    return (
        f'<figure class="chart" data-chart="{kind}"><div class="bar"><h3></h3><span class="save"></span></div>'
        f'<div class="plot" role="img"></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f'<td class="n">{escape(cell)}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div data-table="{escape(name)}"><div class="bar"><span class="save"></span></div><div class="scroll tall">'
        f'<table class="sortable text"><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div></div>'
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _asset(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
