"""The run's config.yaml, and the trackers' copy of it, without what is secret."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from simclr_pl.secrets import masked
from simclr_pl.trackers import WandbTracker


class SaveMaskedConfig(SaveConfigCallback):
    """Lightning's, with the values of keys that look like tokens or passwords masked in the file."""

    def __init__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        self._masking = _Masking(parser)
        super().__init__(self._masking, *args, **kwargs)  # type: ignore[arg-type]

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hands it to the trackers; on rank 0."""
        config = self._masking.plain(self.config)
        for logger in trainer.loggers:
            if isinstance(logger, WandbTracker):
                logger.log_config(config)
            elif isinstance(logger, TensorBoardLogger):
                text = yaml.safe_dump(config, sort_keys=False)
                logger.experiment.add_text("config", f"```\n{text}```")


class _Masking:
    """A parser's `save`: the callback's own would write the values first."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def save(self, config: Any, path: str, skip_none: bool, **_: Any) -> None:
        Path(path).write_text(yaml.safe_dump(self.plain(config, skip_none), sort_keys=False))

    def plain(self, config: Any, skip_none: bool = False) -> dict[str, Any]:
        text = self._parser.dump(config, skip_none=skip_none)
        values = masked(yaml.safe_load(text))
        values.pop("resume", None)  # of `fit` alone, and of one start: the file is for all verbs
        return values  # type: ignore[no-any-return]
