"""The report of an evaluation: one HTML page that needs nothing else."""

from .contents import QueryCase, RankedDocument, Report, System, make_report
from .page import render_report

__all__ = ["QueryCase", "RankedDocument", "Report", "System", "make_report", "render_report"]
