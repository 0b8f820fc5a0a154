"""The command `simclr`: the table of its verbs, help, and what becomes of errors.

Nothing but the standard library is imported before a verb is called, so that help and mistakes are quick.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, NamedTuple

import simclr_pl
from simclr_pl.errors import InputError

Tracker = Literal["wandb", "wandb-offline", "tensorboard"]


class Verb(NamedTuple):
    """A command: its line in the overview, and where it is, as "module:name".

    The place holds a function, or several by name, whose signatures and docstrings are the options and
    their help. What a function returns is the exit code. LightningCLI's verbs have no place.
    """

    text: str
    example: str
    place: str | None = None
    raw: bool = False  # the function takes the words of the command line, and parses them itself


_GROUPS: dict[str, dict[str, Verb]] = {
    "Train and evaluate": {
        "fit": Verb("Train an encoder.", "simclr fit --config quickstart"),
        "validate": Verb(
            "Score a checkpoint by kNN and the probe it was trained with.",
            "simclr validate --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt",
        ),
        "test": Verb(
            "The same, as Lightning's test.",
            "simclr test --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt",
        ),
        "predict": Verb(
            "Write the features of the query images.",
            "simclr predict --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt",
        ),
        "linear": Verb(
            "Train a linear classifier on frozen features.",
            "simclr linear RUN",
            "simclr_pl.commands.linear:linear",
        ),
        "knn": Verb(
            "Classify by nearest neighbours among frozen features.",
            "simclr knn RUN",
            "simclr_pl.commands.knn:knn",
        ),
        "similarity": Verb(
            "Compare the similarity of features of texts with given scores.",
            "simclr similarity RUN --pairs FILE",
            "simclr_pl.commands.similarity:similarity",
        ),
        "finetune": Verb(
            "Train the whole encoder on all or a few labels.",
            "simclr finetune RUN --fraction 0.01",
            "simclr_pl.commands.finetune:finetune",
        ),
        "distill": Verb(
            "Train a student on a fine-tuned teacher's answers.",
            "simclr distill RUN/checkpoints/last.finetune.ckpt --student resnet18",
            "simclr_pl.commands.distill:distill",
        ),
        "report": Verb(
            "Show one run, or several side by side, as one HTML page.",
            "simclr report RUN",
            "simclr_pl.commands.report:report",
        ),
    },
    "Data": {
        "data": Verb(
            "Check, describe and clean sets of any kind, pack those of images.",
            "simclr data check FOLDER",
            "simclr_pl.data.commands:COMMANDS",
        ),
    },
    "Hand on": {
        "embed": Verb(
            "Write features of every image to Parquet or npz.",
            "simclr embed RUN --split train --neighbours 10",
            "simclr_pl.commands.embed:embed",
        ),
        "export": Verb(
            "Write an encoder's weights for other programs.",
            "simclr export RUN",
            "simclr_pl.commands.export:export",
        ),
        "import": Verb(
            "Take over weights that another program has trained.",
            "simclr import FILE",
            "simclr_pl.commands.import_weights:import_weights",
        ),
    },
    "Machine": {
        "doctor": Verb(
            "Check this machine, and what a configuration needs of it.",
            "simclr doctor --config quickstart",
            "simclr_pl.commands.doctor:doctor",
            raw=True,
        ),
        "presets": Verb(
            "List the configurations that come with the package, show or copy one.",
            "simclr presets cifar10 --out my.yaml",
            "simclr_pl.commands.presets:presets",
        ),
        "completion": Verb(
            "Print a script that completes words for bash or zsh.",
            'eval "$(simclr completion bash)"',
            "simclr_pl.commands.completion:completion",
        ),
    },
}
_VERBS = {name: verb for verbs in _GROUPS.values() for name, verb in verbs.items()}

# Lightning's advice that does not fit: sets in memory need no workers, the epoch's length is short by
# design, and the deprecations are between Lightning and its own dependencies.
_NOISE = (
    ".*does not have many workers.*",
    ".*treespec, LeafSpec.*",
    ".*dirpath has changed from.*",  # a resumed run writes into a folder of its own
    ".*callbacks used to create the checkpoint need to be provided.*",  # some only watch training
    ".*Experiment logs directory .* exists and is not empty.*",
    "FSDP2-wrapped module .* returned a view.*",  # nothing here writes into features
)
_CHATTER = ("Tip:", "Detected KeyboardInterrupt")  # hints at other products; `main` says the other


def main(args: list[str] | None = None) -> None:
    """Runs the command line; a user's mistake ends it with one line and exit code 2.

    Args:
        args: by default the process's arguments.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    rank_zero_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero_log.addFilter(lambda record: not any(w in record.getMessage() for w in _CHATTER))
    try:
        code = _run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = _interrupted()
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, KeyboardInterrupt):
            raise
        code = _interrupted()  # a Trainer has caught it, called its callbacks, and left with 1
    if code:
        sys.exit(code)


def _run(args: list[str] | None) -> int | None:
    first, *others = (sys.argv[1:] if args is None else args) or ["--help"]
    if first in ("-h", "--help"):
        print(_overview())
        return None
    if first == "--version":
        print(f"simclr {simclr_pl.__version__}")
        return None
    if first not in _VERBS:
        raise InputError(_unknown(first, "simclr", _VERBS))
    if _VERBS[first].place is None:
        from simclr_pl.training_cli import SimCLRCLI

        SimCLRCLI([first, *others])
        return None
    from simclr_pl.parsers import call

    command = command_of(first)
    if _VERBS[first].raw:
        return command(others)  # type: ignore[no-any-return]
    prog = f"simclr {first}"
    if isinstance(command, dict):
        word, *others = others or ["--help"]
        if word in ("-h", "--help"):
            print(_overview_of(first, command))
            return None
        if word not in command:
            raise InputError(_unknown(word, prog, command))
        command, prog = command[word], f"{prog} {word}"
    return call(command, prog, others)


def command_of(verb: str) -> Any:
    """The function of a verb that is not LightningCLI's, or several by name."""
    place = _VERBS[verb].place
    assert place is not None
    module, name = place.split(":")
    return getattr(import_module(module), name)


def _overview() -> str:
    lines = ["usage: simclr COMMAND [OPTIONS]", "", "SimCLR on PyTorch Lightning."]
    for group, verbs in _GROUPS.items():
        lines += ["", f"{group}:"]
        for name, verb in verbs.items():
            lines += [f"  {name:12}{verb.text}", f"  {'':12}  {verb.example}"]
    lines += [
        "",
        "RUN is the folder of a run, such as runs/quickstart/version_0, or one of its checkpoints.",
        "simclr COMMAND --help tells more of a command; simclr --version the version.",
    ]
    return "\n".join(lines)


def _overview_of(verb: str, commands: dict[str, Callable]) -> str:
    lines = [f"usage: simclr {verb} COMMAND [OPTIONS]", "", _VERBS[verb].text, "", "Commands:"]
    lines += [f"  {name:8}{(f.__doc__ or '').splitlines()[0]}" for name, f in commands.items()]
    example = f"For example: {_VERBS[verb].example}"
    return "\n".join([*lines, "", example, f"simclr {verb} COMMAND --help tells more of each."])


def _unknown(word: str, prog: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, known, n=1)
    remedy = f"Did you mean `{prog} {near[0]}`?" if near else f"`{prog} --help` lists them."
    return f"`{prog}` must be followed by a command; got {word!r}. {remedy}"


def _interrupted() -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the terminal interrupts every rank
        print("interrupted", file=sys.stderr)
    return 130  # as a shell says it: 128 + SIGINT
