"""Whether Triton's kernels can serve."""

import subprocess
import sys

import pytest
import torch

from simclr_pl import gpu


def test_a_cpu_is_not_served() -> None:
    assert not gpu.triton_serves(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_triton_that_finds_no_driver_is_warned_of_and_does_not_serve() -> None:
    gpu._can_start.cache_clear()
    with pytest.warns(
        UserWarning, match="Triton cannot start, so loss and views take their slower"
    ):
        assert not gpu._can_start()
    assert not gpu._can_start()  # and says so once: a warning is an error here


def test_no_triton_is_no_error() -> None:
    code = "import sys; sys.modules['triton'] = None; from simclr_pl import gpu; "
    code += "sys.exit(gpu._can_start())"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0
