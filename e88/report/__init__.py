"""Tables, figures and pages made from stored records alone. Nothing here needs torch."""

from __future__ import annotations

from e88.report.page import render, write_page
from e88.report.plots import write_figure

__all__ = ["render", "write_figure", "write_page"]
