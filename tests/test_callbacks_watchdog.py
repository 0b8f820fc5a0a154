"""A run that hangs or loses a rank ends, and nothing else does; by itself it goes on."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from ranks import on_ranks, processes_of
from tiny import tiny_data, tiny_model, tiny_trainer

from simclr_pl.callbacks import ExactCheckpoint, Watchdog
from simclr_pl.callbacks.peers import Peers
from simclr_pl.errors import InputError

LOST = 75
DOZE = 2.0  # seconds


class Event(Callback):
    """Does something in one hook, at one rank, at the third time."""

    def __init__(self, hook: str, rank: int, act: Callable[[], None], time: int = 3) -> None:
        self.left = time

        def at(trainer: Any, *_: Any) -> None:
            self.left -= 1
            if self.left == 0 and trainer.global_rank == rank:
                act()

        setattr(self, hook, at)


def nap() -> None:
    time.sleep(60)


def nap_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(60)


def doze() -> None:
    time.sleep(DOZE)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def make_a_mistake() -> None:
    raise InputError("`it` must be right; got wrong. Set it right.")


def fail() -> None:
    raise ArithmeticError("of its own")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fit(folder: Path, watchdog: Watchdog, events: list[Event]) -> None:
    """Two epochs of four batches, on as many ranks as the environment says."""
    log = os.open(folder / f"log_{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = tiny_trainer(
        [*events, watchdog, ExactCheckpoint(every_n_train_steps=1)],
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        logger=CSVLogger(folder, name="", version=""),
    )
    try:
        trainer.fit(tiny_model(), datamodule=tiny_data(bank_size=30))
    except InputError as error:  # as the command line has it
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def started(folder: Path, *args: Any, ranks: int = 2, **options: Any) -> Iterator[list[Any]]:
    processes = processes_of(ranks, start, folder, args, options, timeout=60)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def start(folder: Path, args: Any, options: Any) -> None:
    events = [Event(hook, rank, act, *times) for hook, rank, act, *times in options.pop("events")]
    fit(folder, Watchdog(**options), events)


def codes(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(50)
    return [process.exitcode for process in processes]


def logs(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("log_*.txt"))]


STEP, BATCH = "on_train_batch_start", "on_train_batch_end"


@pytest.mark.parametrize("dead", [0, 1])
def test_a_death_ends_a_rank_within_seconds_even_one_that_waits_for_nothing(
    dead: int, tmp_path: Path
) -> None:
    # The survivor sleeps: gloo, which would notice by itself, is not asked.
    events = [(BATCH, dead, die), (BATCH, 1 - dead, nap)]
    with started(tmp_path, events=events) as processes:
        processes[dead].join(50)
        begin = time.monotonic()
        found = codes(processes)
        assert time.monotonic() - begin < 5
    assert found[dead] == -signal.SIGKILL
    assert found[1 - dead] == LOST
    assert f"rank {dead} has died; ending with 75" in logs(tmp_path)[1 - dead]
    assert "in nap" in (tmp_path / f"stacks_rank_{1 - dead}.txt").read_text()


def test_a_death_behind_a_failed_collective_is_a_death(tmp_path: Path) -> None:
    with started(tmp_path, events=[(BATCH, 1, die)]) as processes:
        assert codes(processes) == [LOST, -signal.SIGKILL]


def test_a_hang_leaves_the_stacks_and_the_steps_number(tmp_path: Path) -> None:
    with started(tmp_path, ranks=1, events=[(BATCH, 0, nap)], timeout=2) as processes:
        assert codes(processes) == [LOST]
    stacks = (tmp_path / "stacks_rank_0.txt").read_text()
    assert stacks.startswith("rank 0, 2 steps done: rank 0 has done no step for 2 s\n")
    assert "in nap" in stacks


def test_code_that_holds_the_lock_leaves_them_too(tmp_path: Path) -> None:
    events = [(BATCH, 0, doze, 2), (BATCH, 0, nap_with_the_lock)]  # the thread has looked by then
    with started(tmp_path, ranks=1, events=events, timeout=DOZE + 2) as ranks:
        assert codes(ranks) == [1]
    stacks = (tmp_path / "stacks_rank_0.txt").read_text()
    assert re.match(r"rank 0, [012] steps done: stuck in code that holds Python's lock\n", stacks)
    assert "in nap_with_the_lock" in stacks


def test_the_first_step_has_its_own_time(tmp_path: Path) -> None:
    slow = [(STEP, 0, nap, 1)]
    with started(tmp_path, ranks=1, events=slow, timeout=50, first_timeout=1) as processes:
        assert codes(processes) == [LOST]
    assert "0 steps done" in (tmp_path / "stacks_rank_0.txt").read_text()


def test_a_frozen_rank_ends_the_other_which_shows_where_it_waits(tmp_path: Path) -> None:
    with started(tmp_path, events=[(BATCH, 1, freeze)], timeout=2) as processes:
        assert codes(processes[:1]) == [LOST]
    assert "File " in (tmp_path / "stacks_rank_0.txt").read_text()


@pytest.mark.parametrize(
    ("rank", "act", "code", "told"),
    [
        (0, make_a_mistake, 2, "InputError: `it` must be right"),
        (1, fail, 1, "ArithmeticError: of its own"),
    ],
)
def test_an_error_on_one_rank_is_no_death_and_its_code_that_of_all(
    rank: int, act: Callable[[], None], code: int, told: str, tmp_path: Path
) -> None:
    with started(tmp_path, events=[(BATCH, rank, act)]) as processes:
        assert codes(processes) == [code, code]
    ours, others = logs(tmp_path)[rank], logs(tmp_path)[1 - rank]
    assert "ending with" not in ours
    assert f"rank {rank} ends with {told}" in others
    assert "Traceback" not in others


def test_an_error_on_all_ranks_is_everyones_own(tmp_path: Path) -> None:
    events = [(BATCH, 0, make_a_mistake), (BATCH, 1, make_a_mistake)]
    with started(tmp_path, events=events) as processes:
        assert codes(processes) == [2, 2]
    for log in logs(tmp_path):
        assert "error: `it` must be right; got wrong. Set it right." in log
        assert "ends with" not in log
    assert list(tmp_path.glob("stacks*")) == []


def test_an_interrupt_of_one_rank_ends_both_and_is_no_death(tmp_path: Path) -> None:
    with started(tmp_path, events=[(BATCH, 1, interrupt)]) as processes:
        assert codes(processes) == [1, 1]


def test_what_takes_long_beside_the_steps_is_no_hang(tmp_path: Path) -> None:
    runs = []
    for i, moments in enumerate(
        [
            [("on_fit_start", 1)],  # the encoder at initialisation is scored
            [("on_fit_end", 1)],  # the trained one
            [("on_validation_batch_start", 1), ("on_validation_batch_start", 2)],
            [("on_validation_epoch_end", 1), (STEP, 5)],
            [("on_save_checkpoint", 1), (STEP, 2)],
        ]
    ):
        limit = DOZE / 2 if len(moments) == 1 else DOZE * 1.6  # two are longer than that
        options = {"timeout": limit, "first_timeout": 30 if len(moments) > 1 else limit}
        options["events"] = [(hook, 0, doze, time) for hook, time in moments]
        (folder := tmp_path / str(i)).mkdir()
        runs += processes_of(1, start, folder, (), options)
    assert codes(runs) == [0] * 5
    assert list(tmp_path.glob("*/stacks*")) == []


def fit_under_lightnings_launcher(folder: Path, act: Callable[[], None]) -> None:
    trainer = tiny_trainer(
        [Event(BATCH, 1, lambda: note_and(folder, act)), Watchdog(timeout=2)],
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
    )
    trainer.fit(tiny_model(), datamodule=tiny_data(bank_size=30))


def note_and(folder: Path, act: Callable[[], None]) -> None:
    (folder / "struck").write_text(str(os.getpid()))
    act()


@pytest.mark.parametrize("act", ["die", "freeze"])
def test_ranks_that_lightning_starts_end_together_and_leave_none_behind(
    act: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.py"
    file.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_callbacks_watchdog import *\n"
        f"fit_under_lightnings_launcher(Path({str(tmp_path)!r}), {act})\n"
    )
    process = subprocess.Popen([sys.executable, file], stderr=subprocess.PIPE, text=True)
    try:
        _, log = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == LOST, log
    assert time.time() - (tmp_path / "struck").stat().st_mtime < (5 if act == "die" else 15)
    status = Path(f"/proc/{(tmp_path / 'struck').read_text()}/status")
    assert not status.exists() or "\nState:\tZ" in status.read_text()  # dead, if not yet buried


class Killer(Callback):
    """Kills one rank in the middle of the run, once."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        with open(f"steps_{trainer.global_rank}", "a") as file:
            file.write(f"{trainer.global_step}\n")
        if trainer.global_rank == 1 and trainer.global_step == 5 and not Path("killed").exists():
            Path("killed").touch()
            die()


CONFIG = f"""
model:
  encoder: {{class_path: simclr_pl.ConvEncoder, init_args: {{width: 4, in_channels: 1}}}}
  warmup_epochs: 0
data: {{source: {{class_path: simclr_pl.data.Digits}}, global_batch_size: 64, bank_size: 30}}
trainer:
  max_epochs: 2
  limit_train_batches: 4
  accelerator: cpu
  devices: 2
  strategy: ddp
  enable_progress_bar: false
  callbacks: [{{class_path: {__name__}.Killer}}]
pictures: null
summary: null
"""


def test_a_job_under_torchrun_goes_on_by_itself_after_a_death(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    job = ["simclr_pl", "fit", "--config=config.yaml", "--resume=auto"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", *job],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            # Else torchrun's ranks, started again, read the old ones' addresses (pytorch issue 135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    steps = (tmp_path / "steps_0").read_text().split()
    assert steps[-4:] == ["5", "6", "7", "8"]  # from the checkpoint after the first epoch
    assert len(list(tmp_path.glob("runs/simclr/*"))) == 1


def wait(peers: Peers, seconds: float = 5) -> tuple[int, str] | None:
    wake, waker = Pipe(duplex=False)
    with wake, waker:
        return peers.wait(wake, seconds)


def meet_a_stranger(first: bytes) -> Any:
    """Rank 1's first connection is a stranger's."""
    connect = socket.create_connection

    def strangely(place: Any, seconds: float) -> socket.socket:
        connect(place, seconds).sendall(first)
        return connect(place, seconds)

    if dist.get_rank() == 1:
        socket.create_connection = strangely  # type: ignore[assignment]
    peers = Peers("localhost")
    if dist.get_rank() == 1:
        peers.leave(3, "it is over")
        return None
    return wait(peers)


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1", b""])
def test_strangers_are_no_ranks(first: bytes) -> None:
    assert on_ranks(2, meet_a_stranger, first)[0] == (3, "it is over")


def leave_a_child() -> Any:
    peers = Peers("localhost")
    if dist.get_rank() == 1:
        if (child := os.fork()) == 0:
            time.sleep(3)
            os._exit(0)
        peers._close()  # as the kernel does where a process dies
        os.waitpid(child, 0)
        return None
    return wait(peers, 2)


def test_a_loader_worker_that_outlives_its_rank_does_not_hide_the_death() -> None:
    assert on_ranks(2, leave_a_child)[0] == (LOST, "rank 1 has died")


def watch_three() -> Any:
    peers, rank = Peers("localhost"), dist.get_rank()
    if rank == 2:
        peers._close()
        return None
    end = wait(peers)
    if rank == 0 and end is not None:
        peers.leave(*end)
    return end


def test_every_rank_hears_of_every_death() -> None:
    assert on_ranks(3, watch_three)[:2] == [(LOST, "rank 2 has died")] * 2


def test_times_must_be_positive() -> None:
    with pytest.raises(InputError, match=r"`timeout` must be > 0; got 0. Set `watchdog.timeout`"):
        Watchdog(timeout=0)
    with pytest.raises(InputError, match=r"`first_timeout` must be > 0; got -1"):
        Watchdog(first_timeout=-1)
