"""One run on two ranks under random faults is, step by step, the run that nothing happened to.

`make soak` does the same with a hundred faults (`SIMCLR_TEST_FAULTS`).
"""

import csv
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from ranks import processes_of

from simclr_pl.cli import main

FAULTS = int(os.environ.get("SIMCLR_TEST_FAULTS", "6"))
AT_MOST = 5  # steps from the start of a job to its fault
EPOCH = 16  # steps
LOST, PREEMPTED, KILLED = 75, 85, -signal.SIGKILL
TIMEOUT = 4.0  # seconds without a step, after which a rank counts as hanging

CONFIG = f"""
name: run
model:
  encoder: {{class_path: simclr_pl.ConvEncoder, init_args: {{width: 4, in_channels: 1}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
  warmup_epochs: 1
data: {{source: {{class_path: simclr_pl.data.Digits}}, global_batch_size: 64, bank_size: 30}}
trainer:
  max_epochs: {-(-(FAULTS * AT_MOST + EPOCH) // EPOCH)}
  limit_train_batches: {EPOCH}
  check_val_every_n_epoch: 2
  log_every_n_steps: 1
  accelerator: cpu
  devices: 2
  strategy: ddp
  enable_progress_bar: false
  callbacks: [{{class_path: {__name__}.Losses}}]
checkpoint: {{init_args: {{every_n_train_steps: 3, save_top_k: 3}}}}
watchdog: {{init_args: {{timeout: {TIMEOUT}, first_timeout: 60}}}}
pictures: null
summary: null
"""


class Losses(Callback):
    """Writes each step's loss, to the bit, to a file that a kill cannot take away."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        line = f"{trainer.global_step} {float(outputs['loss']).hex()}\n"
        with open(f"losses_{trainer.global_rank}.txt", "a") as file:
            file.write(line)


class Job(NamedTuple):
    """A start of the run: both ranks' processes."""

    folder: Path
    processes: list[Any]

    def steps(self, rank: int) -> list[tuple[int, str]]:
        file = self.folder / f"losses_{rank}.txt"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [(int(step), loss) for step, loss in map(str.split, lines)]

    def wait_for(self, steps: int) -> None:
        """Until so many more steps are done."""
        before, deadline = len(self.steps(0)), time.monotonic() + 60
        while len(self.steps(0)) < before + steps:
            assert time.monotonic() < deadline, f"no step in time; {self.log()}"
            assert all(p.is_alive() for p in self.processes), f"ended by itself; {self.log()}"
            time.sleep(0.002)

    def send(self, number: int, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def codes(self, ranks: list[int], seconds: float) -> list[int]:
        """The exit codes of ranks that must end in time."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            self.processes[rank].join(max(0, deadline - time.monotonic()))
        codes = [self.processes[rank].exitcode for rank in ranks]
        assert None not in codes, f"ranks {ranks} end with {codes} in {seconds} s; {self.log()}"
        return codes

    def log(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("log_*.txt")))


def fit(folder: Path) -> None:
    """A rank's process."""
    os.chdir(folder)
    log = os.open(f"log_{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    main(["fit", "--config", "config.yaml", "--resume", "auto"])


def start(folder: Path) -> Job:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    return Job(folder, processes_of(2, fit, folder))


def one(chance: random.Random) -> list[int]:
    return [chance.randrange(2)]


def kill_one(job: Job, chance: random.Random) -> None:
    (rank,) = one(chance)
    job.send(signal.SIGKILL, [rank])
    assert job.codes([1 - rank], 5) == [LOST]


def kill_all(job: Job, chance: random.Random) -> None:
    job.send(signal.SIGKILL, [0, 1])
    assert job.codes([0, 1], 5) == [KILLED, KILLED]


def stop_in_order(ranks: Callable[[random.Random], list[int]]) -> Callable[..., None]:
    def stop(job: Job, chance: random.Random) -> None:
        job.send(signal.SIGTERM, ranks(chance))
        assert job.codes([0, 1], 20) == [PREEMPTED, PREEMPTED]

    return stop


def freeze_one(job: Job, chance: random.Random) -> None:
    (rank,) = one(chance)
    job.send(signal.SIGSTOP, [rank])
    assert job.codes([1 - rank], TIMEOUT + 5) == [LOST]
    job.send(signal.SIGKILL, [rank])


def damage_the_newest(job: Job, chance: random.Random) -> None:
    kill_all(job, chance)
    files = [f for f in job.folder.glob("runs/run/*/checkpoints/*.ckpt") if not f.is_symlink()]
    if files:  # none yet: the job starts anew
        newest = max(files, key=lambda f: f.stat().st_mtime_ns)
        os.truncate(newest, chance.randrange(newest.stat().st_size))


FAULT: dict[str, Callable[[Job, random.Random], None]] = {
    "kill -9 of one rank": kill_one,
    "kill -9 of all": kill_all,
    "SIGTERM to one rank": stop_in_order(one),
    "SIGTERM to all": stop_in_order(lambda _: [0, 1]),
    "SIGSTOP of one rank": freeze_one,
    "truncation of the newest checkpoint": damage_the_newest,
}


def faults(chance: random.Random) -> Iterator[str]:
    """Each kind once before any comes again, in random order."""
    while True:
        yield from chance.sample(list(FAULT), len(FAULT))


def result(folder: Path) -> dict[str, Any]:
    """What a finished run leaves."""
    # a job that is struck before its first checkpoint starts again, in a folder of its own
    run = max(folder.glob("runs/run/*"), key=lambda f: int(f.name.removeprefix("version_")))
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    parts = (content["state_dict"], content["optimizer_states"], content["lr_schedulers"])
    probe = next(v for k, v in content["callbacks"].items() if k.startswith("OnlineLinearProbe"))
    with open(run / "metrics.csv") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    rows = [{k: v for k, v in row.items() if "throughput/" not in k} for row in rows]  # timed
    return {
        "hash": hashlib.sha256("".join(_bits([parts, probe])).encode()).hexdigest(),
        "rows": [row for row in rows if row.keys() > {"epoch", "step"}],
    }


def _bits(value: Any) -> Iterator[str]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {value.contiguous().numpy().tobytes().hex()}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _bits(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _bits(item)
    else:
        yield repr(value)


@pytest.mark.timeout(60 + 15 * FAULTS)
def test_every_loss_and_the_final_weights_survive_random_faults(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    assert whole.codes([0, 1], 120) == [0, 0], whole.log()
    expected = dict(whole.steps(0))
    assert list(expected) == list(range(1, len(expected) + 1))

    seed = int(os.environ.get("SIMCLR_TEST_SEED", "0"))
    chance, begin = random.Random(seed), time.monotonic()
    print(f"seed {seed}")
    for _, fault in zip(range(FAULTS), faults(chance), strict=False):
        job = start(tmp_path / "struck")
        job.wait_for(chance.randint(1, AT_MOST))
        time.sleep(chance.uniform(0, 0.03))  # anywhere within a step
        print(f"{time.monotonic() - begin:.0f} s, step {job.steps(0)[-1][0]}: {fault}")
        try:
            FAULT[fault](job, chance)
        finally:
            for process in job.processes:
                process.kill()
                process.join()
    job = start(tmp_path / "struck")
    assert job.codes([0, 1], 120) == [0, 0], job.log()

    for rank in (0, 1):
        done = job.steps(rank)
        assert [(n, loss) for n, loss in done if loss != expected[n]] == []
        assert {n for n, _ in done} == set(expected)
    assert result(job.folder) == result(whole.folder)
