"""The run's config.yaml, without what is secret."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback

from simclr_pl.secrets import masked


class SaveMaskedConfig(SaveConfigCallback):
    """Lightning's, with the values of keys that look like tokens or passwords masked in the file."""

    def __init__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_Masking(parser), *args, **kwargs)  # type: ignore[arg-type]


class _Masking:
    """A parser's `save`: the callback's own would write the values first."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def save(self, config: Any, path: str, skip_none: bool, **_: Any) -> None:
        text = self._parser.dump(config, skip_none=skip_none)
        Path(path).write_text(yaml.safe_dump(masked(yaml.safe_load(text)), sort_keys=False))
