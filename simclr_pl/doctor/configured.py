"""What `simclr fit` would run with the same arguments, built but not run."""

import io
import logging
import math
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

from simclr_pl.augment import Augment
from simclr_pl.errors import InputError
from simclr_pl.training_cli import SimCLRCLI

_UNKNOWN = "unrecognized arguments"  # argparse's words for options that do not exist


class UnknownOptionError(InputError):
    """An option of the command line does not exist."""


class Configured(SimCLRCLI):
    """Parses and instantiates, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(args: list[str]) -> Configured:
    """Model, data module and trainer of ``simclr fit`` with these arguments.

    Args:
        args: as those of `fit`.

    Raises:
        UnknownOptionError: an option does not exist.
        InputError: a file cannot be read, a value does not fit, or a class does not take it.
    """
    said = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)  # what Lightning says of devices, `doctor` says itself
        with redirect_stderr(said), redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Configured(["fit", *args])
    except SystemExit as error:
        reason = _reason(said.getvalue())
        kind = UnknownOptionError if _UNKNOWN in reason else InputError
        raise kind(f"{reason}.") from error
    except InputError:
        raise
    except Exception as error:  # what the classes of the config raise
        remedy = " `simclr doctor` alone lists the devices." if _is_of_devices(error) else ""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = lines[-1] if lines else "no reason given"
        raise InputError(f"{type(error).__name__}: {text}{remedy}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(output: str) -> str:
    """What the parser said, in one line."""
    _, _, text = output.rpartition("error: ")
    return " ".join(text.split()).rstrip(".") or "the arguments cannot be used"


def _is_of_devices(error: Exception) -> bool:
    return isinstance(error, MisconfigurationException)


class Kind(NamedTuple):
    """Views of one size.

    Attributes:
        number: of each sample.
        shape: of one.
        highest: of the numbers where these are tokens; None for floats.
    """

    number: int
    shape: tuple[int, ...]
    highest: int | None = None

    @property
    def bytes(self) -> int:
        """Of all views of a sample, as the encoder gets them."""
        return self.number * math.prod(self.shape) * (4 if self.highest is None else 8)


def kinds_of(cli: Configured, channels: int) -> list[Kind]:
    """The views of an image, by size; empty for other samples, whose views are to be made to be known.

    Of sizes that change with the epochs it is the largest, by which memory is bounded.
    """
    data: Any = cli.datamodule
    of_all_epochs = [*(data.augment_until or {}).values(), data.augment]
    views = max(of_all_epochs, key=lambda augment: getattr(augment, "size", 0))
    found = [(data.n_views, views), (data.n_small_views, data.small_augment)]
    return [Kind(n, (channels, a.size, a.size)) for n, a in found if n and isinstance(a, Augment)]
