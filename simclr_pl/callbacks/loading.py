"""Whether training waits for its data, and which images could not be read."""

import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from simclr_pl.distributed import is_distributed, world_size
from simclr_pl.errors import InputError

_log = logging.getLogger(__name__)

_WINDOW = 50  # steps that the share is taken over


class LoadingMonitor(Callback):
    """Watches the loader: how long steps wait for it, and what it could not read.

    Logs ``data/wait``, the share of the last 50 steps' time that was spent waiting for batches, in
    [0, 1]. On a GPU only the time in which it stood idle counts. Above ``warn_above`` one warning says
    what to do. Logs ``data/unreadable``, the number of images that could not be read so far on all
    ranks, and lists them in ``unreadable.tsv`` in the run's folder. The first step of an epoch, which
    may start workers, and evaluation are left out.

    Args:
        warn_above: share of the time, in [0, 1].

    Raises:
        InputError: ``warn_above`` outside [0, 1].
    """

    def __init__(self, warn_above: float = 0.2) -> None:
        if not 0 <= warn_above <= 1:
            raise InputError(
                f"`warn_above` must be within [0, 1]; got {warn_above}. Set `loading.warn_above`."
            )
        self.warn_above = warn_above
        self._warned = False
        self._steps: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # waited, taken; seconds
        self._mark: tuple[float, float] | None = None  # at the end of the step before
        self._idle = _DeviceIdle()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock anew."""
        self._mark = None
        self._idle = _DeviceIdle()

    on_validation_end = on_train_epoch_start

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes when the device got its next work."""
        self._idle.ends(pl_module.device)

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Takes the step's time and its waiting."""
        now = time.perf_counter()
        waited = getattr(trainer.train_dataloader, "seconds_waited", 0.0)
        if self._mark is not None:
            before, waited_before = self._mark
            wait = min(waited - waited_before, self._idle.seconds(pl_module.device))
            self._steps.append((wait, now - before))
            share = sum(w for w, _ in self._steps) / sum(t for _, t in self._steps)
            pl_module.log("data/wait", share)
            if share > self.warn_above and len(self._steps) == _WINDOW and not self._warned:
                self._warned = True
                _log.warning(_advice(trainer, share))
        self._mark = now, waited
        self._idle.begins(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings together what the ranks could not read."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if is_distributed():
            found: list[dict[str, str]] = [{} for _ in range(world_size())]
            dist.all_gather_object(found, data.unreadable)
            for other in found:
                data.unreadable.update(other)
        pl_module.log("data/unreadable", float(len(data.unreadable)))
        folder = trainer.log_dir  # collective
        if data.unreadable and folder and trainer.is_global_zero:
            lines = (f"{name}\t{reason}\n" for name, reason in sorted(data.unreadable.items()))
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, "unreadable.tsv").write_text("".join(lines), encoding="utf-8")


class _DeviceIdle:
    """How long a GPU had nothing to do between two steps, without waiting for it."""

    def __init__(self) -> None:
        self._begin: torch.cuda.Event | None = None
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_WINDOW)
        self._latest = 0.0

    def begins(self, device: torch.device) -> None:
        self._begin = _event(device)

    def ends(self, device: torch.device) -> None:
        end = _event(device)
        if self._begin is not None and end is not None:
            self._pairs.append((self._begin, end))

    def seconds(self, device: torch.device) -> float:
        """Of the latest step whose work is done; without end where there is no such clock."""
        if device.type != "cuda":
            return float("inf")
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.popleft()
            self._latest = begin.elapsed_time(end) / 1000
        return self._latest


def _event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _advice(trainer: Trainer, share: float) -> str:
    workers = getattr(trainer.train_dataloader, "num_workers", 0)
    return (
        f"training waited for data in {share:.0%} of the last {_WINDOW} steps' time. What helps: "
        "images decoded at a smaller size (`simclr data pack SRC OUT`, then `--data.source Shards "
        f"--data.source.root OUT`); more workers (`data.num_workers`, now {workers}; at most the "
        "cores of this machine); a set that fits in memory there (`data.resident`)."
    )
