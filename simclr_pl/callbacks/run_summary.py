"""The start-up lines, the final table and `summary.json`."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import simclr_pl
from simclr_pl.callbacks.evaluation_pace import EvaluationPace
from simclr_pl.callbacks.flops import FlopMeter, peak_flops
from simclr_pl.callbacks.step_clock import NOTHING, Reading, StepClock, peak_memory_mib
from simclr_pl.evaluation import Scores, encode_clean_views, score
from simclr_pl.optim import parameter_groups


class RunSummary(Callback):
    """Says what is about to run, and at the end what came of it.

    Three encoders are scored by one rule, kNN and logistic regression on frozen features of clean views:
    the trained one, the one at initialisation, and none at all (of images: raw pixels). The scores, the
    speed, what the time went to (as in `ThroughputMonitor`), the operations per second, the peak memory
    and the run's size go to the terminal and to ``summary.json`` in the run's folder. Without labels
    there are no scores.

    Args:
        baselines: score the encoder at initialisation and none at all before training.
    """

    def __init__(self, baselines: bool = True) -> None:
        self.baselines = baselines
        self.scores: dict[str, float] = {}
        self._samples = 0
        self._clock: StepClock | None = None
        self._before = NOTHING  # the time of the run that this one resumes
        self._peak_mib = 0.0
        self._flops = FlopMeter()
        self._peak_flops: float | None = None  # of the device, per second
        self._console = Console(highlight=False)
        self._ending: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets up the clock."""
        if stage == "fit":
            self._clock = StepClock.of(trainer)

    # Start of the run.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the encoder at initialisation and none at all."""
        if self.baselines and trainer.ckpt_path is None and _num_classes(trainer):
            self._say(trainer, f"Scoring the encoder at initialisation and {_raw(trainer)} ...")
            sets = encode_clean_views(trainer, pl_module, raw=True)
            for i, suffix in enumerate(("_init", "_raw")):
                bank, query = sets["bank"][i], sets["query"][i]
                assert bank is not None
                assert query is not None
                self._keep(score(bank, query, _num_classes(trainer)), suffix)

    def _keep(self, scores: Scores, suffix: str) -> None:
        self.scores["knn_top1" + suffix] = scores.knn
        self.scores["linear_top1" + suffix] = scores.linear

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the data, the model and the effective learning rate; measures the device."""
        self._say(trainer, *_start_lines(trainer, pl_module))
        self._peak_flops = peak_flops(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the operations of the batch."""
        self._flops.add(trainer, pl_module, batch)

    def _say(self, trainer: Trainer, *lines: Any) -> None:
        if trainer.is_global_zero:
            for line in lines:
                self._console.print(line, soft_wrap=True)

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts the samples of all ranks."""
        self._samples += len(outputs["index"]) * trainer.world_size

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the largest of the ranks' peak memory, before the scores need some."""
        peak = torch.tensor(peak_memory_mib(pl_module.device), device=pl_module.device)
        self._peak_mib = max(self._peak_mib, float(trainer.strategy.reduce(peak, reduce_op="max")))

    # End of the run.

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the trained encoder and writes `summary.json`."""
        if _num_classes(trainer):
            sets = encode_clean_views(trainer, pl_module)
            self._keep(score(sets["bank"][0], sets["query"][0], _num_classes(trainer)), "")
        summary = self._summary(trainer)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # collective
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            for logger in trainer.loggers:
                values = {f"summary/{key}": value for key, value in self.scores.items()}
                logger.log_metrics(values, trainer.global_step)
        self._ending = [
            *([_table(self.scores, _unit(trainer), _raw(trainer))] if self.scores else []),
            f"{summary['steps']:,} steps in {summary['seconds']:.1f} s, "
            f"{summary['samples_per_second']:,.0f} {_unit(trainer)} per second; files in {folder}",
            "time: "
            + ", ".join(f"{100 * share:.0f} % {name}" for name, share in summary["time"].items())
            + f"; peak memory {summary['peak_memory_mib']:,.0f} MiB",
            _speed(summary),
        ]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the table, below the progress bar."""
        self._say(trainer, *self._ending)
        self._ending = []
        if self._clock is not None:
            self._before = self._time()
            self._clock.leave()
            self._clock = None

    def _time(self) -> Reading:
        return self._before if self._clock is None else self._clock.read().after(self._before)

    def _summary(self, trainer: Trainer) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        probe = trainer.callback_metrics.get("probe/top1")
        time = self._time()
        flops = self._flops.mean * time.batches / max(time.training, 1e-9)
        return {
            **{key: round(value, 6) for key, value in sorted(self.scores.items())},
            **({"probe_top1": round(float(probe), 6)} if probe is not None else {}),
            "unit": _unit(trainer),
            **({"raw_name": _raw(trainer)} if "knn_top1_raw" in self.scores else {}),
            "samples_per_second": round(self._samples / max(time.training, 1e-9), 2),
            "steps": trainer.global_step,
            "seconds": round(time.training, 3),
            "time": {name: round(share, 4) for name, share in time.shares().items()},
            "gflops": round(flops / 1e9, 3),
            **({"flop_utilisation": round(flops / p, 4)} if (p := self._peak_flops) else {}),
            "peak_memory_mib": round(self._peak_mib, 1),
            "global_batch_size": data.global_batch_size,
            "world_size": trainer.world_size,
            "version": simclr_pl.__version__,
        }

    def state_dict(self) -> dict[str, Any]:
        """Scores and clock, so that a resumed run keeps its baselines."""
        time = self._time()
        return {
            "scores": self.scores,
            "samples": self._samples,
            "time": time.seconds,
            "batches": time.batches,
            "peak_mib": self._peak_mib,
            "flops": self._flops.total,
            "counted": self._flops.batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        self.scores = dict(state_dict["scores"])
        self._samples, self._peak_mib = state_dict["samples"], state_dict["peak_mib"]
        self._before = Reading(dict(state_dict["time"]), state_dict["batches"])
        self._flops.total, self._flops.batches = state_dict["flops"], state_dict["counted"]


def _num_classes(trainer: Trainer) -> int:
    return int(trainer.datamodule.num_classes)  # type: ignore[attr-defined]


def _unit(trainer: Trainer) -> str:
    """What is learned from, in the plural."""
    return str(trainer.datamodule.source.unit)  # type: ignore[attr-defined]


def _raw(trainer: Trainer) -> str:
    """What the baseline without an encoder is called."""
    return str(trainer.datamodule.augment.raw_name)  # type: ignore[attr-defined]


def _table(scores: dict[str, float], unit: str, raw_name: str) -> Table:
    table = Table(title=f"Accuracy on the query {unit}, %")
    for heading in ("", "trained", "at initialisation", raw_name):
        table.add_column(heading, justify="right")
    for name, key in (("kNN", "knn_top1"), ("linear", "linear_top1")):
        cells = [scores.get(key + suffix) for suffix in ("", "_init", "_raw")]
        table.add_row(name, *("-" if c is None else f"{100 * c:.1f}" for c in cells))
    return table


def _speed(summary: dict[str, Any]) -> str:
    whose = " of each rank" if summary["world_size"] > 1 else ""
    speed = f"{summary['gflops']:,.1f} GFLOP/s in encoder and head{whose}"
    if "flop_utilisation" not in summary:
        return speed
    share = 100 * summary["flop_utilisation"]
    return f"{speed}, {share:.0f} % of what large matrix products reach on the device"


def _start_lines(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    total = sum(p.numel() for p in pl_module.parameters())
    encoder = sum(p.numel() for p in cast(nn.Module, pl_module.encoder).parameters())
    _, exempt = parameter_groups(pl_module)
    optimizer = trainer.optimizers[0]
    data = trainer.datamodule  # type: ignore[attr-defined]
    shown = ", ".join(exempt[:3])
    more = f" and {len(exempt) - 3} more" if len(exempt) > 3 else ""
    return [
        data.describe(),
        f"{encoder / 1e6:.2f} M encoder parameters, {(total - encoder) / 1e6:.2f} M in the head; "
        f"features of width {pl_module.num_features}",
        f"{type(optimizer).__name__}, effective peak learning rate "
        f"{optimizer.param_groups[0]['initial_lr']:.4g}; {len(exempt)} tensors exempt from decay "
        f"and adaptation: {shown}{more}",
        f"global batch {data.global_batch_size} on {trainer.world_size} rank(s); "
        f"{trainer.estimated_stepping_batches:,} steps; precision {trainer.precision}; "
        + _evaluation(trainer),
    ]


def _evaluation(trainer: Trainer) -> str:
    if not trainer.enable_validation:
        return "not evaluated while it trains"
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    pace = next((c for c in callbacks if isinstance(c, EvaluationPace)), None)
    if pace is not None:
        return f"evaluated every {_epochs(pace.every_n_epochs)} and after the last step"
    interval = getattr(trainer, "val_check_interval", None)  # Lightning leaves it out for times
    epochs = trainer.check_val_every_n_epoch
    if interval is None:
        return "evaluated by the clock"
    if epochs is None:
        return f"evaluated every {interval} batches"
    within = "" if interval == 1.0 else f", within it every {trainer.val_check_batch} batches"
    return f"evaluated every {_epochs(epochs)}{within}"


def _epochs(n: int) -> str:
    return "epoch" if n == 1 else f"{n} epochs"
