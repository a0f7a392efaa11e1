"""The HTML of the dashboard: places for what its script fills in."""

from __future__ import annotations

from importlib.resources import files

from moekit import __version__
from moekit.evaluate.page.blocks import section
from moekit.evaluate.page.document import page_style, theme_script
from moekit.explain.page.document import asset, report_json
from moekit.explain.page.sections import figure

SHARED = ("core.js", "charts.js")
OWN = ("store.js", "figures.js", "tables.js", "main.js")


def dashboard_script() -> str:
    """Everything that the page runs beside the chart library."""
    parts = [*(asset(name) for name in SHARED), *(_asset(name) for name in OWN)]
    return theme_script() + "\n(() => {\n" + "\n".join(parts) + "\n})();\n"


def dashboard_style() -> str:
    """Its style: that of the other pages, and what only it has."""
    return f"{page_style()}\n{asset('explain.css')}\n{_asset('dashboard.css')}"


def dashboard_html() -> str:
    """The page; everything that it shows comes from the same address."""
    start = report_json({"title": "dashboard", "source": "dashboard", "moekit_version": __version__})
    sections = "".join(html for _, _, html in SECTIONS)
    links = " ".join(f'<a href="#{identity}">{title}</a>' for identity, title, _ in SECTIONS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>moekit dashboard</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="dashboard.css">
</head>
<body>
<main>
<header>
<p class="eyebrow"><span>moekit dashboard</span><span id="where"></span><span id="when"></span>
<button type="button" id="pause" aria-pressed="false">Pause</button>
<button type="button" id="theme" hidden>Dark</button></p>
<h1 id="headline" aria-live="polite">Reading the runs …</h1>
<p class="lead" id="lead"></p>
<p class="lost" id="lost" role="alert" hidden></p>
<noscript><p>The dashboard needs JavaScript: its figures come from this machine as they change.</p></noscript>
<nav aria-label="Sections">{links}</nav>
</header>
{sections}
<footer>moekit {__version__}. Runs are only read, and no address but this one is asked. Charts: Apache ECharts 6.1.0,
Apache License 2.0.</footer>
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="report">{start}</script>
<script src="echarts.js"></script>
<script src="dashboard.js"></script>
</body>
</html>
"""


def _table(identity: str, title: str) -> str:
    return (
        f'<div id="{identity}"><div class="bar"><span class="save"></span></div><div class="scroll">'
        f'<table class="text sortable" aria-label="{title}"><thead><tr></tr></thead><tbody></tbody></table></div></div>'
    )


BALANCE = (
    "Load entropy is 1 where all experts of a layer have as many choices, and 0 where one has all. Max violation is "
    "how far the busiest expert lies above the mean: 0 is even, 1 is twice as many. An expert is dead below 1% of "
    "the mean."
)
SECTIONS = [
    ("runs", "Runs", section(
        "runs", "Runs",
        "Choose the runs to compare. Those that train come first; a run is stalled where it has written nothing for a "
        "minute or ten times as long as usual.",
        _table("list", "Runs"),
    )),
    ("alarms", "Alarms", section(
        "alarms", "Alarms", "What went wrong with routers in the chosen runs, and what to change.",
        '<ul class="alarms"></ul>',
    )),
    ("losses", "Curves", section(
        "losses", "Loss and other curves",
        "Loss is in nats for each token or example: the lower the better. Of long runs neighbouring points are put "
        "together.",
        '<div class="bar controls"></div>',
        figure("validation", "Mean loss over the validation examples."),
        figure("bits", "Validation loss as bits of each byte that it predicts; moekit evaluate reads all of the "
               "text and takes the mean of its domains."),
        figure("loss", "Mean loss of the logged steps."),
        figure("other", "As logged."),
    )),
    ("balance", "Balance", section(
        "balance", "Balance of each layer", BALANCE, '<div class="bar controls"></div>',
        figure("load_entropy", ""), figure("max_violation", ""), figure("dead_experts", ""),
    )),
    ("loads", "Loads", section(
        "loads", "Load of the experts as it forms",
        "A row for each expert, time from left to right. Each cell is the expert’s choices against the mean of its "
        "layer: 1 is even, 2 is twice as many.",
        figure("heat", ""),
    )),
    ("specialisation", "Specialisation", section(
        "specialisation", "Specialisation as it forms",
        "From the same validation tokens at every validation, as train.record keeps them.",
        figure("group", "How much the expert says of the group of a token (domain or class): 0% nothing, 100% all. "
               "Chance alone gives figures up to the dotted line, 95% of the time."),
        figure("vocabulary", "Share of an id’s tokens that chose the expert, averaged over the expert’s tokens: 100% "
               "where each word has experts of its own."),
        figure("saturation", "Share of the newest choices of these tokens that each earlier step had made already."),
    )),
    ("settings", "Settings", section(
        "settings", "What the runs do differently",
        "Keys of the configurations that are not the same in all chosen runs.",
        _table("differences", "Differences of configuration"),
    )),
]  # fmt: skip


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
