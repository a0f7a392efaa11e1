"""The page of a search: one HTML file with its front, its trials and what mattered."""

from moekit.design.page.document import render_design_page

__all__ = ["render_design_page"]
