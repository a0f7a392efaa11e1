"""Pages of the observatory: one HTML file with every figure of a routing record, or of one prediction."""

from moekit.explain.page.document import render_explain_page
from moekit.explain.page.prediction import render_prediction_page

__all__ = ["render_explain_page", "render_prediction_page"]
