"""One pass over a set: in worker processes, in order, with a bar on the terminal.

Symbols: M samples in a set.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch.utils.data import DataLoader, Dataset

from simclr_pl.data.decode import Picture, open_picture
from simclr_pl.data.sources import EncodedReader, Images, Source, StoredSamples
from simclr_pl.data.workers import cores, settle
from simclr_pl.errors import InputError

T = TypeVar("T")

_TASK = (
    32  # samples that a worker takes at a time: 2,000 such messages a second cross to the parent
)


def worker_count(workers: int | None) -> int:
    """The number of worker processes: as given, or one for each core of this process.

    Raises:
        InputError: it is negative.
    """
    if workers is None:
        return cores()
    if workers < 0:
        raise InputError(f"`workers` must be >= 0; got {workers}. Leave it out to use all cores.")
    return workers


def require_images(source: Source) -> None:
    """Checks that a source has images.

    Raises:
        InputError: it has other samples.
    """
    if source.unit != "images":
        raise InputError(
            f"`src` must hold images; got {source.unit}, of {type(source).__name__}. Train from it as it "
            "is; `simclr data check` names what cannot be used."
        )


def splits_of(source: Source) -> dict[str, Images]:
    """The sets of an opened source by name; ``bank`` only where it is not the training set."""
    splits = {"train": source.train, "query": source.query}
    if source.bank is not source.train:
        splits["bank"] = source.bank
    return splits


def read(images: Images, i: int, max_pixels: int | None = None) -> tuple[bytes | None, Picture]:
    """The encoded bytes of the image at position ``i``, where it has a file, and the opened image.

    Args:
        images: the set.
        i: position in it.
        max_pixels: overrides the reader's own limit.

    Raises:
        UnreadableSample: it cannot be used.
    """
    data = images.encoded(i) if isinstance(images, StoredSamples) else None
    if data is not None and isinstance(reader := images.reader, EncodedReader):  # type: ignore[union-attr]
        return data, open_picture(data, reader.channels, max_pixels or reader.max_pixels)
    return data, images.open(i)


def sweep(
    images: Images,
    work: Callable[[Images, int], T],
    positions: Sequence[int] | np.ndarray | None = None,
    workers: int | None = None,
) -> Iterator[T]:
    """Applies ``work`` to samples, in their order.

    Args:
        images: the set.
        work: takes the set and a position; must be picklable and raise nothing but `InputError`.
        positions: which samples; by default all.
        workers: processes; by default one for each core, 0 for none.

    Returns:
        Iterator over the results, in the order of ``positions`` whatever ``workers`` is.

    Raises:
        InputError: what ``work`` raised.
    """
    positions = range(len(images)) if positions is None else positions
    count = min(worker_count(workers), -(-len(positions) // _TASK))
    tasks = [positions[at : at + _TASK] for at in range(0, len(positions), _TASK)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will create .* worker processes.*")  # it was asked for
        loader: DataLoader[Any] = DataLoader(
            _Work(images, work),
            batch_size=None,
            sampler=tasks,  # type: ignore[arg-type]
            num_workers=count,
            collate_fn=_as_it_is,
            worker_init_fn=settle,
            prefetch_factor=4 if count else None,
        )
        batches = iter(loader)
    try:
        for results in batches:
            for result in results:
                if isinstance(result, InputError):
                    raise result
                yield result
    finally:
        del batches  # else the traceback keeps it, and the collector ends workers only after 5 s


class _Work(Dataset[list[Any]]):
    def __init__(self, images: Images, work: Callable[[Images, int], Any]) -> None:
        self.images, self.work = images, work

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> list[Any]:
        return [self._result(int(i)) for i in positions]

    def _result(self, i: int) -> Any:
        try:
            return self.work(self.images, i)
        except InputError as error:  # DataLoader would hand it over as a page of traceback
            return error


def _as_it_is(value: Any) -> Any:
    return value


class Bar:
    """A progress bar on stderr, where that is a terminal.

    Args:
        text: what is being done.
        total: number of samples.
        unit: what is counted, if not images.
        hidden: show nothing, e.g. on all ranks but one.
    """

    def __init__(self, text: str, total: int, unit: str = "images", hidden: bool = False) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(unit),
            TimeRemainingColumn(),
            console=console,
            disable=hidden or not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(text, total=total)
        self._hidden = hidden or not console.is_terminal
        self._waiting, self._shown = 0, 0.0

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """Counts samples as done."""
        self._waiting += count
        if not self._hidden and (now := time.monotonic()) > self._shown + 0.05:  # it costs 10 us
            self._progress.advance(self._task, self._waiting)
            self._waiting, self._shown = 0, now

    def over(self, results: Iterable[T]) -> Iterator[T]:
        """The same results, each counted."""
        for result in results:
            yield result
            self.advance()


class _Speed(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(
            "" if speed is None else f"{speed:,.0f} {self.unit}/s", style="progress.data.speed"
        )
