"""The quickstart's report: what `report.json` must hold, and the page and the figure made from it."""

from moekit.evaluate.page.curves import reach, to_dense_loss
from moekit.evaluate.page.document import render_quickstart_page
from moekit.evaluate.page.figure import summary_figure
from moekit.evaluate.page.schema import SCHEMA, check_report, report_problems

__all__ = [
    "SCHEMA",
    "check_report",
    "reach",
    "render_quickstart_page",
    "report_problems",
    "summary_figure",
    "to_dense_loss",
]
