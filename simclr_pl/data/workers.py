"""Worker processes of a DataLoader: how many there can be, and what they do first."""

import multiprocessing
import os
import signal
import warnings
from threading import Thread

import cv2

_SECONDS_TO_SAVE = 60  # for the step that is under way, and its checkpoint


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settle(_: int) -> None:
    """Prepares a worker: alone on its core, silent, and gone when its parent is.

    Args:
        _: the worker's number; not used.
    """
    cv2.setNumThreads(0)  # its pool of threads does not survive a fork
    # Pillow's warnings name no file; what cannot be read is reported.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # An interrupt from the keyboard reaches the workers, too: the parent ends them, else it waits 5 s.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So do a scheduler's signals, whose batches are needed until the parent has saved. The parent itself
    # says SIGTERM to a worker that does not answer: so it counts, but later.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_TO_SAVE))
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # PyTorch's workers notice that their parent was killed, but then wait for the pipe to it to
    # empty, and notice nothing if it was killed before they came to look.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
