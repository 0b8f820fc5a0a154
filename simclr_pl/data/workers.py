"""Worker processes of a DataLoader: how many there can be, and what they do first."""

import multiprocessing
import os
import signal
import warnings
from threading import Thread

import cv2


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
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # PyTorch's workers notice that their parent was killed, but then wait for the pipe to it to
    # empty, and notice nothing if it was killed before they came to look.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
