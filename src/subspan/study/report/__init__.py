"""One HTML page of studies, runs and measurements: no file beside it, no network, light and dark."""

from subspan.study.report.gather import gather
from subspan.study.report.page import render

__all__ = ["gather", "render"]
