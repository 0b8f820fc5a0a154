"""The parser of `simclr fit` and its like: configs by name, and help that opens with what people set."""

import argparse
from collections.abc import Iterator
from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser

from simclr_pl.parsers import HelpFormatter, HelpPage
from simclr_pl.presets import config_file

_FIRST = {
    "The run": (
        "config",
        "name",
        "trainer.default_root_dir",
        "seed_everything",
        "track",
        "track_checkpoint",
    ),
    "Start": ("resume", "ckpt_path"),
    "Data": ("data.source", "data.augment", "data.global_batch_size", "data.num_workers"),
    "Model and loss": (
        "model.encoder",
        "model.projector",
        "model.temperature",
        "model.encode_chunk",
        "model.optimizer",
        "model.lr_scaling",
        "model.warmup_epochs",
    ),
    "Training": (
        "trainer.max_epochs",
        "trainer.devices",
        "trainer.precision",
        "trainer.strategy",
        "trainer.check_val_every_n_epoch",
        "trainer.fast_dev_run",
    ),
}
_HELP = {
    "config": (
        "A YAML file, or the name of one that comes with the package (`simclr presets` lists them). "
        "Of several, later ones override."
    ),
    "ckpt_path": "A checkpoint, whose weights are taken.",
    "trainer.default_root_dir": "The folder of all runs.",
    "trainer.max_epochs": "Epochs, each a pass over the training images.",
    "trainer.devices": "GPUs or processes of each machine: a number, a list of them, or auto for all.",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed, for example; by default 32-true.",
    "trainer.strategy": "How devices share the work: auto, ddp or fsdp, for example.",
    "trainer.check_val_every_n_epoch": (
        "Evaluate every n epochs. By default as often as keeps it within 1 % of the encoder's work, and "
        "after the last step; null with trainer.val_check_interval a number of batches: every so many."
    ),
    "trainer.fast_dev_run": "Try one batch of each kind, or so many, and write next to nothing.",
}
_REST = """\
Options of a class follow its key, and .help lists them:

    simclr {verb} --model.optimizer LARS --model.optimizer.lr 0.3
    simclr {verb} --model.optimizer.help LARS

--KEY null switches a monitor off, --KEY.OPTION sets its options: {monitors}.

All options, also the Trainer's, and the values in force as YAML:

    simclr {verb} --help_all
    simclr {verb} --config quickstart --print_config"""


class ConfigByName(ActionConfigFile):
    """A path, or the name of a configuration that comes with the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Parses the file that is meant."""
        if not values.lstrip().startswith("{") and "://" not in values:  # JSON, an address
            values = str(config_file(values))
        super().__call__(parser, cfg, values, option_string)


class _HelpAll(argparse._HelpAction):
    """Prints every option, in the groups that the classes make."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class TrainingParser(HelpPage, LightningArgumentParser):  # type: ignore[misc]
    """Lightning's, whose help shows the options that people set first."""

    shows_all = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Takes configs by name."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = ConfigByName
        return super().add_argument(*args, **kwargs)

    def describe(self, verb: str, monitors: list[str]) -> None:
        """Completes the help of one verb, once all options are there."""
        self.add_argument("--help_all", action=_HelpAll, help="Show every option and exit.")
        self.epilog = _REST.format(verb=verb, monitors=", ".join(monitors))
        for action in self._actions:
            action.help = _HELP.get(action.dest, action.help)

    def sections(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        """The options that are set first, or all in their groups."""
        if self.shows_all:
            for group in self._action_groups:
                yield group.title or "", group._group_actions
            return
        by_option = {option: a for a in self._actions for option in a.option_strings}
        for title, keys in _FIRST.items():
            yield title, [by_option[f"--{key}"] for key in keys if f"--{key}" in by_option]
