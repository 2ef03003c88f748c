"""The report of an evaluation: one self-contained HTML page."""

from .contents import QueryCase, RankedDocument, Report, System, make_report
from .page import render_report

__all__ = ["QueryCase", "RankedDocument", "Report", "System", "make_report", "render_report"]
