"""How far the numbers of a run can be trusted: its monitors against the offline protocols.

    python benchmarks/monitors.py --images data/cifar10          about a quarter of an hour on 2 cores

Trains the 4-layer encoder of configs/cifar10-cpu.yaml on CIFAR-10 (a folder of images), evaluated after
every epoch. The first table has what the monitors said then beside what `simclr knn` and `simclr linear`
find in that epoch's checkpoint; the second has every offline protocol at the end. Raw pixels and the
encoder at initialisation stand beside the trained one.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CONFIG = Path(__file__).parents[1] / "configs/cifar10-cpu.yaml"
ONLINE = ("knn/top1", "knn/top5", "probe/top1", "probe/top5", "probe/best_lr")


def simclr(*arguments: object) -> None:
    print("simclr", *arguments, flush=True)
    command = [sys.executable, "-m", "simclr_pl", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def protocol(name: str, checkpoint: Path, *options: object) -> dict[str, Any]:
    out = checkpoint.with_suffix(".json")
    simclr(name, checkpoint, "--out", out, *options)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def train(images: str, epochs: int, folder: Path) -> Path:
    options = {
        "data.source": "ImageFolder",
        "data.source.root": images,
        "data.augment": "simclr_pl.augment.simclr_cifar",
        "trainer.default_root_dir": folder,
        "trainer.max_epochs": epochs,
        "trainer.max_steps": -1,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.enable_progress_bar": "false",
        "checkpoint.save_top_k": -1,
    }
    simclr("fit", "--config", CONFIG, *(a for k, v in options.items() for a in (f"--{k}", v)))
    return folder / "cifar10-cpu/version_0"


def online(run: Path) -> list[dict[str, float]]:
    """What the monitors said after each epoch."""
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    epochs: list[dict[str, float]] = []
    collapse: dict[str, float] = {}
    for row in rows:
        collapse |= {k: float(v) for k, v in row.items() if k.startswith("collapse/") and v}
        if row["knn/top1"]:
            epochs.append({**collapse, **{name: float(row[name]) for name in ONLINE}})
    return epochs


def share(value: float) -> str:
    return f"{100 * value:.1f}"


def by_epoch(run: Path) -> Table:
    table = Table(title="After each epoch, %: online / offline")
    for heading in ("epoch", "kNN top-1", "kNN top-5", "linear top-1", "linear top-5", "best rate"):
        table.add_column(heading, justify="right")
    plain = ("--k", "[20]", "--temperature", "[0.07]", "--baselines", "false")
    for epoch, seen in enumerate(online(run)):
        (checkpoint,) = (run / "checkpoints").glob(f"epoch={epoch}-*.ckpt")
        found = {
            "knn": protocol("knn", checkpoint, *plain),
            "probe": protocol("linear", checkpoint, "--baselines", "false"),
        }
        cells = [
            f"{share(seen[f'{monitor}/{top}'])} / {share(found[monitor][top])}"
            for monitor in ("knn", "probe")
            for top in ("top1", "top5")
        ]
        table.add_row(str(epoch + 1), *cells, f"{seen['probe/best_lr']:g}")
    return table


def at_the_end(run: Path) -> Table:
    last = run / "checkpoints/last.ckpt"
    protocols: dict[str, tuple[object, ...]] = {
        "knn": (),
        "linear": (),
        "linear --method sgd": ("--method", "sgd"),
        "linear --augment true --epochs 10": ("--augment", "true", "--epochs", 10),
        "finetune --fraction 0.01": ("--fraction", 0.01),
        "finetune --fraction 0.1": ("--fraction", 0.1),
    }
    table = Table(title="Every protocol at the end, top-1 %")
    for heading in ("simclr", "trained", "95 % interval", "at initialisation", "raw pixels"):
        table.add_column(heading, justify="left" if heading == "simclr" else "right")
    for name, options in protocols.items():
        found = protocol(name.split()[0], last, *options)
        low, high = found["top1_interval"]
        start = found.get("top1_init", found.get("top1_random", 0.0))
        pixels = share(found["top1_raw"]) if "top1_raw" in found else "-"
        table.add_row(
            name, share(found["top1"]), f"{share(low)} to {share(high)}", share(start), pixels
        )
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="data/cifar10", help="CIFAR-10 as a folder of images")
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as place:
        finished = train(given.images, given.epochs, Path(place))
        summary = json.loads((finished / "summary.json").read_text())
        console.print(by_epoch(finished), at_the_end(finished))
        split = ", ".join(f"{100 * v:.1f} % {k}" for k, v in summary["time"].items())
        console.print(f"time of the training, evaluated {given.epochs} times: {split}")
        measured = online(finished)[-1]
        values = (f"{k} {v:.3g}" for k, v in measured.items() if k.startswith("collapse/"))
        console.print("last look: " + ", ".join(values))
