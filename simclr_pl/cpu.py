"""What the kernels for the CPU share: compiling, threads, and memory of each thread.

Threads of Python's, not numba's or OpenMP's: those do not survive a fork, and loaders fork.
"""

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit


def compiled(**options: Any) -> Callable[..., Any]:
    """Decorates a loop to be compiled at its first call, or loaded if an earlier run did so.

    Args:
        options: of `numba.njit`.
    """
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False, **options}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # neither the package's folder nor the user's can be written
            return njit(**options)(function)  # type: ignore[no-any-return]

    return decorate


def in_threads(work: Callable[[int, int], None], count: int) -> None:
    """Calls ``work(first, last)`` for parts of 0..count-1 on as many threads as torch uses.

    Args:
        work: must release Python's lock to gain.
        count: how many pieces of work there are.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        work(0, count)
        return
    bounds = np.linspace(0, count, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


_LARGEST_KEPT = 2**26  # bytes: an image of 22 megapixels
_held = threading.local()


def scratch(shape: tuple[int, ...], purpose: str) -> np.ndarray:
    """A uint8 array that this thread uses again and again, since new pages of memory cost time.

    Args:
        shape: of the array.
        purpose: another call with the same one, in the same thread, gives the same memory.
    """
    size = math.prod(shape)
    if size > _LARGEST_KEPT:
        return np.empty(shape, np.uint8)
    memory = getattr(_held, purpose, None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
        setattr(_held, purpose, memory)
    return memory[:size].reshape(shape)  # type: ignore[no-any-return]


_returned: deque[np.ndarray] = deque(maxlen=3)


def _take(size: int) -> np.ndarray:
    # Taken out one by one, not looked through: the collector may return an array at any moment, and
    # a deque must not change under an iteration.
    for _ in range(len(_returned)):
        memory = _returned.popleft()
        if memory.nbytes == size:
            return memory
        _returned.append(memory)
    return np.empty(size, np.uint8)


def recycled(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """An uninitialised array, in the memory of one that nobody sees any more, if it has the same size.

    The system clears each page of new memory when it is first written, which takes as long as computing
    what is written there.

    Args:
        shape: of the array.
        dtype: of its elements.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = _take(size)
    array = memory.view(dtype).reshape(shape)
    weakref.finalize(array, _returned.append, memory).atexit = False
    # By way of a tensor: what is made from this array holds it, while a view of a numpy array of one's
    # own would hold the memory past it.
    return torch.from_numpy(array).numpy()  # type: ignore[no-any-return]
