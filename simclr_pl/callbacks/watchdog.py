"""Ends a rank that hangs, and all ranks when one of them has died."""

import faulthandler
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from threading import Thread
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from simclr_pl.callbacks.peers import LOST, Peers
from simclr_pl.callbacks.preemption import Preempted
from simclr_pl.distributed import is_distributed
from simclr_pl.errors import InputError

_STDERR = 2
_MARGIN = 5.0  # seconds that the thread is given before what needs no Python acts
_PATIENCE = 1.0  # seconds in which a rank ends by itself when another rank's error is its own, too


class Watchdog(Callback):
    """Ends a run that hangs, or that has lost a rank, with exit code 75, to be started again.

    When no step ends within the time given, each rank writes the stacks of all its threads, with the
    step's number, to `stacks_rank_<r>.txt` in the run's folder, and ends. A batch of an evaluation and a
    checkpoint count as a step; before the training and after it there is no limit. A rank that is killed
    ends the others at once, whatever they wait for, and an error on one rank ends them with its own exit
    code. A job that is started again, by `torchrun --max-restarts` or the scheduler, goes on by
    `--resume auto`.

    A process that is stuck in code that never lets go of Python's lock writes its stacks, too, 5 s
    later, with the number of a step that may be a tenth of the time old, but then ends with exit code 1:
    Python's `faulthandler` knows no other.

    Args:
        timeout: seconds without a step.
        first_timeout: seconds until the first step is done: compilation and loader workers included.

    Raises:
        InputError: a time that is not > 0.
    """

    def __init__(self, timeout: float = 1800.0, first_timeout: float = 3600.0) -> None:
        for name, value in (("timeout", timeout), ("first_timeout", first_timeout)):
            if not value > 0:
                raise InputError(f"`{name}` must be > 0; got {value}. Set `watchdog.{name}`.")
        self.timeout, self.first_timeout = timeout, first_timeout
        self._allowed: float | None = None  # seconds, at present
        self._thread: Thread | None = None
        self._peers: Peers | None = None

    # In the main thread.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins to watch for deaths."""
        if stage != "fit":
            return
        self._rank, self._allowed, self._stopped = trainer.global_rank, None, False
        self._progress(trainer)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # collective
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"stacks_rank_{self._rank}.txt"
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        if is_distributed():
            environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
            self._peers = Peers(environment.main_address)
        self._children = _adopt(trainer)
        self._wake, self._waker = Pipe(duplex=False)
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _progress(self, trainer: Trainer) -> None:
        self._step, self._since = trainer.global_step, time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to watch for hangs."""
        self._progress(trainer)
        self._allowed = self.first_timeout
        self._arm(self.first_timeout)  # the thread may look a while later

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the time."""
        self._allowed = self.timeout
        self._progress(trainer)

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: Trainer, *_: Any
    ) -> None:
        """Notes the time."""
        self._progress(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the time."""
        self._progress(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Notes the time."""
        self._progress(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the last scores their time; only deaths are watched from here on."""
        self._allowed = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tells the other ranks, unless another rank's death is behind it."""
        if self._thread is None:
            return
        if isinstance(exception, RuntimeError) and self._peers is not None:
            time.sleep(2 * _PATIENCE)  # a collective failed? Then the thread ends the process now
        if isinstance(exception, Preempted):  # on all ranks
            self._stop()
        else:
            text = (str(exception).splitlines() or [""])[0]
            reason = f"rank {self._rank} ends with {type(exception).__name__}: {text}"
            self._stop(2 if isinstance(exception, InputError) else 1, reason)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watches no more."""
        if self._thread is not None:
            self._stop()

    def _stop(self, code: int = 0, reason: str = "") -> None:
        assert self._thread is not None
        self._stopped = True
        self._waker.send_bytes(b"stop")
        self._thread.join()
        self._thread = None
        faulthandler.cancel_dump_traceback_later()
        if self._peers is not None:
            self._peers.leave(code, reason)
        self._wake.close()
        self._waker.close()
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    # In the thread.

    def _watch(self) -> None:
        pace = min(self.timeout, self.first_timeout) / 10
        while not self._stopped:
            seconds = pace
            if (allowed := self._allowed) is None:
                faulthandler.cancel_dump_traceback_later()
            else:
                left = self._since + allowed - time.monotonic()
                if left <= 0:
                    self._end(LOST, f"rank {self._rank} has done no step for {allowed:g} s")
                self._arm(left)
                seconds = min(pace, left)
            if self._peers is None:
                self._wake.poll(seconds)
            else:
                end = self._peers.wait(self._wake, seconds)
                if end is not None and (end[0] == LOST or not self._wake.poll(_PATIENCE)):
                    self._end(*end)

    def _arm(self, left: float) -> None:
        """Has the process end by itself should the thread never wake again."""
        self._head("stuck in code that holds Python's lock")
        later = left + min(_MARGIN, self.timeout)
        faulthandler.dump_traceback_later(later, file=self._file, exit=True)

    def _say(self, reason: str, file: int) -> None:
        os.write(file, f"rank {self._rank}, {self._step} steps done: {reason}\n".encode())

    def _head(self, reason: str) -> None:
        """Begins the file; the stacks follow."""
        with suppress(OSError):  # a full disk is no reason to go on
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            self._say(reason, self._file)

    def _end(self, code: int, reason: str) -> None:
        if self._peers is not None:
            self._peers.leave(code, reason)
        self._say(f"{reason}; ending with {code}", _STDERR)
        self._head(reason)
        faulthandler.dump_traceback(self._file)
        self._end_children()
        os._exit(code)

    def _end_children(self) -> None:
        """Gives Lightning's processes, which end by themselves, their time, and kills a stopped one."""
        faulthandler.cancel_dump_traceback_later()  # of this process, which ends later than they do
        deadline = time.monotonic() + min(_MARGIN, self.timeout) + _PATIENCE
        for child in self._children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutExpired:
                child.kill()


def _adopt(trainer: Trainer) -> list[Popen[Any]]:
    """Takes over the processes that Lightning started.

    Its own observer kills this process with signal 9 as soon as it sees one of them end, within 5 s.
    """
    started: list[Popen[Any]] = getattr(trainer.strategy.launcher, "procs", [])
    children = list(started)
    started.clear()
    return children
