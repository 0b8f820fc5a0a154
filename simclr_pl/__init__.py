"""SimCLR on PyTorch Lightning.

The public names below are loaded on first use, so ``import simclr_pl`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr_pl.audio_augment import AudioAugment as AudioAugment
    from simclr_pl.augment import Augment as Augment
    from simclr_pl.callbacks import KNNMonitor as KNNMonitor
    from simclr_pl.callbacks import OnlineLinearProbe as OnlineLinearProbe
    from simclr_pl.callbacks import RunSummary as RunSummary
    from simclr_pl.data import ContrastiveDataModule as ContrastiveDataModule
    from simclr_pl.errors import InputError as InputError
    from simclr_pl.losses import NTXentLoss as NTXentLoss
    from simclr_pl.losses import nt_xent as nt_xent
    from simclr_pl.models import ConvEncoder as ConvEncoder
    from simclr_pl.models import Encoder as Encoder
    from simclr_pl.models import Projector as Projector
    from simclr_pl.optim import LARS as LARS
    from simclr_pl.simclr import SimCLR as SimCLR
    from simclr_pl.text_augment import TextAugment as TextAugment
    from simclr_pl.text_encoder import TextEncoder as TextEncoder

__version__ = "0.1.0"

_MODULE_OF = {
    "AudioAugment": "audio_augment",
    "Augment": "augment",
    "ContrastiveDataModule": "data",
    "ConvEncoder": "models",
    "Encoder": "models",
    "InputError": "errors",
    "KNNMonitor": "callbacks",
    "LARS": "optim",
    "NTXentLoss": "losses",
    "OnlineLinearProbe": "callbacks",
    "Projector": "models",
    "RunSummary": "callbacks",
    "SimCLR": "simclr",
    "TextAugment": "text_augment",
    "TextEncoder": "text_encoder",
    "nt_xent": "losses",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"simclr_pl.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'simclr_pl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
