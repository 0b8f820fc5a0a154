"""kNN against lightly's and the plain form, a product and its largest entries: time, and peak memory.

    python benchmarks/knn.py                      time of search and vote, one thread, and the ratio
    python benchmarks/knn.py --threads 2
    python benchmarks/knn.py --k 200
    python benchmarks/knn.py --memory             peak memory of each of two ranks

All get the same features of length 1, half precision for ours as the monitor keeps them and float32 for
the rivals, who take 512 queries at a time as a validation loader brings them. They take turns within one
process, so that a slow minute slows them all; medians are printed, and the share of queries that get
the same class. For the memory each rank is a process of a gloo group and holds half of the bank and
of the queries; the rival gathers the bank to every rank in float32. Needs the extra `bench`.
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from simclr_pl.distributed import gather_rows
from simclr_pl.neighbours import knn_predict, normalised_half

CLASSES = 100
TEMPERATURE = 0.07
BATCH = 512  # queries at a time of the rivals
Sets = tuple[Tensor, Tensor, Tensor]  # bank (M, E), its labels (M,), queries (Q, E)


def clusters(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping clusters after a ReLU, as features are; (rows, E) of length 1, (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    features = 0.2 * centres[labels] + torch.randn(rows, width, generator=generator)
    return F.normalize(features.relu_(), dim=1), labels


def ours(half: Sets, full: Sets, k: int) -> Tensor:
    return knn_predict(*half, CLASSES, k, TEMPERATURE)


def plain(half: Sets, full: Sets, k: int) -> Tensor:
    bank, labels, query = full
    classes = []
    for rows in query.split(BATCH):
        s, nearest = (rows @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), CLASSES)
        votes.scatter_add_(1, labels[nearest], (s / TEMPERATURE).exp())
        classes.append(votes.argmax(1))
    return torch.cat(classes)


def lightly(half: Sets, full: Sets, k: int) -> Tensor:
    from lightly.utils.benchmarking import knn_predict as predict

    bank, labels, query = full
    rows = query.split(BATCH)
    return torch.cat([predict(q, bank.T, labels, CLASSES, k, TEMPERATURE)[:, 0] for q in rows])


RIVALS: dict[str, Callable[[Sets, Sets, int], Tensor]] = {
    "simclr_pl": ours,
    "plain torch": plain,
    "lightly": lightly,
}


def compare_time(bank: int, queries: int, width: int, k: int, rounds: int) -> None:
    features, labels = clusters(bank, width, 1)
    query, truth = clusters(queries, width, 2)
    half = normalised_half(features), labels, normalised_half(query)
    full = features, labels, query
    small = tuple(part[:600] for part in half), tuple(part[:600] for part in full)
    taken: dict[str, list[float]] = {name: [] for name in RIVALS}
    classes = {}
    for rival in RIVALS.values():
        rival(*small, k)  # imports and compiling
    for _ in range(rounds):
        for name, rival in RIVALS.items():
            begin = time.perf_counter()
            classes[name] = rival(half, full, k)
            taken[name].append(time.perf_counter() - begin)
    threads = torch.get_num_threads()
    print(f"{bank:,} x {queries:,} x {width}, k = {k}, {threads} thread(s), {rounds} rounds")
    mine = taken["simclr_pl"]
    for name, seconds in taken.items():
        ratio = statistics.median(b / a for a, b in zip(mine, seconds, strict=True))
        same = (classes[name] == classes["simclr_pl"]).float().mean()
        right = (classes[name] == truth).float().mean()
        print(
            f"{name:>12}  {statistics.median(seconds):7.2f} s  ({ratio:5.2f} x)  "
            f"{same:.2%} as ours, accuracy {right:.2%}",
            flush=True,
        )


def gathered(bank: Tensor, labels: Tensor, query: Tensor, k: int) -> None:
    """What most monitors do: every rank holds the whole bank in float32."""
    everything = gather_rows(bank.float()), gather_rows(labels), query.float()
    plain(everything, everything, k)


def peak_mib() -> float:
    """Largest resident set since the last reset (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(rank: int, port: int, name: str, sizes: tuple[int, int, int], k: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    bank, queries, width = sizes
    features, labels = clusters(bank // 2, width, 1 + rank)
    query, _ = clusters(queries // 2, width, 3 + rank)
    bank_half, query_half = normalised_half(features), normalised_half(query)
    del features, query
    search = {
        "simclr_pl": partial(knn_predict, num_classes=CLASSES, k=k),
        "gathered": partial(gathered, k=k),
    }[name]
    search(bank_half[:600], labels[:600], query_half[:600])  # libraries and compiling
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = peak_mib()
    search(bank_half, labels, query_half)
    held = bank_half.nbytes / 2**20
    for turn in range(2):
        dist.barrier()
        if turn == rank:
            print(
                f"{name:>12}  rank {rank}  {held:7.0f} MiB  {peak_mib() - before:7.0f} MiB",
                flush=True,
            )
    dist.destroy_process_group()


def compare_memory(sizes: tuple[int, int, int], k: int) -> None:
    print(
        "{:,} x {:,} x {} on two ranks: the bank in half precision, and extra peak".format(*sizes)
    )
    for name in ("simclr_pl", "gathered"):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        mp.spawn(measure, (port, name, sizes, k), nprocs=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bank", type=int, default=50_000, help="images of the bank")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=512, help="of the features")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory:
        compare_memory((given.bank, given.queries, given.width), given.k)
    else:
        compare_time(given.bank, given.queries, given.width, given.k, given.rounds)
