"""A run's folder as one HTML page."""

from simclr_pl.report.page import write_report
from simclr_pl.report.reading import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
