"""Runs a function on several real ranks of this machine: of one gloo group, or yet to form it."""

import io
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# The fork server imports and loads once what takes long; each rank is then a fork of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "lightning.pytorch.cli",
        "matplotlib.backends.backend_agg",
        "pytest",
        "simclr_pl.callbacks",
        "simclr_pl.image_kernels",
        "simclr_pl.neighbour_kernels",
        "simclr_pl.report.page",
        "simclr_pl.training_cli",
        "timm",
        "torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook",
        "torch.distributed.checkpoint",
        "torchmetrics.classification",
        "fork_server",  # of this folder
    ]
)


def on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120
) -> Any:
    """Calls ``function(*args)`` on each rank of a new gloo group.

    Returns:
        The results, in rank order.

    Raises:
        AssertionError: a rank raised (with its traceback) or did not finish within ``timeout`` seconds.
    """
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_main,
            args=(rank, world_size, port, os.getcwd(), theirs, function, args),
            daemon=True,
        )
        _start(process)
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def processes_of(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: int = 120
) -> list[Any]:
    """Starts ``function(*args)`` in processes whose environment makes them ranks, for what may end them.

    Returns:
        The processes, in rank order, as `multiprocessing` has them: ``pid``, ``join``, ``exitcode``,
        which is negative where a signal was the end. SIGALRM ends those that run for ``timeout``
        seconds; one that is stopped must be killed by the caller.
    """
    port, processes = _free_port(), []
    for rank in range(world_size):
        given = (rank, world_size, port, os.getcwd(), timeout, function, args)
        processes.append(_context.Process(target=_run, args=given))  # may have loader workers
        _start(processes[-1])
    return processes


def _start(process: BaseProcess) -> None:
    with pytest.MonkeyPatch.context() as environment:  # the server, if it is yet to start
        environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        process.start()


def _run(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    timeout: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    signal.alarm(timeout)
    _become_rank(rank, world_size, port, folder)
    function(*args)


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [p for i, p in enumerate(pipes) if i not in results]
        ready = wait(waiting, timeout)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} hang"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                error, payload = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert error is None, f"rank {rank} raised:\n{error}"
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _main(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    pipe: Connection,
    function: Any,
    args: tuple[Any, ...],
) -> None:
    _become_rank(rank, world_size, port, folder)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        payload = io.BytesIO()
        torch.save(function(*args), payload)
        pipe.send((None, payload.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def _become_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
    )
    os.chdir(folder)
    torch.set_num_threads(1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
