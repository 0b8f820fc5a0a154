"""The words of the text that asked for this project, each beside plain SimCLR on the embedded digits.

    python benchmarks/variants.py --seeds 0 1 2

Every row is the quick start with the options shown, from start to end by the command line; kNN and linear
accuracy of the frozen features on the 450 held-out digits are those of its summary.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from rich.progress import track

ROTATION = "--data.augment simclr_pl.augment.digits --data.augment.init_args.rotation"
LOSS = "--model.loss"
RAW = f"{LOSS}.similarity euclidean {LOSS}.normalise false --model.temperature {{sigma}}"

VARIANTS = {
    "plain SimCLR": "",
    "without rotation": f"{ROTATION} 0",
    "rotation up to 30 degrees": f"{ROTATION} 30",
    "simulated data, 0.3": "--data.replace_probability 0.3",
    "simulated data, 0.3, the loss not told": "--data.replace_probability 0.3 --trainer.callbacks+ "
    "variants.Forget",
    "negatives alone in the denominator": f"{LOSS}.denominator negatives",
    "negatives of both": f"{LOSS}.denominator both_negatives",
    "Euclidean, normalised, sigma 0.4": f"{LOSS}.similarity euclidean --model.temperature 0.4",
    "Euclidean, raw, sigma {sigma}": RAW,
    "Euclidean, raw, sigma {sigma}, negatives of both": f"{RAW} {LOSS}.denominator both_negatives",
}


class Forget(Callback):
    """Keeps from the loss which sample a view shows, so that it takes strangers for positives."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Takes the ids out of the batch."""
        batch.pop("ids")


def scores(options: str, seed: int) -> tuple[float, float]:
    """KNN and linear accuracy of one run, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "simclr_pl",
            "fit",
            "--config",
            "quickstart",
            *options.split(),
        ]
        command += [f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"]
        command += ["--pictures=null", "--report=null", "--trainer.enable_progress_bar=false"]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        found = list(Path(folder).rglob("summary.json"))
        if done.returncode or not found:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        summary = json.loads(found[0].read_text())
    return 100 * summary["knn_top1"], 100 * summary["linear_top1"]


def main() -> None:
    """Runs all variants and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sigma", default="51.2", help="of the raw Euclidean variants")
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    args = parser.parse_args()
    chosen = {name: options for name, options in VARIANTS.items() if args.only in name}
    runs = [(name, seed) for name in chosen for seed in args.seeds]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for name, seed in track(runs, "Runs"):
        found[name].append(scores(chosen[name].format(sigma=args.sigma), seed))
        print(f"{name.format(sigma=args.sigma)}, seed {seed}: {found[name][-1]}", file=sys.stderr)
    print("| variant | kNN, % | linear, % |\n|---|---|---|")
    for name, values in found.items():
        cells = [
            f"{statistics.mean(column):.1f} ({min(column):.1f} to {max(column):.1f})"
            for column in zip(*values, strict=True)
        ]
        print(f"| {name.format(sigma=args.sigma)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
