"""Where the results of a command go: the terminal, a JSON file, the tracker's run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

import simclr_pl
from simclr_pl.cli import Tracker
from simclr_pl.commands.comparison import Compared
from simclr_pl.commands.encoders import Subject
from simclr_pl.distributed import all_reduce_sum
from simclr_pl.errors import InputError
from simclr_pl.trackers import WandbTracker, trackers_of


def table_of(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal; all columns but the first are aligned to the right.

    Args:
        title: above it.
        headings: of the columns.
        rows: cells, as they are to be shown.
    """
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    """A share as "94.0", or with its interval as "94.0 [91.4, 95.8]", in percent; None as "-"."""
    if share is None:
        return "-"
    ends = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * share:.1f}{ends}"


def sizes_of(part: Compared, num_classes: int) -> dict[str, int]:
    """The numbers of classes, bank and query images, over all ranks; collective."""
    counts = [len(part.bank.labels), len(part.query.labels)]
    bank, query = all_reduce_sum(part.bank.labels.new_tensor(counts)).tolist()
    return {"classes": num_classes, "bank": bank, "query": query}


def result_file(command: str, subject: Subject, out: str | None = None) -> Path:
    """The JSON file of a result: ``last.<command>.json`` beside last.ckpt, or in the working folder.

    Args:
        command: e.g. "linear".
        subject: the encoder.
        out: the file itself, if given.

    Raises:
        InputError: the folder of ``out`` does not exist.
    """
    if out is not None:
        if not Path(out).absolute().parent.is_dir():
            raise InputError(
                f"`out` must lie in a folder that exists; got {out!r}. Make the folder first."
            )
        return Path(out)
    if subject.checkpoint is not None:
        return subject.checkpoint.with_suffix(f".{command}.json")
    return Path(f"{_plain(subject.name)}.{command}.json")


@rank_zero_only
def publish(
    command: str,
    subject: Subject,
    table: Table | Sequence[Table | str],
    values: dict[str, Any],
    out: str | None = None,
    track: Sequence[Tracker] = (),
) -> None:
    """Prints the table, writes the JSON file, logs to the trackers; on rank 0 only.

    Args:
        command: e.g. "linear".
        subject: the encoder.
        table: what is printed, in order.
        values: what the JSON file holds, beside the subject's name and step; its numbers with a decimal
            point are logged as ``results/<command>_<key>``.
        out: the file, in place of `result_file`'s.
        track: trackers that log the numbers, into the run of the training where there is one.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for part in [table] if isinstance(table, (Table, str)) else table:
        console.print(part)
    head = {
        "command": command,
        "subject": subject.name,
        "step": subject.step,
        "version": simclr_pl.__version__,
    }
    file = result_file(command, subject, out)
    file.write_text(json.dumps({**head, **values}, indent=2) + "\n")
    console.print(f"Written to {file}")
    numbers = {f"results/{command}_{k}": v for k, v in values.items() if isinstance(v, float)}
    folder = subject.run or Path("runs", _plain(subject.name))
    project = (subject.config or {}).get("name", "simclr")
    for logger in trackers_of(folder, project, track, purge_step=None, checkpoint=False):
        logger.log_metrics(numbers, subject.step)
        logger.finalize("success")
        if isinstance(logger, WandbTracker):
            logger.experiment.finish()


def _plain(name: str) -> str:
    """A name as a file's."""
    return name.replace("/", "-")
