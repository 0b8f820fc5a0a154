"""What watches a run: online evaluation and the run's summary."""

from simclr_pl.callbacks.feature_writer import FeatureWriter
from simclr_pl.callbacks.knn import KNNMonitor
from simclr_pl.callbacks.loading import LoadingMonitor
from simclr_pl.callbacks.online_probe import OnlineLinearProbe
from simclr_pl.callbacks.run_summary import RunSummary

__all__ = ["FeatureWriter", "KNNMonitor", "LoadingMonitor", "OnlineLinearProbe", "RunSummary"]
