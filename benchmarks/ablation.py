"""What shortens a run or makes more of it: rows of a few options each, beside the plain run of a config.

    python benchmarks/ablation.py --steps 240 --data.source ImageFolder --data.source.root FOLDER \
        --data.bank_size 5000 --trainer.limit_val_batches 0
    python benchmarks/ablation.py --config configs/cifar10-200ep.yaml --seeds 0

Every row is `simclr fit`, from start to end by the command line; options that are not this file's own
go to all of them. Scores are those of a row's summary.json. Work and time are ratios to the plain run of
the same seed: operations of encoder and head, and seconds of training, without evaluation. For each seed
the rows run one after the other; times need a machine with nothing else to do.

Without `--steps` a run has the epochs of its config. With it, it is that many steps in ten short epochs,
the first of them warm-up, so that what changes with the epochs has epochs to change with.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from simclr_pl.doctor.configured import build

_EPOCHS = 10  # of a run of so many steps
_ENDS = (0.4, 0.7)  # of the run, where stages end


class Plain(NamedTuple):
    """What rows change.

    Attributes:
        data: the data module, not set up.
        model: the module.
        epochs: of the run.
        steps: of the run; None for those of the epochs.
    """

    data: Any
    model: Any
    epochs: int
    steps: int | None


class Result(NamedTuple):
    """Of a run: accuracies in percent, operations and seconds of training."""

    knn: float
    linear: float
    work: float
    seconds: float


# Each row's options, or None where it does not fit the config.


def stages(plain: Plain, changes: list[dict[str, Any]]) -> list[str]:
    """The config's augmentation with other arguments, until each of the ends."""
    augment, until = vars(plain.data.augment), {}
    for end, change in zip(_ENDS, changes, strict=False):
        epoch = str(max(1, round(end * plain.epochs)))
        until[epoch] = {"class_path": "simclr_pl.Augment", "init_args": {**augment, **change}}
    return ["--data.augment_until", json.dumps(until)]


def resolution(plain: Plain) -> list[str]:
    size = plain.data.augment.size
    return stages(plain, [{"size": size // 2}, {"size": 3 * size // 4}])


def augmentation(plain: Plain) -> list[str]:
    low, high = plain.data.augment.crop_scale
    weak = {"crop_scale": [max(low, 0.6 * high), high], "grey": 0.0, "blur": 0.0}
    return stages(plain, [{**weak, "strength": plain.data.augment.strength / 2}])


def twice_the_batch(plain: Plain) -> list[str]:
    options = ["--data.global_batch_size", str(2 * plain.data.global_batch_size)]
    if plain.steps is not None:
        options += length(plain.steps // 2)
    if plain.model.lr_scaling == "none":  # of Adam by the square root (arXiv:2205.10287)
        rate = plain.model.hparams["optimizer"]["init_args"]["lr"]
        options += ["--model.optimizer.init_args.lr", str(rate * math.sqrt(2))]
    return options


def stem(plain: Plain) -> list[str] | None:
    given = plain.model.hparams["encoder"].get("init_args") or {}
    return ["--model.encoder.stem_stride", "2"] if given.get("small_stem") else None


def decoupled(plain: Plain) -> list[str]:
    return ["--model.loss.denominator", "negatives"]


ROWS: dict[str, Callable[[Plain], list[str] | None]] = {
    "plain": lambda plain: [],
    "half the side, three quarters, all of it": resolution,
    "weak augmentation, then all of it": augmentation,
    "twice the batch, half the steps": twice_the_batch,
    "decoupled loss": decoupled,
    "two cycles of the rate": lambda plain: ["--model.lr_cycles", "2"],
    "stem of stride 2": stem,
    "growing side and decoupled loss": lambda plain: [*resolution(plain), *decoupled(plain)],
}


def length(steps: int) -> list[str]:
    """The options of a run of so many steps."""
    every = {"limit_train_batches": steps // _EPOCHS, "max_epochs": _EPOCHS, "max_steps": -1}
    options = [f"--trainer.{name}={value}" for name, value in every.items()]
    return [*options, "--model.warmup_epochs=1"]


def result_of(arguments: list[str]) -> Result:
    """Runs `simclr fit` once.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "simclr_pl", "fit", *arguments]
        command += [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
        command += ["--summary.baselines=false", "--pictures=null", "--report=null"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(folder).rglob("summary.json"))
        if done.returncode or not found:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        summary = json.loads(found[0].read_text())
    scores = (100 * summary[name] for name in ("knn_top1", "linear_top1"))
    return Result(*scores, summary["gflops"] * 1e9 * summary["seconds"], summary["seconds"])


def span(values: list[float], digits: int) -> str:
    """Mean, lowest and highest."""
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(results: dict[str, list[Result]]) -> str:
    """As Markdown."""
    plain = results["plain"]
    lines = ["| | kNN, % | linear, % | work | time |", "|---|---|---|---|---|"]
    for name, found in results.items():
        pairs = list(zip(found, plain, strict=True))
        work = statistics.mean(r.work / p.work for r, p in pairs)
        time = span([r.seconds / p.seconds for r, p in pairs], 2)
        knn, linear = span([r.knn for r in found], 1), span([r.linear for r in found], 1)
        lines.append(f"| {name} | {knn} | {linear} | {work:.2f} | {time} |")
    seconds = span([p.seconds for p in plain], 1)
    return "\n".join([*lines, "", f"Time 1 is {seconds} seconds of training."])


def main() -> None:
    """Runs the rows and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="configs/cifar10-cpu.yaml")
    parser.add_argument(
        "--steps", type=int, help="of a run, a multiple of 20; by default the epochs of the config"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", default=[], metavar="WORDS", help="those that hold it")
    args, others = parser.parse_known_args()
    common = ["--config", args.config, *others, *(length(args.steps) if args.steps else [])]
    cli = build(common)
    plain = Plain(cli.datamodule, cli.model, cli.trainer.max_epochs or -1, args.steps)
    if plain.epochs < 3:
        raise SystemExit(f"A run must have >= 3 epochs; got {plain.epochs}. Give --steps.")
    rows = {name: options for name, row in ROWS.items() if (options := row(plain)) is not None}
    wanted = args.rows or rows
    chosen = {
        name: o for name, o in rows.items() if name == "plain" or any(w in name for w in wanted)
    }
    results: dict[str, list[Result]] = {name: [] for name in chosen}
    for seed in args.seeds:
        for name, options in chosen.items():
            found = result_of([*common, *options, f"--seed_everything={seed}"])
            results[name].append(found)
            print(
                f"seed {seed}, {name}: kNN {found.knn:.1f}, linear {found.linear:.1f}, "
                f"{found.seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    print(table(results))


if __name__ == "__main__":
    main()
