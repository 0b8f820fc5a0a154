"""How good features are: extraction and the protocols of the papers."""

from simclr_pl.evaluation.features import Labelled, encode_clean_views
from simclr_pl.evaluation.scores import Scores, score

__all__ = ["Labelled", "Scores", "encode_clean_views", "score"]
