"""The report: one HTML page of studies, runs and measurements, which needs no other file and no network."""

from subspan.study.report.gather import gather
from subspan.study.report.page import render

__all__ = ["gather", "render"]
