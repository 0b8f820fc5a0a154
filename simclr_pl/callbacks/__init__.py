"""What watches a run: online evaluation and the run's summary."""

from simclr_pl.callbacks.checkpoint import ExactCheckpoint
from simclr_pl.callbacks.collapse import CollapseMonitor
from simclr_pl.callbacks.evaluation_pace import EvaluationPace
from simclr_pl.callbacks.feature_writer import FeatureWriter
from simclr_pl.callbacks.finite_guard import FiniteGuard
from simclr_pl.callbacks.knn import KNNMonitor
from simclr_pl.callbacks.online_probe import OnlineLinearProbe
from simclr_pl.callbacks.pictures import Pictures
from simclr_pl.callbacks.preemption import Preemption
from simclr_pl.callbacks.run_report import RunReport
from simclr_pl.callbacks.run_summary import RunSummary
from simclr_pl.callbacks.step_log import StepLog
from simclr_pl.callbacks.throughput import ThroughputMonitor
from simclr_pl.callbacks.watchdog import Watchdog

__all__ = [
    "CollapseMonitor",
    "EvaluationPace",
    "ExactCheckpoint",
    "FeatureWriter",
    "FiniteGuard",
    "KNNMonitor",
    "OnlineLinearProbe",
    "Pictures",
    "Preemption",
    "RunReport",
    "RunSummary",
    "StepLog",
    "ThroughputMonitor",
    "Watchdog",
]
