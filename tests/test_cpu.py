"""What the kernels for the CPU share: threads, memory that is used again, compiling anywhere."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_pl import cpu
from simclr_pl.cpu import in_threads, recycled, scratch


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_every_piece_is_done_once_whatever_the_threads(threads: int, count: int) -> None:
    torch.set_num_threads(threads)
    done = np.zeros(count, int)

    def work(first: int, last: int) -> None:
        done[first:last] += 1

    in_threads(work, count)
    assert (done == 1).all()


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    torch.set_num_threads(3)

    def work(first: int, last: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_threads(work, 9)


def test_scratch_is_the_same_memory_again_for_one_purpose_and_thread() -> None:
    first = scratch((20, 30), "a")
    assert scratch((10, 6), "a").ctypes.data == first.ctypes.data
    assert scratch((10, 6), "b").ctypes.data != first.ctypes.data
    assert scratch((40, 30), "a").shape == (40, 30)
    elsewhere: list[int] = []
    thread = threading.Thread(target=lambda: elsewhere.append(scratch((5,), "a").ctypes.data))
    thread.start()
    thread.join()
    assert elsewhere != [scratch((5,), "a").ctypes.data]


def test_scratch_keeps_no_huge_memory() -> None:
    shape = (cpu._LARGEST_KEPT + 1,)
    first = scratch(shape, "huge")
    assert scratch(shape, "huge").ctypes.data != first.ctypes.data


@pytest.fixture
def _none_returned() -> None:
    gc.collect()
    cpu._returned.clear()


@pytest.mark.usefixtures("_none_returned")
def test_memory_is_recycled_once_no_tensor_or_array_shows_it() -> None:
    array = recycled((50, 7), np.float32)
    address = array.ctypes.data
    tensor = torch.from_numpy(array)
    view, part = tensor.view(7, 50)[2], array[3:5]
    del array, tensor
    gc.collect()
    view[:] = 3.0
    other = recycled((50, 7), np.float32)
    other[:] = 4.0
    assert other.ctypes.data != address
    assert (view == 3.0).all()
    del view
    gc.collect()
    assert not cpu._returned  # a part of the array still shows it
    del part
    gc.collect()
    assert recycled((7, 50), np.float32).ctypes.data == address
    assert recycled((50, 7), np.uint8).nbytes == 350


@pytest.mark.usefixtures("_none_returned")
def test_memory_of_the_right_size_is_found_behind_others_which_stay() -> None:
    arrays = [recycled((n,), np.uint8) for n in (10, 20, 30)]
    addresses = [array.ctypes.data for array in arrays]
    while arrays:
        arrays.pop(0)
        gc.collect()
    assert recycled((20,), np.uint8).ctypes.data == addresses[1]
    gc.collect()
    assert sorted(memory.nbytes for memory in cpu._returned) == [10, 20, 30]


@pytest.mark.usefixtures("_none_returned")
def test_no_more_than_three_arrays_wait_to_be_recycled() -> None:
    arrays = [recycled((n,), np.uint8) for n in range(100, 110)]
    arrays.clear()
    gc.collect()
    assert len(cpu._returned) == 3


def test_kernels_work_where_no_cache_can_be_written(tmp_path: Path) -> None:
    # A package in a folder without a cache, and a home that is a file: numba finds no place.
    package = tmp_path / "package"
    package.mkdir()
    source = Path(cpu.__file__).read_text()
    (package / "cpu_copy.py").write_text(
        source + "\n\n@compiled()\ndef double(x):\n    return 2 * x\n\n\nprint(double(21))\n"
    )
    (package / "__pycache__").write_text("a file")
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    environment = {**os.environ, "HOME": str(nowhere), "XDG_CACHE_HOME": str(nowhere)}
    environment.pop("NUMBA_CACHE_DIR", None)
    code = "import sys; sys.dont_write_bytecode = True; import cpu_copy"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=package, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "42\n"
