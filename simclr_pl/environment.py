"""What a run ran on: versions, devices, the machine, the state of git."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from simclr_pl.secrets import masked_arguments

_PACKAGES = (
    "simclr_pl",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "timm",
    "numpy",
    "numba",
    "opencv-python-headless",
    "simplejpeg",
    "pyarrow",
    "jsonargparse",
    "wandb",
    "tensorboard",
)
_CGROUP = Path("/sys/fs/cgroup")  # version 2; version 1 has the limit in a folder `memory`


def environment() -> dict[str, Any]:
    """What is needed to know where a result came from, as plain values.

    Returns:
        ``python``, ``platform``; ``command``, the arguments of this process with secret values masked;
        ``packages``, name to version, of those that are installed; ``devices``, each with ``name`` and
        ``kind``, on accelerators also ``memory_gib``; ``cpus``, cores that this process may use;
        ``memory_gib``, memory that it may use; ``git``, ``commit``, ``branch`` (None when detached)
        and ``dirty`` of the working folder's repository, None where there is none.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": " ".join(masked_arguments(sys.argv)),
        "packages": _packages(),
        "devices": devices(),
        "cpus": _cpus(),
        "memory_gib": round(_memory() / 2**30, 1),
        "git": _git(),
    }


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an extra
            continue
    return {**found, "torch": torch.__version__}  # with the build, e.g. +cu130


def devices() -> list[dict[str, Any]]:
    """The processor, and the accelerators that torch can use."""
    found: list[dict[str, Any]] = [{"name": _processor(), "kind": "cpu"}]
    for i in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": seen.name,
                "kind": "cuda",
                "memory_gib": round(seen.total_memory / 2**30, 1),
                "capability": f"{seen.major}.{seen.minor}",
                "cuda": torch.version.cuda,
            }
        )
    if torch.backends.mps.is_available():
        found.append(
            {"name": "Apple GPU", "kind": "mps", "memory_gib": round(_memory() / 2**30, 1)}
        )
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((n for n in names if n), platform.processor() or platform.machine())


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _memory() -> int:
    """Bytes of memory: the machine's, or what a container leaves of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            total = min(total, int((_CGROUP / name).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return total


def _git() -> dict[str, Any] | None:
    commit = _ask_git("rev-parse", "HEAD")
    if not commit:
        return None
    status = _ask_git("status", "--porcelain", "--untracked-files=no")
    branch = _ask_git("symbolic-ref", "--short", "-q", "HEAD")
    return {
        "commit": commit,
        "branch": branch or None,
        "dirty": None if status is None else bool(status),
    }


def _ask_git(*arguments: str) -> str | None:
    """The answer of git; None where it has none, or is not there."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # only look
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
