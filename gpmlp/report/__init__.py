"""The report is the uncertainty of a model on a page: how wrong, does it know, where blind, why, what next, how made."""

from __future__ import annotations

from gpmlp.report.data import ReportData
from gpmlp.report.page import build

__all__ = ["ReportData", "build"]
