"""Whether the ranks of this machine can speak with each other: real processes, real collectives."""

import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from simclr_pl.doctor.children import Send, in_children
from simclr_pl.doctor.lines import Line, size

_NUMBERS = 2**22  # float32: 16 MiB, about the gradients of a small ResNet
_ROUNDS = 3


def check_ranks(count: int, nodes: int, device: str, seconds: float = 60.0) -> Line:
    """Runs an all-gather and an all-reduce on ``count`` processes.

    Args:
        count: ranks on this machine.
        nodes: machines of the run.
        device: "cuda" for NCCL, anything else for gloo.
        seconds: after that, they count as hanging.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    if count == 1 and nodes == 1:
        return Line("ok", "ranks", "1 rank: nothing to exchange")
    if backend == "nccl" and count > torch.cuda.device_count():
        return Line(
            "error",
            "ranks",
            f"{count} ranks on {torch.cuda.device_count()} GPU(s)",
            f"Set --trainer.devices {max(1, torch.cuda.device_count())}.",
        )
    with TemporaryDirectory() as folder:
        meeting = (Path(folder) / "store").as_uri()  # a file: no port to be taken by others
        outcomes = in_children(count, exchange, count, backend, meeting, seconds, seconds=seconds)
    here = f"{count} rank(s) on this machine, {backend}"
    failed = next((i for i, o in enumerate(outcomes) if o.ending), None)
    if failed is not None:
        return Line(
            "error",
            "ranks",
            f"{here}: rank {failed} {outcomes[failed].ending}",
            f"{'NCCL_DEBUG=INFO' if backend == 'nccl' else 'GLOO_SOCKET_IFNAME=lo'} may tell more "
            "or help; with --trainer.devices 1 no rank is needed.",
        )
    slowest = max(outcome.messages[-1] for outcome in outcomes)
    text = f"{here}: all-gather and all-reduce are right, {size(4 * _NUMBERS / slowest)}/s reduced"
    if nodes > 1:
        return Line(
            "warning",
            "ranks",
            f"{text}; the other {nodes - 1} of {nodes} machines are not asked",
            "Run a short job on all of them: simclr fit ... --trainer.max_steps 10.",
        )
    return Line("ok", "ranks", text)


def exchange(send: Send, rank: int, count: int, backend: str, meeting: str, seconds: float) -> None:
    """One rank of the check; sends the seconds of an all-reduce of `_NUMBERS` float32.

    Raises:
        RuntimeError: what arrives is wrong.
    """
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=meeting,
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=seconds),
    )
    gathered = torch.empty(count, device=device)
    dist.all_gather_into_tensor(gathered, torch.tensor([float(rank)], device=device))
    if gathered.tolist() != list(range(count)):
        raise RuntimeError(f"gathered {gathered.tolist()} in place of 0 to {count - 1}")
    took = []
    for _ in range(_ROUNDS):
        numbers = torch.full((_NUMBERS,), float(rank + 1), device=device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        low, high = numbers.min().item(), numbers.max().item()  # waits for the device
        took.append(time.perf_counter() - began)
        if not low == high == count * (count + 1) / 2:
            raise RuntimeError(f"the sum of 1 to {count} came out as {low} to {high}")
    send(min(took))
    dist.barrier()
    dist.destroy_process_group()
