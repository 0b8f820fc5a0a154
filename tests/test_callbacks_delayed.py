"""Numbers are handed out in order, each once, a fixed count of pushes later."""

from typing import Any

import pytest
import torch

from simclr_pl.callbacks import delayed
from simclr_pl.callbacks.delayed import DelayedReader


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_a_number_is_read_so_many_pushes_later(lag: int, monkeypatch: Any) -> None:
    monkeypatch.setitem(delayed._LAG, "cpu", lag)
    reader, found = DelayedReader(torch.device("cpu")), []
    for step in range(9):
        reader.push(torch.tensor([float(step)]) if step % 3 else None, note=step)
        found.append([(read.values, read.note) for read in reader.read()])
    expected = [([float(step)] if step % 3 else [], step) for step in range(9)]
    assert found == [[]] * lag + [[pair] for pair in expected[: 9 - lag]]
    assert [(r.values, r.note) for r in reader.read(everything=True)] == expected[9 - lag :]
    assert reader.read(everything=True) == []


class Event:
    """Of a device that answers at the n-th question."""

    def __init__(self, answers_at: float) -> None:
        self.left = answers_at

    def query(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize(("answers_at", "arrives"), [(1, True), (3, True), (float("inf"), False)])
def test_a_device_that_hangs_is_given_up(
    answers_at: float, arrives: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(delayed, "_PAUSE", 0.0)
    reader: Any = DelayedReader(torch.device("cpu"))
    reader.push(torch.ones(1))
    reader._pending.append((torch.ones(1), Event(answers_at), None))
    assert reader.arrives_within(0.05) is arrives
