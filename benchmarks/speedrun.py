"""How long a run takes from the start of its process to its end, and what came of it.

    python benchmarks/speedrun.py                                     100 epochs of CIFAR-10
    python benchmarks/speedrun.py --config speedrun/cifar10 --data PACKED --seeds 0 1 2
    python benchmarks/speedrun.py --data PACKED --profile             what the time of a step goes to

Each run is `simclr fit` with a config of this project, in a process of its own; options after `--` go to
it. kNN: k = 20, cosine, weights exp(s / 0.07). Linear: logistic regression. Both on clean views of the
whole training set and of the query. Seconds are those of the clock on the wall: imports, decoding,
compiling, training, evaluation and the report. Without a GPU a run has 12 steps of 32 images and scores
by 500: enough to see that all of it works, and where a step's time goes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.table import Table

from simclr_pl.doctor.configured import build

H200 = 790  # TFLOP/s in bfloat16 that large matrix products reach there
# What a CPU does in some minutes
TOY = {
    "data.global_batch_size": 32,
    "data.resident": "memory",
    "data.bank_size": 500,
    "data.eval_batch_size": 250,
    "model.warmup_epochs": 0,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.max_steps": 12,
    "trainer.max_epochs": 1,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 4,
    "summary.baselines": "false",
}
WARM_UP = 3  # steps that a profile leaves out

COLUMNS: dict[str, Any] = {
    "wall, s": lambda s: f"{s['wall']:.0f}",
    "training, s": lambda s: f"{s['seconds']:.0f}",
    "kNN, %": lambda s: f"{100 * s['knn_top1']:.1f}",
    "linear, %": lambda s: f"{100 * s['linear_top1']:.1f}",
    "images/s": lambda s: f"{s['samples_per_second']:,.0f}",
    "TFLOP/s": lambda s: f"{s['gflops'] / 1e3:.3g}",
    "of this device, %": lambda s: f"{100 * s['flop_utilisation']:.0f}",
    f"of {H200} TFLOP/s, %": lambda s: f"{s['gflops'] / 10 / H200:.2g}",
    "memory, MiB": lambda s: f"{s['peak_memory_mib']:,.0f}",
}


def words(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def source_of(folder: str | None) -> dict[str, Any]:
    if folder is None:
        return {}  # the config's own
    kind = "Shards" if Path(folder, "index.json").is_file() else "ImageFolder"
    return {"data.source": kind, "data.source.root": folder}


def run(arguments: Sequence[str], seed: int, root: Path) -> dict[str, Any]:
    """The run's summary, and its seconds."""
    folder = root / str(seed)
    options = {"seed_everything": seed, "trainer.default_root_dir": folder}
    arguments = [*arguments, *words(options)]
    print("simclr fit", *arguments, flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "simclr_pl", "fit", *arguments], check=True)
    wall = time.perf_counter() - began
    (file,) = folder.rglob("summary.json")
    return {**json.loads(file.read_text()), "wall": wall}


def report(runs: dict[int, dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for heading in ("seed", *COLUMNS):
        table.add_column(heading, justify="right")
    for seed, summary in runs.items():
        table.add_row(str(seed), *(cell(summary) for cell in COLUMNS.values()))
    if len(runs) > 1:
        every = list(runs.values())
        numbers = [key for key, value in every[0].items() if isinstance(value, (int, float))]
        mean = {key: statistics.mean(summary[key] for summary in every) for key in numbers}
        table.add_row("mean", *(cell(mean) for cell in COLUMNS.values()), style="bold")
    return table


class Parts(Profiler):
    """The host's time by what it went to, each moment once."""

    ENCODER = "encoder and head"

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.stack = ["Lightning's loops"]
        self.since = time.perf_counter()

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def start(self, action_name: str) -> None:
        self._turn()
        self.stack.append(self._part(action_name))

    def stop(self, action_name: str) -> None:
        self._turn()
        self.stack.pop()

    def _part(self, action: str) -> str:
        """What is not told apart belongs to what is around it."""
        known = {
            ".forward": self.ENCODER + ", forward",
            ".backward": self.ENCODER + ", backward",
            ".training_step": "loss",
            ".optimizer_step": "optimiser",
            ".train_dataloader_next": "loader",
            ".on_after_batch_transfer": "views",
        }
        for end, name in known.items():
            if action.endswith(end):
                return name
        if action.startswith("[Callback]"):
            return action.removeprefix("[Callback]").split(".")[0].split("{")[0]
        return self.stack[-1]


class Window(Callback):
    """Counts from the first step after the warm-up to the last one, without evaluation."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.seconds: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self.parts.seconds.clear()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds = Counter(self.parts.seconds)


def profile(arguments: Sequence[str], root: Path) -> Table:
    """Shares of the steps after the first ones, which start things."""
    cli = build([*arguments, *words({"trainer.default_root_dir": root})])
    parts, trainer, model = Parts(), cli.trainer, cli.model
    window = Window(parts)
    trainer.callbacks.append(window)  # type: ignore[attr-defined]
    trainer.profiler = parts  # type: ignore[attr-defined]
    for module in (model.encoder, model.projector):
        module.register_forward_pre_hook(lambda *_: parts.start(".forward"))
        module.register_forward_hook(lambda *_: parts.stop(".forward"))
    trainer.fit(model, datamodule=cli.datamodule)
    whole = sum(window.seconds.values())
    table = Table(title=f"a step of {cli.datamodule.global_batch_size} images on {model.device}")
    table.add_column("part")
    table.add_column("share, %", justify="right")
    for name, seconds in window.seconds.most_common():
        style = "bold red" if seconds > 0.05 * whole and Parts.ENCODER not in name else ""
        table.add_row(name, f"{100 * seconds / whole:.2f}", style=style)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="speedrun/cifar10-100ep", help="a preset or a file")
    parser.add_argument("--data", help="the set, packed or a folder; by default the config's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("more", nargs="*", metavar="-- --KEY VALUE", help="options of simclr fit")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        print("No GPU: a few steps only, whose scores and speed say nothing of a whole run.")
    chosen = {**source_of(given.data), **({} if gpu else TOY)}
    rest = ["--config", given.config, *words(chosen), *given.more]
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as place:
        if given.profile:
            console.print(profile(rest, Path(place)))
            sys.exit()
        device = torch.cuda.get_device_name() if gpu else "a CPU"
        found = {seed: run(rest, seed, Path(place)) for seed in given.seeds}
        console.print(report(found, f"{given.config} on {device}"))
        if given.data is not None:
            console.print("Images from files: where these are JPEGs, their pixels were compressed.")
