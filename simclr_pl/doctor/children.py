"""Measurements in processes of their own, which may run out of memory, crash or hang."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from simclr_pl.errors import InputError

# The server imports the heavy packages once, and starts no thread; each child is a fork of it.
_context = multiprocessing.get_context("forkserver")
_PRELOADED = ["simclr_pl.training_cli"]

Send = Callable[[Any], None]


class Outcome(NamedTuple):
    """What came of one child.

    Attributes:
        messages: what it sent, in order.
        ending: what ended it before its time; empty where it finished.
    """

    messages: list[Any]
    ending: str


def in_children(
    count: int, function: Callable[..., None], *args: Any, seconds: float
) -> list[Outcome]:
    """Calls ``function(send, rank, *args)`` in ``count`` processes at once.

    Args:
        count: of processes; ``rank`` counts them from 0.
        function: importable by name; ``send`` takes plain values.
        args: plain values.
        seconds: after that, they are killed.
    """
    _context.set_forkserver_preload(_PRELOADED)
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = _context.Pipe(duplex=False)
        given = (theirs, os.getcwd(), function, rank, args)
        process = _context.Process(target=_main, args=given, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        messages, raised = _collect(pipes, time.monotonic() + seconds)
        endings = []
        for pipe, process, error in zip(pipes, processes, raised, strict=True):
            if pipe.closed:  # it said all it had to say, or died
                process.join(5)
            endings.append(error or _ending(process.exitcode, seconds))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [Outcome(*pair) for pair in zip(messages, endings, strict=True)]


def _collect(pipes: list[Connection], deadline: float) -> tuple[list[list[Any]], list[str]]:
    messages: list[list[Any]] = [[] for _ in pipes]
    raised = ["" for _ in pipes]
    while not all(pipe.closed for pipe in pipes):
        ready = wait([p for p in pipes if not p.closed], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                pipe.close()
                continue
            if kind == "error":
                raised[rank] = value
            else:
                messages[rank].append(value)
    return messages, raised


def _ending(code: int | None, seconds: float) -> str:
    if code == 0:
        return ""
    if code is None:
        return f"took longer than {seconds:.0f} s"
    if code == -signal.SIGKILL:
        return "was killed, most likely by the system for want of memory"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _main(pipe: Connection, folder: str, function: Any, rank: int, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills
    with suppress(OSError):  # the first to go when memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.chdir(folder)
    try:
        function(lambda value: pipe.send(("value", value)), rank, *args)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = lines[0] if lines else "no reason given"
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        pipe.send(("error", kind + text))
