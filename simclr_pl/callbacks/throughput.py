"""How fast training is, where its time goes, and which samples could not be read.

Symbols: B samples of this rank, V views, n rows of one size of views (V*B).
"""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from simclr_pl.augment import Augment
from simclr_pl.callbacks.flops import FlopMeter, peak_flops
from simclr_pl.callbacks.step_clock import NOTHING, Reading, StepClock, peak_memory_mib
from simclr_pl.callbacks.step_log import StepLog
from simclr_pl.distributed import is_distributed, world_size
from simclr_pl.errors import InputError

_log = logging.getLogger(__name__)

_WINDOW = 50  # batches between two looks at the waiting


class ThroughputMonitor(Callback):
    """Speed, the split of the time, memory, and the samples that could not be read.

    Logs at the trainer's logging steps that are ``every_n_steps`` or more apart, of the time since it
    last did: ``throughput/data``
    (waiting for batches and their transfer), ``/augment`` (the stage on the device), ``/compute``
    (forward, backward, optimiser), ``/monitors`` (callbacks and evaluation) and ``/other``
    (checkpoints, the progress bar, the loop itself), in [0, 1], which add to 1;
    ``throughput/samples_per_second`` of all ranks and ``throughput/step_ms``, both without evaluation;
    ``throughput/peak_memory_mib`` so far, on a GPU what was allocated there, else the resident memory of
    the process; ``throughput/gflops``, 10^9 operations per second of the encoder and the projector on
    this rank, the backward pass counted as two forwards; ``throughput/flop_utilisation``, their share of
    what large matrix products reach on that device in that precision.

    On a GPU the times are those of its own queue, so only the waiting in which it stood idle counts. If
    more than ``warn_above`` of 50 batches' time went to waiting for the loader, one warning says what to
    do; an epoch's first batch, which may start workers, and evaluation are left out there.

    Logs ``data/unreadable`` after each epoch, the number of samples that could not be read so far on all
    ranks, and lists them in ``unreadable.tsv`` in the run's folder.

    Args:
        warn_above: share of the time, in [0, 1].
        every_n_steps: steps from one logging to the next, at least.

    Raises:
        InputError: ``warn_above`` outside [0, 1], or ``every_n_steps`` < 1.
    """

    def __init__(self, warn_above: float = 0.2, every_n_steps: int = 50) -> None:
        if not 0 <= warn_above <= 1:
            raise InputError(
                f"`warn_above` must be within [0, 1]; got {warn_above}. Set `throughput.warn_above`."
            )
        if every_n_steps < 1:
            raise InputError(
                f"`every_n_steps` must be >= 1; got {every_n_steps}. Set `throughput.every_n_steps`."
            )
        self.warn_above, self.every_n_steps = warn_above, every_n_steps
        self._warned = False
        self._clock: StepClock | None = None
        self._logged, self._watched = NOTHING, NOTHING
        self._logged_step, self._seen = 0, 0
        self._flops = FlopMeter()  # since it last logged
        self._peak_flops: float | None = None  # of the device, per second

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets up the clock."""
        if stage == "fit":
            self._clock = StepClock.of(trainer)
            self._logged, self._watched = NOTHING, NOTHING
            self._seen, self._flops = 0, FlopMeter()
            self._logged_step = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the clock."""
        if self._clock is not None:
            self._clock.leave()
            self._clock = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures what the device can do."""
        self._peak_flops = peak_flops(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the operations of the batch."""
        self._flops.add(trainer, pl_module, batch)

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs, and looks whether training waits, when it is time."""
        assert self._clock is not None
        self._seen += 1
        if self._seen % _WINDOW == 0 and not self._warned:
            self._watch(trainer, self._clock.read())
        step, every = trainer.global_step, int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if every and step % every == 0 and step - self._logged_step >= self.every_n_steps:
            self._logged_step = step
            now = self._clock.read()
            window, self._logged = now.since(self._logged), now
            if window.batches:
                samples = len(outputs["index"]) * world_size()
                self._log(trainer, pl_module, window, samples)

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, window: Reading, samples: int
    ) -> None:
        rate = window.batches / window.training  # batches per second
        values = {**window.shares(), "step_ms": 1000 / rate}
        values["peak_memory_mib"] = peak_memory_mib(pl_module.device)
        # By the mean, not the sum: a GPU's clock is some batches behind the count.
        flops = self._flops.mean * rate  # per second
        self._flops.start_anew()
        values["gflops"] = flops / 1e9
        if self._peak_flops:
            values["flop_utilisation"] = flops / self._peak_flops
        values = {f"throughput/{name}": value for name, value in values.items()}
        speed = {"throughput/samples_per_second": samples * rate}
        # Lightning would log the values again at every logging step until the epoch ends.
        pl_module.log_dict(values, logger=False)
        pl_module.log_dict(speed, logger=False, prog_bar=True)
        if trainer.is_global_zero:
            step = trainer.global_step - 1  # from 0, as Lightning numbers train/loss
            StepLog.of(trainer).write(trainer, {**values, **speed}, step)

    def _watch(self, trainer: Trainer, now: Reading) -> None:
        window, self._watched = now.since(self._watched), now
        seconds = window.seconds
        share = seconds["wait"] / max(window.training - seconds["start"], 1e-12)
        if window.batches and share > self.warn_above:
            self._warned = True
            _log.warning(_advice(trainer, share, window.batches))

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

    def state_dict(self) -> dict[str, Any]:
        """Whether it has warned, so that a resumed run does not repeat it."""
        return {"warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again."""
        self._warned = state_dict["warned"]


def _advice(trainer: Trainer, share: float, batches: int) -> str:
    workers = getattr(trainer.train_dataloader, "num_workers", 0)
    cures = [
        f"more workers (`data.num_workers`, now {workers}; at most the cores of this machine)",
    ]
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(getattr(data, "augment", None), Augment):
        packed = "`simclr data pack SRC OUT`, then `--data.source Shards --data.source.root OUT`"
        cures.insert(0, f"images decoded at a smaller size ({packed})")
        cures.append("a set that fits in memory there (`data.resident`)")
    waited = f"training waited for data in {share:.0%} of the last {batches} batches' time"
    return f"{waited}. What helps: {'; '.join(cures)}."
