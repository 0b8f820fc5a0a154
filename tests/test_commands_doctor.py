"""The doctor measures what it says, finds what is wrong, and its forecasts are those of the run."""

import contextlib
import io
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_data, tiny_model, tiny_trainer
from trained import QUICKSTART, digits_folder

from simclr_pl.callbacks import EvaluationPace
from simclr_pl.cli import main
from simclr_pl.doctor import machine, plan, sample, step
from simclr_pl.doctor.children import in_children
from simclr_pl.doctor.configured import Kind, build, kinds_of
from simclr_pl.doctor.ranks import check_ranks

SMALL = ["--config", QUICKSTART, "--model.encoder.width", "4", "--trainer.accelerator", "cpu"]


def doctor(*arguments: str) -> tuple[int, dict[str, str], str]:
    """Exit code, lines by their names (several of one name joined), and all that was printed."""
    out = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out):
        try:
            main(["doctor", *arguments])
        except SystemExit as error:
            code = error.code
    lines: dict[str, str] = {}
    for line in out.getvalue().splitlines():
        if (level := line[:9].strip()) in ("ok", "warning", "error"):
            name = line[9:24].strip()
            lines[name] = f"{lines.get(name, '')}{level}: {line[24:]}\n"
    return int(code or 0), lines, out.getvalue()


# The command.


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str], Path]:
    folder = tmp_path_factory.mktemp("doctor")
    before = Path.cwd()
    os.chdir(folder)
    try:
        code, lines, _ = doctor(*SMALL, "--trainer.devices", "2", "--seconds", "30")
    finally:
        os.chdir(before)
    return code, lines, folder


def test_a_sound_config_has_no_error_and_leaves_nothing_behind(
    on_two_ranks: tuple[int, dict[str, str], Path],
) -> None:
    code, lines, folder = on_two_ranks
    assert code == 0, lines
    assert list(folder.iterdir()) == []
    expected = {
        "versions",
        "devices",
        "precision",
        "memory",
        "run folder",
        "ranks",
        "data",
        "sample",
    }
    assert expected | {"batch", "learning rate", "steps", "loader", "time", "disk"} <= lines.keys()


def test_lines_say_the_numbers_of_the_config(
    on_two_ranks: tuple[int, dict[str, str], Path],
) -> None:
    _, lines, _ = on_two_ranks
    assert "2 rank(s) on this machine, gloo: all-gather and all-reduce are right" in lines["ranks"]
    assert "1,347 images to learn from" in lines["data"]
    assert "1 channel(s), 10 classes" in lines["data"]
    assert lines["batch"].startswith("ok: 64 images a rank")
    assert "measured" in lines["batch"]
    assert "AdamW, peak 0.004; 60 steps of warm-up" in lines["learning rate"]
    assert "600 steps, 60 epochs of 10" in lines["steps"]


def test_without_a_config_the_machine_is_checked_and_more_is_offered() -> None:
    code, lines, text = doctor()
    assert code == 0
    assert lines.keys() <= {"versions", "devices", "precision", "memory", "shared memory"}
    assert torch.__version__ in lines["versions"]
    assert "--config" in text.splitlines()[-1]


def test_what_is_wrong_with_a_config_is_an_error_line(tmp_path: Path) -> None:
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    bad, unknown = tmp_path / "bad.yaml", tmp_path / "unknown.yaml"
    bad.write_text("data: [unclosed\n")
    config["model"]["encoder"]["class_path"] = "simclr_pl.NoSuchEncoder"
    unknown.write_text(yaml.safe_dump(config))
    for file, word in (
        (bad, "parsing"),
        (unknown, "NoSuchEncoder"),
        (tmp_path / "no.yaml", "no.yaml"),
    ):
        code, lines, text = doctor("--config", str(file))
        assert code == 1
        assert lines["config"].startswith("error: ")
        assert word in lines["config"]
        assert "Traceback" not in text


def test_an_unknown_option_is_a_wrong_command_line() -> None:
    assert doctor(*SMALL, "--nonsense", "3")[0] == 2
    assert doctor("--seconds", "0")[0] == 2


def test_a_missing_folder_and_a_batch_that_does_not_divide_are_errors() -> None:
    source = ["--data.source", "ImageFolder", "--data.source.root", "no/such/folder"]
    source += ["--data.source.grey", "true", "--data.augment", "simclr_pl.augment.simclr_cifar"]
    code, lines, _ = doctor(*SMALL, *source, "--seconds", "2")
    assert code == 1, lines
    assert lines["data"].startswith("error: `data.source.root` must be a folder of images")
    assert lines["batch"].startswith("ok: 128 images a rank")
    code, lines, text = doctor(*SMALL, "--trainer.devices", "3", "--data.global_batch_size", "100")
    assert code == 1
    assert lines["batch"].startswith("error")
    assert "--data.global_batch_size 102" in text


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--help"])
    assert left.value.code == 0
    assert "simclr doctor --config quickstart" in capsys.readouterr().out


# Children.


def _obey(send: Any, rank: int, order: str) -> None:
    send(f"{rank}: {order}")
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "hang":
        time.sleep(60)
    if order == "raise":
        raise RuntimeError("no luck\nat all")


def test_children_that_die_hang_or_raise_are_survived_and_what_they_sent_is_kept() -> None:
    for order, seconds, ending in (
        ("die", 60, "was killed"),
        ("hang", 1, "took longer than 1 s"),
        ("raise", 60, "RuntimeError: no luck"),
        ("finish", 60, ""),
    ):
        in_children(1, _obey, "finish", seconds=60)  # the server is up: 1 s is enough
        (outcome,) = in_children(1, _obey, order, seconds=seconds)
        assert outcome.messages == ([f"0: {order}"]), order
        assert outcome.ending.startswith(ending), order
        assert bool(outcome.ending) == bool(ending)


def test_ranks_that_hang_are_an_error() -> None:
    line = check_ranks(2, 1, "cpu", seconds=0.01)
    assert line.level == "error"
    assert "took longer" in line.text
    assert line.remedy


# The data.


def test_memory_is_that_of_the_largest_views_of_any_epoch() -> None:
    kinds = []
    for side in (40, 16):
        augment = f'{{"class_path": "simclr_pl.augment.digits", "init_args": {{"size": {side}}}}}'
        cli = build([*SMALL, "--data.augment_until", f'{{"9": {augment}}}'])
        assert [cli.datamodule.augment_at(epoch).size for epoch in (8, 9)] == [side, 32]
        kinds += kinds_of(cli, 1)
    assert kinds == [Kind(2, (1, 40, 40)), Kind(2, (1, 32, 32))]


def look_at(folder: Path, **options: Any) -> dict[str, Any]:
    sent: list[dict[str, Any]] = []
    arguments = [*SMALL, "--config", str(folder.with_suffix(".yaml"))]
    for key, value in options.items():
        arguments += [f"--data.{key}", str(value)]
    threads = torch.get_num_threads()
    sample.look(sent.append, 0, arguments, 256, 5.0)
    torch.set_num_threads(threads)
    return {key: value for part in sent for key, value in part.items()}


def test_unreadable_images_of_a_sample_are_named_and_judged_by_the_share_allowed(
    tmp_path: Path,
) -> None:
    digits_folder(tmp_path / "set")
    files = sorted((tmp_path / "set" / "train").rglob("*.png"))
    for file in files[:6]:
        file.write_bytes(file.read_bytes()[:40])
    found = look_at(tmp_path / "set")
    assert found["sample"] == found["images"]["train"] == 60
    assert {Path(name).name for name, _ in found["unreadable"]} == {f.name for f in files[:6]}
    counts, judged = sample.lines_of(found, 0.05, 32)
    assert (counts.level, judged.level) == ("ok", "error")
    assert "6 cannot be read" in judged.text
    assert "simclr data check" in judged.remedy
    assert sample.lines_of(found, 0.2, 32)[1].level == "warning"
    assert sample.lines_of(found, 0.2, 61)[0].level == "error"  # less than a global batch


def test_a_sample_tells_how_the_whole_set_is_kept(tmp_path: Path) -> None:
    digits_folder(tmp_path / "set")
    kept = look_at(tmp_path / "set")
    assert kept["kept"]
    assert kept["bytes"] == 60 * 32 * 32
    assert not look_at(tmp_path / "set", resident="none")["kept"]
    assert kept["loading"] > 0
    assert kept["staging"] > 0


def test_a_set_without_labels_is_a_warning() -> None:
    found = {
        "source": "X",
        "opened": 0.0,
        "images": {"train": 9, "bank": 9, "query": 1},
        "bank": 9,
        "labelled": 0,
        "classes": 0,
        "unit": "images",
        "is_of_images": True,
        "channels": 3,
    }
    assert [line.level for line in sample.lines_of(found, 0.05, 8)] == ["warning"]


# A step.

ONE = [Kind(2, (1, 32, 32))]  # what the views of a digit are like


def test_memory_and_time_of_a_step_are_carried_on_as_they_grow() -> None:
    arguments = [*SMALL, "--model.encoder.width", "16"]
    shares = []
    for _ in range(3):  # beside other work an allocator may keep more of the steps before
        (outcome,) = in_children(1, step.measure, arguments, ONE, 512, 2**34, 60.0, 1, seconds=90)
        assert outcome.ending == ""
        about, *tried = outcome.messages
        measured = [step.Measured(*m) for m in tried]
        forecast = step.carry_on(measured[:-1], 512, None, 0)
        idle, whole = measured[0].peak, measured[-1].peak
        shares.append((forecast.peak - idle) / (whole - idle))
    assert sorted(shares)[1] == pytest.approx(1, rel=0.25)
    model = build(arguments).model
    weights = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = 2 * sum(4 * p.numel() for p in trained)
    steps = 4 * len(trained)
    assert about["checkpoint"] == weights + moments + steps
    assert about["rate"] == 0.004
    assert [m.samples for m in measured] == [0, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert not forecast.measured
    assert step.carry_on(measured, 512, None, 0).peak == whole


def test_no_batch_is_tried_that_would_take_more_memory_than_allowed() -> None:
    (outcome,) = in_children(1, step.measure, SMALL, ONE, 128, 1, 60.0, 1, seconds=90)
    tried = [m[0] for m in outcome.messages[1:]]
    assert tried == [0, 2]


def grown(fixed: int, each: int, *counts: int) -> list[step.Measured]:
    return [step.Measured(n, n * 0.5, fixed + n * each) for n in counts]


def test_a_batch_that_does_not_fit_is_given_a_chunk_that_does_and_its_double_does_not() -> None:
    fixed, each, images = 1000, 500, 4096
    tried = grown(fixed, each, 0, 2, 4, 8)
    asked = step.Asked(images, [Kind(2, (1, 1, 1))], None, 200_000)
    line, forecast = step.fit_line(tried, "", asked)
    assert line.level == "error"
    assert forecast is not None
    assert forecast.peak == fixed + images * each
    assert forecast.seconds == images * 0.5
    chunk = int(line.remedy.split("encode_chunk ")[1].split(":")[0])
    for rows, fits in ((chunk, True), (2 * chunk, False)):
        peak = step.carry_on(tried, images, rows // 2, asked.one_input).peak
        assert (peak <= 0.8 * asked.memory) == fits


def test_a_chunk_is_counted_in_memory_and_time() -> None:
    tried = grown(1000, 500, 0, 2, 4)
    forecast = step.carry_on(tried, 64, 8, 10)
    assert forecast.peak == 1000 + 8 * 500 + 56 * 10
    assert forecast.seconds == pytest.approx(32 * 4 / 3)
    beyond = [*tried, step.Measured(8, 4.0, 5000), step.Measured(16, 8.0, 5100)]
    assert step.carry_on([*beyond, step.Measured(32, 16.0, 5900)], 64, 8, 10).peak == 5900 + 32 * 50


def test_a_step_that_is_killed_is_an_error_with_what_was_reached() -> None:
    asked = step.Asked(64, [Kind(2, (1, 8, 8))], None, 10**6)
    line, forecast = step.fit_line(grown(1000, 10, 0, 2, 4), "was killed", asked)
    assert line.level == "error"
    assert "beyond 4 the step was killed" in line.text
    assert forecast is not None
    assert step.fit_line([], "was killed", asked)[0].level == "error"


# The plan.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_train_batches": 0.5, "accumulate_grad_batches": 3},
        {"limit_train_batches": 7, "accumulate_grad_batches": 2, "max_epochs": 3},
        {"max_steps": 5},
    ],
)
def test_length_is_what_lightning_trains_for(options: dict[str, Any]) -> None:
    trainer = tiny_trainer([], **{"limit_train_batches": 1.0, "limit_val_batches": 0, **options})
    model, data = tiny_model(), tiny_data(global_batch_size=64)
    model.warmup_epochs = 0.5
    data.setup()
    length = plan.length_of(trainer, model, len(data.samples("train")), 64)
    seen: list[float] = []
    trainer.strategy._lightning_module = model
    trainer.fit_loop.run = lambda: seen.append(trainer.estimated_stepping_batches)  # type: ignore[method-assign]
    trainer.fit(model, datamodule=data)
    assert seen == [length.steps]
    assert length.warmup == round(
        0.5 * trainer.num_training_batches / trainer.accumulate_grad_batches
    )


def test_rates_and_disk_are_judged(tmp_path: Path) -> None:
    cli = build([*SMALL, "--model.lr_scaling", "sqrt", "--trainer.max_epochs", "60"])
    about = {"optimizer": "LARS", "rate": 0.1}
    line = plan.rate_line(plan.Length(600, 10, 60), cli.model, 256, about)
    assert line.level == "ok"
    assert "peak 1.6 (base 0.1 x 16, sqrt in 256)" in line.text
    never = plan.rate_line(plan.Length(60, 10, 60), cli.model, 256, about)
    assert never.level == "warning"
    assert "--model.warmup_epochs 0.6" in never.remedy
    assert plan.rate_line(plan.Length(None, 10, 60), cli.model, 256, about).level == "error"
    length, free = plan.Length(600, 10, 60), shutil.disk_usage(tmp_path).free
    assert plan.disk_line(tmp_path, cli.trainer, length, 10**6).level == "ok"
    assert plan.disk_line(tmp_path, cli.trainer, length, free // 3).level in ("warning", "error")
    line = plan.disk_line(tmp_path / "not" / "yet", cli.trainer, length, free)
    assert line.level == "error"
    assert "2 checkpoints" in line.text


def test_all_checkpoints_are_counted_where_all_are_kept(tmp_path: Path) -> None:
    keep = ["--checkpoint.save_top_k", "-1", "--checkpoint.save_last", "true"]
    cli = build([*SMALL, *keep])  # every 10 of 60 epochs
    line = plan.disk_line(tmp_path, cli.trainer, plan.Length(600, 10, 60), 10)
    assert "7 checkpoints" in line.text


def test_evaluations_are_counted_as_the_trainer_paces_them() -> None:
    length = plan.Length(600, 10, 60)
    cli = build(SMALL)  # every 10 epochs; baselines and the end are scored, too
    assert plan.evaluations(cli.trainer, cli.datamodule, length, 1797) == 8
    cli = build([*SMALL, "--trainer.check_val_every_n_epoch", "null"])
    assert any(isinstance(c, EvaluationPace) for c in cli.trainer.callbacks)
    # 1,797 forward passes of 1 % of 10 x 128 x 2 x 3: every 24 epochs
    assert plan.evaluations(cli.trainer, cli.datamodule, length, 1797) == 2 + 3
    cli = build([*SMALL, "--trainer.limit_val_batches", "0", "--summary", "null"])
    assert plan.evaluations(cli.trainer, cli.datamodule, length, 1797) == 0


def test_workers_work_beside_a_gpu_and_share_a_cpu() -> None:
    beside = plan.Speed(step=1.0, loading=4.0, staging=0.0, workers=2, on_cpu=False)
    assert beside.total == 2.0
    assert plan.loader_line(beside, 8).level == "warning"
    assert beside._replace(workers=8).total == 1.0
    assert plan.loader_line(beside._replace(workers=8), 8).level == "ok"
    assert beside._replace(on_cpu=True, staging=0.5).total == 3.5


def test_a_run_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert plan.write_line(tmp_path / "file" / "runs").level == "error"
    assert plan.write_line(tmp_path / "new" / "runs").level == "ok"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


# The machine.


def test_a_precision_that_is_slow_here_is_a_warning() -> None:
    speeds = {"bf16": 2.0, "fp16": 0.01}
    assert machine.precision(speeds).level == "ok"
    assert machine.precision(speeds, "bf16-mixed").level == "ok"
    slow = machine.precision(speeds, "16-mixed")
    assert slow.level == "warning"
    assert "bf16-mixed" in slow.remedy
    assert "32-true" in machine.precision({"bf16": 0.1, "fp16": 0.1}, "bf16-mixed").remedy


def test_shared_memory_that_is_too_small_asks_for_fewer_workers() -> None:
    free = shutil.disk_usage("/dev/shm").free
    assert machine.shared_memory(free // 2, 8).level == "ok"
    short = machine.shared_memory(free * 4, 8)
    assert short.level == "error"
    assert "--data.num_workers 1" in short.remedy or "--data.num_workers 2" in short.remedy
