"""The whole page: head, sections, style and script in one HTML file that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from moekit.evaluate.charts.theme import FONT, MONOSPACE, css_variables, escape
from moekit.evaluate.page.glossary import glossary_section
from moekit.evaluate.page.headline import make_headline
from moekit.evaluate.page.losses import curves_section
from moekit.evaluate.page.results import domains_section, gap_section, summary_section, tiles
from moekit.evaluate.page.routing import experts_section, load_section
from moekit.evaluate.page.schema import check_report
from moekit.evaluate.page.story import made_section, notes_section, samples_section


def render_quickstart_page(report: Mapping[str, Any]) -> str:
    """One self-contained HTML page for a quickstart report.

    Args:
        report: what `report.json` holds; see `moekit.evaluate.page.schema`.

    Raises:
        DataError: if a key of the report is missing or wrong; the message names each.
    """
    check_report(report)
    headline = make_headline(report)
    sections = [
        summary_section(report),
        curves_section(report),
        domains_section(report),
        gap_section(report),
        load_section(report),
        experts_section(report),
        samples_section(report),
        made_section(report),
        notes_section(report),
        glossary_section(report),
    ]
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    details = " ".join(escape(sentence) for sentence in headline.details)
    when = escape(report["created"][:16].replace("T", " "))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>moekit quickstart: {escape(headline.verdict)}</title>
<link rel="icon" href="data:,">
<style>{page_style()}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">moekit quickstart · {when} · version {escape(report["moekit_version"])}
<button type="button" id="theme" hidden>Dark</button></p>
<h1>{escape(headline.verdict)}</h1>
<p class="lead">{details}</p>
{tiles(report)}
</header>
{"".join(section for section in sections if section)}
<footer>Made by moekit {escape(report["moekit_version"])} from <code>report.json</code>, which lies beside
this page and holds every number on it.</footer>
</main>
<div id="tip" role="status" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def plain_page(title: str, eyebrow: str, heading: str, head: str, *sections: str) -> str:
    """A self-contained page without a script.

    Args:
        title: of the window. eyebrow, heading: the small line and the large one on top. All three are escaped here.
        head: HTML below the heading, such as tiles.
        sections: HTML; empty ones are left out.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{page_style()}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">{escape(eyebrow)}</p>
<h1>{escape(heading)}</h1>
{head}
</header>
{"".join(sections)}
</main>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def theme_script() -> str:
    """The script of the button that turns a page dark, and of hover texts (`data-tip`); it wants #theme and #tip."""
    return _asset("page.js")


def page_style() -> str:
    """The style sheet with the colours of the charts: by the system's choice, or by the button's."""
    light, dark = css_variables(dark=False), css_variables(dark=True)
    return (
        f":root {{ {light} color-scheme: light; --sans: {FONT}; --mono: {MONOSPACE}; }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} color-scheme: dark; }} }}\n"
        f'@media screen {{ :root[data-theme="dark"] {{ {dark} color-scheme: dark; }}\n'
        f':root[data-theme="light"] {{ {light} color-scheme: light; }} }}\n' + _asset("page.css")
    )
