"""The page of a report: sections, the report as JSON, style and scripts in one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from moekit.evaluate.charts.theme import clean, escape
from moekit.evaluate.page.document import page_style, theme_script
from moekit.explain.page.sections import alarm_list, sections, tiles

SCRIPTS = ("core.js", "charts.js", "figures.js", "text.js", "main.js")
LIBRARY = "vendor/echarts.min.js"


def render_explain_page(report: Mapping[str, Any]) -> str:
    """One self-contained HTML page for a report of `moekit.explain.summary.summarise`.

    Its policy lets it load nothing and run no script but its own; it works from a file.
    """
    return framed(
        report, SCRIPTS, tiles(report) + alarm_list(report), sections(report), report["sampling"]["words"]
    )


def framed(
    report: Mapping[str, Any],
    scripts: Sequence[str],
    head: str,
    parts: Sequence[tuple[str, str, str]],
    footer: str,
) -> str:
    """The page around sections, for any report with a verdict.

    Args:
        report: with `title`, `source`, `verdict`, `details`, `created`, `moekit_version`; the scripts read it.
        scripts: names of files, in their order.
        head: HTML below the verdict.
        parts: (identity, title, HTML) of each section.
        footer: text.
    """
    own = theme_script() + "\n(() => {\n" + "\n".join(asset(name) for name in scripts) + "\n})();\n"
    library = asset(LIBRARY)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in (library, own))
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    name = report["title"] or report["source"]
    links = " ".join(f'<a href="#{identity}">{escape(title)}</a>' for identity, title, _ in parts)
    details = " ".join(escape(sentence) for sentence in report["details"])
    when, version = escape(report["created"][:16].replace("T", " ")), escape(report["moekit_version"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>moekit explain: {escape(name)}</title>
<link rel="icon" href="data:,">
<style>{page_style()}
{asset("explain.css")}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">moekit explain · {escape(name)} · {when} · version {version}
<button type="button" id="theme" hidden>Dark</button></p>
<h1>{escape(report["verdict"])}</h1>
<p class="lead">{details}</p>
{head}
<nav aria-label="Sections">{links}</nav>
<noscript><p>The figures and the sorting of tables need JavaScript; tables can be read without it.</p></noscript>
</header>
{"".join(html for _, _, html in parts)}
<footer>{escape(footer)} Made by moekit {version}. Charts: Apache ECharts 6.1.0, Apache License
2.0.</footer>
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="report">{report_json(report)}</script>
<script>{library}</script>
<script>{own}</script>
</body>
</html>
"""


def report_json(report: Mapping[str, Any]) -> str:
    """The report as JSON that no HTML parser takes for anything else, and that holds no character HTML forbids.

    >>> report_json({"groups": ["</script>&"]})
    '{"groups":["\\\\u003c/script\\\\u003e\\\\u0026"]}'
    """
    text = clean(json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def asset(name: str) -> str:
    """A file of this folder: style, script, or the chart library."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
