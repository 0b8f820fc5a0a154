"""What the Triton kernels share: whether they can serve."""

import functools
import warnings

import torch

_OLDEST = (7, 5)  # compute capability that Triton compiles for


def triton_serves(device: torch.device) -> bool:
    """Whether a device is a GPU that Triton knows, and Triton has what it needs; warns once if not."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _OLDEST:
        return False
    return _can_start()


@functools.cache
def _can_start() -> bool:
    try:
        import triton  # comes with torch for some systems only
    except ImportError:
        return False
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of many types: no compiler, no Python.h, no driver
        warnings.warn(
            f"Triton cannot start, so loss and views take their slower paths ({error}). Triton needs a "
            "C compiler and the headers of Python: install gcc and python3-dev.",
            stacklevel=3,
        )
        return False
    return True
