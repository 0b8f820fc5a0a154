"""The collapse monitor: right values in every logger, on two ranks and in bf16, and a warning in time."""

import csv
import json
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_data, tiny_model, tiny_trainer, weights
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_pl import InputError, Projector, SimCLR
from simclr_pl.callbacks import CollapseMonitor
from simclr_pl.cli import main
from simclr_pl.metrics import (
    alignment,
    contrastive_top1,
    deviation,
    rank_me,
    similarity_histograms,
    uniformity,
)
from simclr_pl.trackers import WandbTracker

QUICK = str(Path(__file__).parents[1] / "configs/quickstart.yaml")


class Recorder(Callback):
    """Keeps what each training step returns."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append({k: v.detach().clone() for k, v in outputs.items()})


def views(rows: Tensor, n_images: int = 64) -> list[Tensor]:
    return list(rows.double().split(n_images))


def expected(outputs: dict[str, Tensor], images: Any = slice(None)) -> dict[str, float]:
    """The values in float64 from a step's outputs of one process."""
    h = [view[images] for view in views(outputs["features"])]
    z = [view[images] for view in views(outputs["projections"])]
    pairs = [(i, j) for i in range(len(z)) for j in range(i + 1, len(z))]
    values = {
        "feature_rank": rank_me(h[0]),
        "feature_std": deviation(h[0]),
        "projection_rank": rank_me(z[0]),
        "projection_std": deviation(z[0]),
        "alignment": sum(alignment(z[i], z[j]) for i, j in pairs) / len(pairs),
        "uniformity": sum(map(uniformity, z)) / len(z),
        "top1": contrastive_top1(torch.stack(z)),
    }
    return {f"collapse/{name}": float(value) for name, value in values.items()}


def measured(csv_file: Path) -> dict[int, dict[str, float]]:
    """The monitor's rows of metrics.csv, by their step."""
    with open(csv_file) as file:
        rows = [row for row in csv.DictReader(file) if row.get("collapse/top1")]
    values = {
        int(row["step"]): {k: float(v) for k, v in row.items() if k.startswith("collapse/")}
        for row in rows
    }
    assert len(values) == len(rows)  # each step once
    return values


def fit(
    folder: Path,
    *callbacks: Callback,
    model: SimCLR | None = None,
    data: Any = None,
    **options: Any,
) -> Trainer:
    """8 steps, of which Lightning itself logs the third and the sixth."""
    defaults = {"logger": CSVLogger(folder, "run"), "log_every_n_steps": 3}
    defaults |= {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer = tiny_trainer(list(callbacks), **{**defaults, **options})
    trainer.fit(model or tiny_model(), datamodule=data or tiny_data())
    return trainer


def csv_of(folder: Path) -> Path:
    return folder / "run/version_0/metrics.csv"


# Values.


def test_every_value_reaches_the_csv_with_its_own_step(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = fit(tmp_path, CollapseMonitor(every_n_steps=2), recorder)
    found = measured(csv_of(tmp_path))
    assert list(found) == [0, 1, 3, 5, 7]
    for step, values in found.items():
        assert values == pytest.approx(expected(recorder.outputs[step]), rel=1e-4)
    for name, value in found[7].items():  # for early stopping and the like
        assert float(trainer.callback_metrics[name]) == pytest.approx(value)


@pytest.mark.parametrize("probability", [0.4, 1.0])
def test_pairs_are_of_samples_whose_views_are_all_their_own(
    tmp_path: Path, probability: float
) -> None:
    recorder = Recorder()
    data = tiny_data(replace_probability=probability)
    fit(tmp_path, CollapseMonitor(every_n_steps=4), recorder, data=data)
    with open(csv_of(tmp_path)) as file:
        found = [row for row in csv.DictReader(file) if row.get("collapse/feature_rank")]
    lines = (tmp_path / "run/version_0/histograms.jsonl").exists()
    assert lines == (probability < 1)
    for row, outputs in zip(found, [recorder.outputs[i] for i in (0, 3, 7)], strict=True):
        own = [i for i, column in enumerate(outputs["ids"].T.tolist()) if len(set(column)) == 1]
        assert (len(own) < 2) == (probability == 1)
        every = expected(outputs)
        if own:
            every |= dict(list(expected(outputs, own).items())[4:])  # what is of pairs
        for key, value in every.items():
            if own or not key.endswith(("alignment", "uniformity", "top1")):
                assert float(row[key]) == pytest.approx(value, rel=1e-4)
            else:
                assert not row.get(key)


def test_values_belong_to_the_step_that_train_loss_has(tmp_path: Path) -> None:
    fit(tmp_path, CollapseMonitor(every_n_steps=3))
    with open(csv_of(tmp_path)) as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [2, 5]
    assert list(measured(csv_of(tmp_path))) == [0, 2, 5]


def test_accumulated_steps_are_measured_once(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, CollapseMonitor(every_n_steps=2), recorder, accumulate_grad_batches=2)
    found = measured(csv_of(tmp_path))
    assert list(found) == [0, 1, 3]  # of 4 steps of 2 batches each
    for step, values in found.items():
        assert values == pytest.approx(expected(recorder.outputs[2 * step + 1]), rel=1e-4)


def test_small_views_and_more_than_two_are_measured(tmp_path: Path) -> None:
    recorder = Recorder()
    data = tiny_data(n_views=2, n_small_views=1)
    fit(tmp_path, CollapseMonitor(every_n_steps=4), recorder, data=data)
    assert len(recorder.outputs[3]["features"]) == 3 * 64
    found = measured(csv_of(tmp_path))[3]
    assert found == pytest.approx(expected(recorder.outputs[3]), rel=1e-4)


def test_bf16_features_are_measured_in_float32(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, CollapseMonitor(every_n_steps=8), recorder, precision="bf16-mixed")
    assert recorder.outputs[7]["projections"].dtype == torch.bfloat16
    found = measured(csv_of(tmp_path))[7]
    assert found == pytest.approx(expected(recorder.outputs[7]), rel=1e-5)


def test_images_are_spread_over_the_batch(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, CollapseMonitor(every_n_steps=8, max_images=16), recorder)
    every_fourth = expected(recorder.outputs[7], slice(None, None, 4))
    assert measured(csv_of(tmp_path))[7] == pytest.approx(every_fourth, rel=1e-4)


def test_other_steps_touch_no_tensor(tmp_path: Path) -> None:
    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    class Counted(CollapseMonitor):
        calls: list[int] = []  # noqa: RUF012

        def on_train_batch_end(self, *args: Any) -> None:
            with Counter() as counter:
                super().on_train_batch_end(*args)
            self.calls.append(counter.calls)

    fit(tmp_path, Counted(every_n_steps=5))
    assert [calls > 0 for calls in Counted.calls] == [step in (1, 5) for step in range(1, 9)]


# Histograms.


def test_histograms_are_kept_in_the_runs_folder(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, CollapseMonitor(every_n_steps=4), recorder)
    lines = (tmp_path / "run/version_0/histograms.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(line["step"], line["epoch"]) for line in found] == [(0, 0), (3, 0), (7, 1)]
    for line in found:
        z = recorder.outputs[line["step"]]["projections"].view(2, 64, -1)
        counts = similarity_histograms(z)
        assert line["positive"] == counts.positive.tolist()
        assert line["negative"] == counts.negative.tolist()
        assert sum(line["positive"]) == 64
        assert sum(line["negative"]) == 128 * 127 // 2 - 64


def test_tensorboard_shows_the_histograms(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(tmp_path, CollapseMonitor(every_n_steps=4), logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("collapse/feature_rank")] == [0, 3, 7]
    lines = (tmp_path / "run/histograms.jsonl").read_text().splitlines()
    for name, key in (("collapse/positives", "positive"), ("collapse/negatives", "negative")):
        found = events.Histograms(name)
        assert [event.step for event in found] == [0, 3, 7]
        for event, line in zip(found, lines, strict=True):
            counts = json.loads(line)[key]
            value = event.histogram_value
            assert (value.num, value.min, value.max) == (sum(counts), -1, 1)
            # TensorBoard joins runs of empty bins: the filled ones keep their right edges
            filled = {
                round(edge, 6): n
                for edge, n in zip(value.bucket_limit, value.bucket, strict=True)
                if n
            }
            edges = [round(-1 + 0.02 * (i + 1), 6) for i in range(100)]
            assert filled == {edge: n for edge, n in zip(edges, counts, strict=True) if n}
            mean = sum(n * (edge - 0.01) for edge, n in filled.items()) / sum(counts)
            assert value.sum / value.num == pytest.approx(mean)


def test_wandb_shows_the_histograms(tmp_path: Path) -> None:
    logger = WandbTracker(tmp_path, "tiny", offline=True)
    fit(tmp_path, CollapseMonitor(every_n_steps=8), logger=logger)
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wanted = (b"collapse/feature_rank", b"collapse/positives", b"collapse/negatives", b"histogram")
    deadline = time.monotonic() + 30  # wandb's own process writes, when the machine lets it
    while any(w not in file.read_bytes() for w in wanted) and time.monotonic() < deadline:
        time.sleep(0.1)
    content = file.read_bytes()
    assert all(w in content for w in wanted)


# The warning.


class Constant(nn.Module):
    """Says the same of every image."""

    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.answer.expand(len(x), 32)


class Line(nn.Module):
    """Says one number of an image, in 32 ways."""

    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(32 * 32, 1), nn.Linear(1, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.narrow(x.flatten(1)))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    name = "simclr_pl.callbacks.collapse"
    return [record.getMessage() for record in caplog.records if record.name == name]


def model_of(encoder: nn.Module) -> SimCLR:
    optimizer = partial(SGD, lr=0.05)
    head = partial(Projector, hidden_features=32, out_features=32)
    return SimCLR(encoder, head, optimizer=optimizer, lr_scaling="none", warmup_epochs=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_constant_encoder_is_warned_of_once(
    precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, CollapseMonitor(every_n_steps=1), model=model_of(Constant()), precision=precision)
    (message,) = said(caplog)
    assert "features collapse at step 1" in message
    assert "feature_rank 1, below 5; feature_std 0, below 0.05" in message
    assert "`model.warmup_epochs`" in message
    assert len(measured(csv_of(tmp_path))) == 8


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_features_on_a_line_are_warned_of(
    precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, CollapseMonitor(), model=model_of(Line()), precision=precision)
    (message,) = said(caplog)
    assert "feature_rank" in message
    assert "_std" not in message  # they are spread along it


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_healthy_run_is_not_warned_of(
    batch_norm: bool, precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(batch_norm)
    fit(tmp_path, CollapseMonitor(every_n_steps=1), model=model, precision=precision)
    assert len(measured(csv_of(tmp_path))) == 8
    assert not said(caplog)


def test_a_few_images_are_not_judged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for max_images, warnings in ((7, 0), (8, 1)):
        monitor = CollapseMonitor(max_images=max_images)
        fit(tmp_path / str(max_images), monitor, model=model_of(Constant()))
        assert len(said(caplog)) == warnings


def test_a_resumed_run_is_not_warned_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = CollapseMonitor(every_n_steps=1)
    fit(tmp_path, first, model=model_of(Constant()), max_epochs=1).save_checkpoint(
        tmp_path / "half.ckpt"
    )
    assert len(said(caplog)) == 1
    logger = CSVLogger(tmp_path, "resumed")
    trainer = tiny_trainer([CollapseMonitor(every_n_steps=1)], logger=logger, limit_val_batches=0)
    trainer.fit(
        model_of(Constant()),
        datamodule=tiny_data(),
        ckpt_path=tmp_path / "half.ckpt",
        weights_only=True,
    )
    assert list(measured(tmp_path / "resumed/version_0/metrics.csv")) == [4, 5, 6, 7]
    assert len(said(caplog)) == 1


def test_a_resumed_run_repeats_no_measurement(tmp_path: Path) -> None:
    halves = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    first = fit(tmp_path, CollapseMonitor(every_n_steps=2), max_epochs=1, **halves)
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert list(measured(csv_of(tmp_path))) == [0, 1]
    logger = CSVLogger(tmp_path, "resumed")
    trainer = tiny_trainer([CollapseMonitor(every_n_steps=2)], logger=logger, **halves)
    trainer.fit(
        tiny_model(), datamodule=tiny_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert list(measured(tmp_path / "resumed/version_0/metrics.csv")) == [3]


def test_features_that_are_not_finite_are_no_collapse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(batch_norm=False)
    nn.init.constant_(model.encoder[0].weight, torch.nan)  # type: ignore[index, arg-type, union-attr]
    fit(tmp_path, CollapseMonitor(), model=model)
    assert math.isnan(measured(csv_of(tmp_path))[0]["collapse/feature_rank"])
    assert not said(caplog)


# Ranks, and the encoder.


def devices() -> dict[str, Any]:
    n = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"devices": n, "strategy": "ddp" if n > 1 else "auto"}


def values_of(folder: Path, max_images: int, replaced: float = 0.0) -> dict[str, float]:
    monitor = CollapseMonitor(every_n_steps=3, max_images=max_images)
    data = tiny_data(replace_probability=replaced)
    trainer = fit(folder, monitor, model=tiny_model(batch_norm=False), data=data, **devices())
    values = trainer.callback_metrics.items()
    return {name: float(value) for name, value in values if name.startswith("collapse")}


def warnings_of_a_constant_encoder(folder: Path) -> int:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("simclr_pl.callbacks.collapse").addHandler(handler)
    monitor = CollapseMonitor(every_n_steps=1)
    fit(folder, monitor, model=model_of(Constant()), max_steps=2, **devices())
    return len(records)


def same_weights_without(folder: Path, precision: str = "32-true") -> bool:
    watched, alone = (
        weights(
            fit(
                folder / str(len(callbacks)),
                *callbacks,
                model=tiny_model(),
                precision=precision,
                max_steps=3,
                **devices(),
            ).lightning_module
        )
        for callbacks in ([CollapseMonitor(every_n_steps=1)], [])
    )
    return all(torch.equal(watched[name], alone[name]) for name in alone)


SETTINGS = ((512, 0.0), (16, 0.0), (512, 0.4))  # images measured, share of views replaced


def on_a_rank(folder: Path) -> dict[Any, Any]:
    return {
        **{setting: values_of(folder / str(setting), *setting) for setting in SETTINGS},
        "warnings": warnings_of_a_constant_encoder(folder / "warnings"),
        "same weights": same_weights_without(folder / "weights"),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, on_ranks(2, on_a_rank, folder)


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_ranks_measure_what_one_process_does(
    setting: tuple[int, float], two_ranks: tuple[Path, list[dict[Any, Any]]], tmp_path: Path
) -> None:
    folder, ranks = two_ranks
    folder = folder / str(setting)
    values_of(tmp_path, *setting)
    one, two = measured(csv_of(tmp_path)), measured(csv_of(folder))
    assert list(one) == list(two) == [0, 2, 5]
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4)
    assert ranks[0][setting] == ranks[1][setting] == pytest.approx(two[5])
    histograms = [
        (root / "run/version_0/histograms.jsonl").read_text().splitlines()
        for root in (tmp_path, folder)
    ]
    assert histograms[0][0] == histograms[1][0]  # before any update
    assert len(histograms[0]) == len(histograms[1]) == 3


def test_one_rank_warns_for_all(two_ranks: tuple[Path, list[dict[Any, Any]]]) -> None:
    assert [rank["warnings"] for rank in two_ranks[1]] == [1, 0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_encoder_is_bit_identical_without_it(precision: str, tmp_path: Path) -> None:
    assert same_weights_without(tmp_path, precision)


def test_the_encoder_is_bit_identical_without_it_on_two_ranks(
    two_ranks: tuple[Path, list[dict[Any, Any]]],
) -> None:
    assert [rank["same weights"] for rank in two_ranks[1]] == [True, True]


# Options.


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("every_n_steps", 0, 1), ("max_images", 1, 2), ("min_rank", -1.0, 0), ("min_std", -0.1, 0)],
)
def test_an_option_out_of_range_is_an_error(option: str, value: float, least: int) -> None:
    message = rf"`{option}` must be >= {least}; got {value}. Set `collapse.{option}`."
    with pytest.raises(InputError, match=message):
        CollapseMonitor(**{option: value})  # type: ignore[arg-type]


def test_options_come_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICK, "--collapse.every_n_steps", "7", "--print_config"])
    printed = capsys.readouterr().out
    assert "class_path: simclr_pl.callbacks.CollapseMonitor" in printed
    assert "every_n_steps: 7" in printed
