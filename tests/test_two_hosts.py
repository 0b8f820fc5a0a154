"""A run on two hosts loses the network between them, and goes on.

The hosts are network namespaces, each with an address of its own and a cable between them; where these
may not be made, processes of two loopback addresses, of which one is stopped for a while.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from ranks import processes_of

from simclr_pl.cli import main

SCRIPT = Path(__file__).parents[1] / "configs/cluster/torchrun.sh"
CUT_AT, STEPS = 12, 50
CONFIG = """
name: run
model:
  encoder: {class_path: simclr_pl.ConvEncoder, init_args: {width: 4, in_channels: 1}}
data: {source: {class_path: simclr_pl.data.Digits}, global_batch_size: 64, bank_size: 30}
trainer:
  max_epochs: 5
  limit_train_batches: 10
  limit_val_batches: 0
  log_every_n_steps: 1
  accelerator: cpu
  strategy: ddp
  enable_progress_bar: false
checkpoint: {init_args: {every_n_train_steps: 7}}
watchdog: {init_args: {timeout: 3, first_timeout: 60}}
collapse: null
knn: null
pictures: null
probe: null
summary: null
throughput: null
"""


class Hosts:
    """Two of them.

    Attributes:
        addresses: of each.
        interface: through which they talk, by the same name on both.
    """

    def __init__(self, stack: ExitStack) -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self.interface = "cable"
        self.names = [f"simclr{os.getpid()}{side}" for side in "ab"]
        self.addresses = ["10.213.0.1", "10.213.0.2"]
        try:
            self._connect(stack)
        except (OSError, subprocess.CalledProcessError):
            self.names = []
            self.interface, self.addresses = "lo", ["127.0.0.2", "127.0.0.3"]

    def _connect(self, stack: ExitStack) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        here, there = self.names
        peer = ("peer", "name", self.interface, "netns", there)
        _ip("-n", here, "link", "add", self.interface, "type", "veth", *peer)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", self.interface)
            for link in ("lo", self.interface):
                _ip("-n", name, "link", "set", link, "up")

    def start(self, host: int, command: list[str], log: Path) -> None:
        prefix = ["ip", "netns", "exec", self.names[host]] if self.names else []
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # What torchrun asks the name service for on other machines
        own = {"PET_LOCAL_ADDR": self.addresses[host], "PET_RDZV_CONF": f"is_host={host == 0}"}
        own["GLOO_SOCKET_IFNAME"] = self.interface
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*prefix, *command],
                cwd=log.parent,
                env={**os.environ, **own, "PATH": path, "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=out,
            )
        self.started.append(process)

    def cut(self) -> None:
        if self.names:
            _ip("-n", self.names[1], "link", "set", self.interface, "down")
        else:
            send(signal.SIGSTOP, self.started[1].pid)

    def mend(self) -> None:
        if self.names:
            _ip("-n", self.names[1], "link", "set", self.interface, "up")
        else:
            send(signal.SIGCONT, self.started[1].pid)

    def end(self) -> None:
        for process in self.started:
            send(signal.SIGKILL, process.pid)
            process.wait()


def send(number: int, pid: int) -> None:
    """Signals a process and all that it started; torchrun's ranks are in sessions of their own."""
    with suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, number)
        for child in children:
            send(number, int(child))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        hosts = Hosts(stack)
        stack.callback(hosts.end)
        yield hosts


def losses(folder: Path) -> list[tuple[int, str]]:
    """Each step's loss, in hex."""
    table = folder / "runs/run/version_0/metrics.csv"
    if not table.is_file():
        return []
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return [(int(row["step"]), float(row["train/loss"]).hex()) for row in rows]


def wait_for(what: Callable[[], bool], seconds: float, said: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)


def fit(folder: Path) -> None:
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    main(["fit", "--config", "config.yaml", "--trainer.devices", "2"])


def test_a_cut_network_ends_both_hosts_ranks_and_mended_they_finish_with_the_same_losses(
    hosts: Hosts, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG)
    logs = [cut / "host_0.txt", cut / "host_1.txt"]
    command = [str(SCRIPT), f"{hosts.addresses[0]}:29417", "2", "1", "config.yaml"]
    for host, log in enumerate(logs):
        hosts.start(host, command, log)
    alone = processes_of(2, fit, whole)

    def said() -> str:
        return "\n".join(log.read_text() for log in logs)

    def is_time() -> bool:
        assert all(process.poll() is None for process in hosts.started), said()
        return len(losses(cut)) >= CUT_AT

    wait_for(is_time, 100, said)
    hosts.cut()
    awake = logs if hosts.names else logs[:1]
    wait_for(lambda: all("ending with 75" in log.read_text() for log in awake), 30, said)
    done = len(losses(cut))
    hosts.mend()
    for process in hosts.started:
        assert process.wait(120) == 0, said()

    for process in alone:
        process.join(60)
    assert [p.exitcode for p in alone] == [0, 0]
    assert CUT_AT <= done < STEPS
    assert len(losses(whole)) == STEPS
    assert losses(cut) == losses(whole)
    assert "Restored all states" in logs[0].read_text()
