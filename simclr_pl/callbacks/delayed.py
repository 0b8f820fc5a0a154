"""Numbers that are made on the device in every step, and read without waiting for it."""

import time
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LAG = {"cpu": 0}  # pushes until a number is read, by kind of device
_LAG_ELSEWHERE = 4  # a host that runs further ahead than this waits for its device
_PAUSE = 0.01  # seconds between two looks


class Read(NamedTuple):
    """What was pushed.

    Attributes:
        values: on the host.
        note: as given.
    """

    values: list[float]
    note: Any


class DelayedReader:
    """Hands out numbers a fixed count of pushes later, so that every rank reads them in the same step.

    On a CPU they can be read at once; elsewhere a copy to the host is queued behind the work that makes
    them, and four pushes later, when it is read, it has long arrived.

    Args:
        device: where the numbers are made.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = _LAG.get(device.type, _LAG_ELSEWHERE)
        self._pending: deque[tuple[Tensor | None, torch.cuda.Event | None, Any]] = deque()

    def push(self, values: Tensor | None, note: Any = None) -> None:
        """Adds numbers.

        Args:
            values: (n,) float32 on the device; None for none, which counts as a push, too.
            note: kept beside them.
        """
        event = None
        if values is not None and values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((values, event, note))

    def read(self, everything: bool = False) -> list[Read]:
        """What is due, oldest first, each once.

        Args:
            everything: also what was pushed last.
        """
        due = []
        while len(self._pending) > (0 if everything else self._lag):
            values, event, note = self._pending.popleft()
            if event is not None:
                event.synchronize()
            due.append(Read([] if values is None else values.tolist(), note))
        return due

    def arrives_within(self, seconds: float) -> bool:
        """Whether everything is on the host in that time: a device that hangs must not be waited for.

        Args:
            seconds: of waiting at most.
        """
        deadline = time.monotonic() + seconds
        while not all(event is None or event.query() for _, event, _ in self._pending):
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
        return True
