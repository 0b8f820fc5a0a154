"""Where the time of training goes, measured without waiting for the device."""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.trainer.states import RunningStage

# What the clock tells apart, and the five shares that are shown.
_SHARES = {
    "data": ("start", "wait", "transfer"),
    "augment": ("augment",),
    "compute": ("compute",),
    "monitors": ("monitors", "evaluation"),
    "other": ("other",),
}
_PARTS = tuple(part for parts in _SHARES.values() for part in parts)

# By the end of an action's name; what is not here belongs to the action around it.
_ACTIONS = {
    ".train_dataloader_next": "wait",
    ".batch_to_device": "transfer",
    ".on_before_batch_transfer": "transfer",
    ".on_after_batch_transfer": "augment",
    "run_training_batch": "compute",
    ".lr_scheduler_step": "compute",
    "save_checkpoint": "other",
}
_MOST_PENDING = 512  # stamps; more than the steps that a device runs behind


class Reading(NamedTuple):
    """What the clock shows.

    Attributes:
        seconds: by part. "start" is the wait for an epoch's first batch, "wait" that for the others.
        batches: trained on, on this rank.
    """

    seconds: dict[str, float]
    batches: int

    def since(self, earlier: "Reading") -> "Reading":
        """What came after ``earlier``."""
        seconds = {part: s - earlier.seconds[part] for part, s in self.seconds.items()}
        return Reading(seconds, self.batches - earlier.batches)

    def after(self, earlier: "Reading") -> "Reading":
        """Both together."""
        seconds = {part: s + earlier.seconds[part] for part, s in self.seconds.items()}
        return Reading(seconds, self.batches + earlier.batches)

    @property
    def training(self) -> float:
        """Seconds without evaluation."""
        return sum(self.seconds.values()) - self.seconds["evaluation"]

    def shares(self) -> dict[str, float]:
        """``data``, ``augment``, ``compute``, ``monitors``, ``other``: in [0, 1], they add to 1."""
        whole = max(sum(self.seconds.values()), 1e-12)
        return {
            name: sum(self.seconds[part] for part in parts) / whole
            for name, parts in _SHARES.items()
        }


NOTHING = Reading(dict.fromkeys(_PARTS, 0.0), 0)


class StepClock(Profiler):
    """Adds up the time of training by what it went to, from the trainer's own profiling points.

    It runs from the start of the first epoch to the end of the last one. On a GPU the times are those
    of its queue: a stamp is put there where the host goes on to something else, so a part's time
    is that in which the device worked for it or stood idle because of it. Elsewhere they are the host's.

    Args:
        trainer: whose callbacks count as monitors, save progress bars and checkpoints.
        inner: a profiler that hears of everything, too.
        stamp: makes a stamp in the stead of the device's own.

    Attributes:
        inner: as given.
        started: whether training has begun.
    """

    def __init__(
        self, trainer: Trainer, inner: Profiler, stamp: Callable[[], Any] | None = None
    ) -> None:
        super().__init__()
        self.inner = inner
        self.started = False
        self._trainer = trainer
        self._stamp = stamp
        self._running = False
        self._first = True  # the next batch is an epoch's first
        self._known: dict[str, str | None] = {}
        self._stack: list[str | None] = []
        self._open: tuple[str, Any] = ("other", None)  # the present part, since when
        self._pending: deque[tuple[str, Any, Any, int]] = deque()  # part, begin, end, batches
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self._batches = 0

    @classmethod
    def of(cls, trainer: Trainer) -> "StepClock":
        """The trainer's clock: all who ask before training starts share one."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, cls):
            if not profiler.started:
                return profiler
            profiler = profiler.inner  # of a fit that was broken off
        clock = cls(trainer, profiler)
        trainer.profiler = clock  # type: ignore[attr-defined]
        return clock

    def leave(self) -> None:
        """Gives the trainer its own profiler back."""
        if self._trainer.profiler is self:  # type: ignore[attr-defined]
            self._trainer.profiler = self.inner  # type: ignore[attr-defined]

    def start(self, action_name: str) -> None:
        """An action begins."""
        self.inner.start(action_name)
        if action_name == "run_training_epoch":
            self._begin_epoch()
        elif self._running and action_name.endswith(".on_train_end"):
            self._mark("other")
            self._open[1].synchronize()  # once, so that the last steps count
            self._running = False
        if not self._running:
            return
        part = self._part_of(action_name)
        if part == "wait" and self._first:
            part, self._first = "start", False
        if part is None and self._stack:
            part = self._stack[-1]
        self._stack.append(part)
        self._enter(part)

    def stop(self, action_name: str) -> None:
        """An action is done."""
        if self._running and self._stack:
            self._stack.pop()
            if action_name == "run_training_batch":
                self._mark(self._open[0], batches=1)
            self._enter(self._stack[-1] if self._stack else None)
        self.inner.stop(action_name)

    def summary(self) -> str:
        """That of the user's profiler."""
        return self.inner.summary()

    def _begin_epoch(self) -> None:
        if not self.started:
            device = self._trainer.strategy.root_device
            on_device = (lambda: _event(device)) if device.type == "cuda" else _HostStamp
            self._stamp = self._stamp or on_device
            self._open = ("other", self._stamp())
            self.started = self._running = True
        self._first = True

    def _part_of(self, action_name: str) -> str | None:
        if action_name not in self._known:
            self._known[action_name] = self._look_up(action_name)
        part = self._known[action_name]
        is_callback = action_name.startswith("[Callback]")
        return part if is_callback or not self._evaluating else None

    def _look_up(self, action_name: str) -> str | None:
        if action_name.startswith("[Callback]"):
            key, _, hook = action_name.removeprefix("[Callback]").rpartition(".")
            for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
                if callback.state_key == key:
                    if getattr(type(callback), hook) is getattr(Callback, hook):
                        return None  # it has no such hook
                    return (
                        "other" if isinstance(callback, (Checkpoint, ProgressBar)) else "monitors"
                    )
        return next((part for end, part in _ACTIONS.items() if action_name.endswith(end)), None)

    @property
    def _evaluating(self) -> bool:
        return self._trainer.state.stage is RunningStage.VALIDATING

    def _enter(self, part: str | None) -> None:
        part = part or ("evaluation" if self._evaluating else "other")
        if part != self._open[0]:
            self._mark(part)

    def _mark(self, part: str, batches: int = 0) -> None:
        assert self._stamp is not None
        now = self._stamp()
        self._pending.append((*self._open, now, batches))
        self._open = (part, now)
        if len(self._pending) > _MOST_PENDING:
            self._settle()

    def _settle(self) -> None:
        while self._pending and self._pending[0][2].query():
            part, begin, end, batches = self._pending.popleft()
            self._seconds[part] += begin.elapsed_time(end) / 1000
            self._batches += batches

    def read(self) -> Reading:
        """The time so far; on a GPU of the work that is done, without waiting for more."""
        if self._running:
            self._mark(self._open[0])
        self._settle()
        return Reading(dict(self._seconds), self._batches)


class _HostStamp:
    """A point of the host's time, with the methods of a CUDA event."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, end: "_HostStamp") -> float:
        return (end.seconds - self.seconds) * 1000  # milliseconds, as an event's


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def peak_memory_mib(device: torch.device) -> float:
    """The most memory in use so far, MiB.

    Args:
        device: a GPU, and the tensors on it count; for any other device this process's resident memory
            does, without its loader workers.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
