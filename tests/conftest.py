"""Fixtures of all tests."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# One thread: the ranks and workers of the tests share few cores, and sums keep one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_SILENT", "true")
# A shell that starts the tests in the background ignores it, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # what a run writes by default goes there
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["simclr"])  # LightningCLI warns of pytest's own arguments


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Runs a function in a process whose Triton interprets; it is read when triton is imported."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result()  # starts the process
        yield lambda function, *args: pool.submit(function, *args).result(timeout=120)
