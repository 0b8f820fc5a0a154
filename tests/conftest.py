"""Fixtures of all tests."""

import os
import signal
import sys
from pathlib import Path

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
