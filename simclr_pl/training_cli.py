"""`simclr fit`, `validate`, `test` and `predict`: LightningCLI with the monitors of this project."""

import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from simclr_pl.callbacks import (
    CollapseMonitor,
    EvaluationPace,
    ExactCheckpoint,
    FeatureWriter,
    FiniteGuard,
    KNNMonitor,
    OnlineLinearProbe,
    Pictures,
    Preemption,
    RunReport,
    RunSummary,
    StepLog,
    ThroughputMonitor,
    Watchdog,
)
from simclr_pl.checkpoint_io import SafeCheckpointIO
from simclr_pl.cli import _VERBS, Tracker
from simclr_pl.data import ContrastiveDataModule
from simclr_pl.errors import InputError
from simclr_pl.run_folder import Resumed, find_resumed, loggers_of
from simclr_pl.saved_config import SaveMaskedConfig
from simclr_pl.simclr import SimCLR
from simclr_pl.strategies import FullySharded
from simclr_pl.training_help import TrainingParser

# After every epoch, evaluated or not; the newest two, so that damage to one costs an epoch at most.
# A step that is done again is the same to the bit: its file takes the place of the one that is there.
_CHECKPOINTS = {
    "monitor": "step",
    "mode": "max",
    "save_top_k": 2,
    "save_last": "link",
    "save_on_train_epoch_end": True,
    "enable_version_counter": False,
}

_MONITORS: dict[str, tuple[type[Callback], dict[str, Any], str]] = {
    "probe": (OnlineLinearProbe, {}, "Online linear probe; null for none."),
    "knn": (KNNMonitor, {}, "kNN monitor; null for none."),
    "collapse": (CollapseMonitor, {}, "Collapse measures and warning; null for none."),
    "pictures": (Pictures, {}, "Views, nearest neighbours, a map of features; null for none."),
    "throughput": (
        ThroughputMonitor,
        {},
        "Speed, split of the time, memory, unreadable samples; null for none.",
    ),
    "summary": (RunSummary, {}, "Scores and speed in summary.json; null for none."),
    "report": (RunReport, {}, "environment.json and a page, report.html; null for none."),
    "finite": (FiniteGuard, {}, "Leaves out updates that are not finite; null for none."),
    "checkpoint": (
        ExactCheckpoint,
        _CHECKPOINTS,
        "When checkpoints are written, into the run's folder; null for never.",
    ),
    "preemption": (
        Preemption,
        {},
        "SIGTERM and SIGUSR1 save, stop and exit with 85; null for Lightning's handlers.",
    ),
    "watchdog": (Watchdog, {}, "Ends a run that hangs or has lost a rank with 75; null for none."),
}

_TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "num_sanity_val_steps": 0,  # the summary's baselines walk the same path, in full
    "use_distributed_sampler": False,  # the data module's own samplers know the ranks
    "log_every_n_steps": 10,
    "check_val_every_n_epoch": None,  # EvaluationPace
    "enable_model_summary": False,  # RunSummary says it in one line
}

_RESUME = (
    "Go on with a run in its folder, as if it had not stopped: a checkpoint's file, or auto for the "
    "newest valid one of <trainer.default_root_dir>/<name>/; where there is none, auto starts a run."
)


def _page(verb: str) -> dict[str, str]:
    """The head of a verb's help."""
    text, example, *_ = _VERBS[verb]
    usage = f"simclr {verb} [--config FILE_OR_NAME ...] [--KEY VALUE ...]"
    return {"usage": usage, "description": f"{text} For example:\n\n    {example}"}


class _ProgressBar(RichProgressBar):
    """Loss, accuracies and speed, without the run's version; drawn 10 times a second, not 100."""

    def __init__(self, refresh_rate: int = 10, **options: Any) -> None:
        super().__init__(refresh_rate, **options)

    def get_metrics(self, trainer: Trainer, *args: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, *args)
        metrics.pop("v_num", None)
        if (speed := metrics.pop("throughput/samples_per_second", None)) is not None:
            unit = trainer.datamodule.source.unit  # type: ignore[attr-defined]
            metrics[f"{unit}/s"] = f"{speed:.0f}"
        return metrics  # type: ignore[return-value]


class SimCLRCLI(LightningCLI):
    """LightningCLI on `SimCLR` and `ContrastiveDataModule`, with one run folder and one seed.

    Args:
        args: with the subcommand first; by default the process's arguments.
    """

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            SimCLR,
            ContrastiveDataModule,
            save_config_callback=SaveMaskedConfig,
            trainer_defaults=_TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            parser_class=TrainingParser,
            parser_kwargs={
                "prog": "simclr",
                "usage": _VERBS["fit"].example,  # where nothing is given
                **{name: _page(name) for name in self.subcommands()},
            },
            args=args,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As LightningCLI's, also where the process has arguments of its own."""
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what concerns the whole run."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="Seed of initialisation, order, views and dropout.",
        )
        parser.add_argument(
            "--name",
            type=str,
            default="simclr",
            help="The run's files are in <trainer.default_root_dir>/<name>/version_<n>/.",
        )
        parser.add_argument(
            "--track",
            type=list[Tracker],
            default=[],
            help="Trackers beside metrics.csv; wandb-offline needs no account.",
        )
        parser.add_argument(
            "--track_checkpoint",
            type=bool,
            default=False,
            help="At the end, hand the newest checkpoint to wandb, and the best one of a metric.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the monitors and links the seed."""
        for key, (cls, options, text) in _MONITORS.items():
            default = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": options}
            parser.add_argument(f"--{key}", type=cls | None, default=default, help=text)
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", type=str | None, default=None, help=_RESUME)
        assert isinstance(parser, TrainingParser)
        parser.describe(subcommand, list(_MONITORS))
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as given.

        LightningCLI would let the checkpoint's model override it without a word. Here a model that
        differs from the checkpoint's is an error, from `SimCLR.on_load_checkpoint`.
        """

    def instantiate_classes(self) -> None:
        """As LightningCLI's, by jsonargparse's present name for it."""
        self._resumed = self._find_resumed()
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()
        if self._resumed is not None:
            self.config_init[self.subcommand]["ckpt_path"] = str(self._resumed.checkpoint)

    def _find_resumed(self) -> Resumed | None:
        """The run that this one goes on with."""
        resume = self._get(self.config, "resume") if self.subcommand == "fit" else None
        if resume is None:
            return None
        options = (self._get(self.config, "checkpoint") or {}).get("init_args") or {}
        taken = self._get(self.config, "ckpt_path") or options.get("dirpath")
        if taken is not None:
            raise InputError(
                f"`resume` goes on in the run's own folder; got {taken!r} for `ckpt_path` or "
                "`checkpoint.dirpath`. Leave out `resume` or these."
            )
        self.config[self.subcommand]["resume"] = None  # the saved configuration is of the whole run
        root = Path(self._get(self.config, "trainer")["default_root_dir"])
        resumed = find_resumed(resume, root / self._get(self.config, "name"))
        if resumed is not None:
            self.save_config_kwargs = {**self.save_config_kwargs, "overwrite": True}
            warnings.filterwarnings("ignore", ".*Checkpoint directory .* is not empty.*")
        return resumed

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the monitors, the summary, the progress bar and the loggers to the trainer's own."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        callbacks = [self._get(self.config_init, key) for key in _MONITORS]
        callbacks = [c for c in callbacks if c is not None]
        if self.subcommand != "fit":
            callbacks = [c for c in callbacks if not isinstance(c, (Checkpoint, RunSummary))]
        if self.subcommand == "predict":
            callbacks.append(FeatureWriter())
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        wants_bar = config["enable_progress_bar"] is not False
        if wants_bar and not any(isinstance(c, ProgressBar) for c in own):
            callbacks.insert(0, _ProgressBar())  # first to close: what follows prints below it
        config["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in [*own, *callbacks])
        callbacks = [*self._pace(config), *callbacks]
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, SafeCheckpointIO()]
        config["callbacks"] = [StepLog(), *own]
        if config["strategy"] == "fsdp":
            config["strategy"] = FullySharded()
        keys = ("name", "track", "track_checkpoint")
        name, track, checkpoint = (self._get(self.config_init, key) for key in keys)
        config["logger"] = loggers_of(config, name, track, self._resumed, checkpoint)
        return self._instantiate_trainer(config, callbacks)

    def _pace(self, config: dict[str, Any]) -> list[Callback]:
        """Completes the trainer's options on evaluation, which must not both be None."""
        interval = config["val_check_interval"]
        by_epochs = interval is None or isinstance(interval, float)  # a float: parts of an epoch
        if config["check_val_every_n_epoch"] is not None or not by_epochs:
            return []
        if self.subcommand != "fit" or interval is not None:
            config["check_val_every_n_epoch"] = 1
            return []
        # Until the pace is known: not 1, which EarlyStopping takes for "at the end of every epoch".
        config["check_val_every_n_epoch"] = 2
        return [EvaluationPace()]
