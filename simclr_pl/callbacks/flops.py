"""How many operations training steps take, and how many the device could do.

Symbols: V views, B samples of this rank, n rows of one size of views (V*B).
"""

import time
from functools import cache
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_SIZES = ("views", "small_views")
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
_PRODUCTS, _SECONDS = 5, 0.2  # at least so many, for so long; the quickest counts


class FlopMeter:
    """Adds up the operations of training steps; each shape of views is counted out once.

    Attributes:
        total: operations on this rank.
        batches: that took them.
    """

    def __init__(self) -> None:
        self.total, self.batches = 0.0, 0
        self._known: dict[tuple[torch.Size, ...], float] = {}

    def add(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Adds a step on a batch; see `batch_flops`."""
        shapes = tuple(batch[name].shape for name in _SIZES if name in batch)
        if shapes not in self._known:
            self._known[shapes] = batch_flops(trainer, pl_module, batch)
        self.total += self._known[shapes]
        self.batches += 1

    @property
    def mean(self) -> float:
        """Operations of a batch."""
        return self.total / max(self.batches, 1)

    def start_anew(self) -> None:
        """Forgets the sum."""
        self.total, self.batches = 0.0, 0


def batch_flops(trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> float:
    """Floating-point operations of one training step on this rank: encoder and projector.

    One row of each size of views is encoded and counted, a multiply-add as two; a backward pass takes
    twice a forward (Kaplan et al., arXiv:2001.08361, section 2.1). Recomputation by ``encode_chunk`` and
    the loss are left out. Modes, statistics and torch's random state stay as they are.

    Args:
        trainer: whose precision is used.
        pl_module: a `SimCLR`.
        batch: ``views`` (n, ...), and where there are, ``small_views``.
    """
    device = pl_module.device
    modes = [(module, module.training) for module in pl_module.modules()]
    projector = cast(nn.Module, pl_module.projector)
    total = 0.0
    pl_module.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for name in batch.keys() & set(_SIZES):
                counter = FlopCounterMode(display=False)
                with torch.no_grad(), trainer.precision_plugin.forward_context(), counter:
                    projector(pl_module(batch[name][:1]))
                total += 3.0 * counter.get_total_flops() * len(batch[name])
    finally:
        for module, training in modes:
            module.training = training
    return total


def peak_flops(trainer: Trainer) -> float | None:
    """Operations per second that this rank's device reaches at its best, in the run's precision.

    Measured on large matrix products, once in a process: tables of such numbers know few devices, and
    those of their makers are not reached by anything. An H200 reaches about 790 TFLOP/s in bfloat16.

    Returns:
        None where the precision is none of torch's own, or the device neither a GPU nor a CPU.
    """
    dtype = _DTYPES.get(str(trainer.precision).split("-")[0])
    device = trainer.strategy.root_device
    if dtype is None or device.type not in ("cpu", "cuda"):
        return None
    return _measured(device, dtype, torch.get_num_threads())


@cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    side = 512 if device.type == "cpu" else 8192  # 0.4 GB of a GPU in two bytes each
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
    a, b = (torch.randn(side, side, **options) for _ in range(2))
    out = torch.empty_like(a)
    seconds: list[float] = []
    while len(seconds) < _PRODUCTS or sum(seconds) < _SECONDS:
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
