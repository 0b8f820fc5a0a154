"""What can be said without a config: versions, devices, precisions, memory."""

import shutil
import time
from typing import Any

import torch

from simclr_pl.data.resident import free_memory
from simclr_pl.doctor.lines import Line, size

_SIDE = 512  # of the matrices that are multiplied on the CPU; a GPU gets eight times that
_SHOWN = ("torch", "lightning", "torchvision", "timm", "numpy")
_SHM = "/dev/shm"
_SLOW = 0.9  # of float32's speed


def versions(found: dict[str, Any]) -> Line:
    """What is installed.

    Args:
        found: from `simclr_pl.environment.environment`.
    """
    packages = found["packages"]
    parts = [f"Python {found['python']}", f"simclr_pl {packages['simclr_pl']}"]
    parts += [f"{name} {packages[name]}" for name in _SHOWN if name in packages]
    return Line("ok", "versions", ", ".join(parts))


def devices(found: dict[str, Any]) -> Line:
    """The processor and the accelerators."""
    cpu, *others = found["devices"]
    text = f"{found['cpus']} cores of {cpu['name']}"
    for device in others:
        about = f"{device['memory_gib']:g} GiB"
        if "capability" in device:
            about += f", compute capability {device['capability']}, CUDA {device['cuda']}"
        text += f"; {device['name']} ({about})"
    if others:
        return Line("ok", "devices", text)
    if torch.version.cuda is not None and shutil.which("nvidia-smi"):
        return Line(
            "warning",
            "devices",
            f"{text}; a driver for NVIDIA GPUs is there, but torch sees no GPU",
            f"Run nvidia-smi: the driver must be new enough for CUDA {torch.version.cuda}, and "
            "CUDA_VISIBLE_DEVICES must not be empty.",
        )
    return Line("ok", "devices", f"{text}; no GPU")


def memory() -> list[Line]:
    """Free memory, and memory that processes share."""
    lines = [Line("ok", "memory", f"{size(free_memory())} available")]
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError:
        return lines
    return [*lines, Line("ok", "shared memory", f"{size(free)} free in {_SHM}")]


def shared_memory(needed: int, workers: int) -> Line:
    """Whether the loaders' batches fit into the memory that processes share.

    Args:
        needed: bytes.
        workers: loader processes of each rank.
    """
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError:
        return Line("ok", "shared memory", f"the loaders need {size(needed)}")
    text = f"the loaders need {size(needed)} of {size(free)} in {_SHM}"
    if needed <= free:
        return Line("ok", "shared memory", text)
    fewer = max(1, int(workers * free / needed))
    return Line(
        "error",
        "shared memory",
        text,
        f"Give the container more (docker run --shm-size), or set --data.num_workers {fewer}.",
    )


def precisions(device: torch.device) -> dict[str, float]:
    """Speed of matrix products on a device, relative to float32's.

    Returns:
        By the names "bf16" and "fp16"; on CUDA also "TF32".
    """
    base = _seconds(device, torch.float32)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    speeds = {name: base / _seconds(device, kind) for name, kind in kinds.items()}
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        speeds["TF32"] = base / _seconds(device, torch.float32)
        torch.set_float32_matmul_precision(before)
    return speeds


def _seconds(device: torch.device, kind: torch.dtype) -> float:
    side = _SIDE * (8 if device.type == "cuda" else 1)
    matrix = torch.ones(side, side, device=device, dtype=kind)
    took = []
    for _ in range(10):  # the first warms up
        began = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
        if took[-1] > 0.1:
            break
    return min(took)


def precision(speeds: dict[str, float], asked: str | None = None) -> Line:
    """What the precisions gain here.

    Args:
        speeds: from `precisions`.
        asked: `trainer.precision`, where there is a config.
    """
    shown = [f"{n} {s:.2g} x{' (slow here)' if s < _SLOW else ''}" for n, s in speeds.items()]
    text = f"matrix products against float32: {', '.join(shown)}"
    if asked is None:
        return Line("ok", "precision", text)
    text = f"{asked}; {text}"
    name = "bf16" if asked.startswith("bf16") else "fp16" if asked.startswith("16") else ""
    if name and speeds[name] < _SLOW:
        better = "bf16-mixed" if speeds["bf16"] > 1 else "32-true"
        return Line("warning", "precision", text, f"Set --trainer.precision {better}.")
    return Line("ok", "precision", text)
