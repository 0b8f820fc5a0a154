"""Results reach the terminal, the JSON file and the tracker's run of the training."""

import json
import time
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import digits_run

from simclr_pl import InputError
from simclr_pl.commands.encoders import load_subject
from simclr_pl.commands.results import percent, publish, result_file, table_of
from simclr_pl.trackers import wandb_run


def test_the_file_lies_beside_the_checkpoint_or_where_it_is_asked_for(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    subject, named = load_subject(str(run)), load_subject("timm/resnet18")
    assert result_file("knn", subject) == run / "checkpoints/last.knn.json"
    assert result_file("knn", named) == Path("timm-resnet18.knn.json")
    assert result_file("knn", subject, "mine.json") == Path("mine.json")
    with pytest.raises(InputError, match=r"must lie in a folder that exists; got 'no/mine\.json'"):
        result_file("knn", subject, "no/mine.json")


def test_publish_prints_writes_and_logs_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = digits_run(tmp_path)
    before = set(run.rglob("*"))
    values = {"top1": 0.5, "images": 3, "interval": (0.25, 0.75)}
    table = table_of("A title", ("", "top-1"), [("trained", percent(0.5, (0.25, 0.75)))])
    publish("knn", load_subject(str(run)), [table, "a remark"], values)
    text = capsys.readouterr().out
    for words in ("A title", "trained", "50.0 [25.0, 75.0]", "a remark", "last.knn.json"):
        assert words in text
    file = run / "checkpoints/last.knn.json"
    found = json.loads(file.read_text())
    assert (found["command"], found["subject"], found["step"]) == ("knn", str(run), 6)
    assert (found["top1"], found["images"], found["interval"]) == (0.5, 3, [0.25, 0.75])
    assert set(run.rglob("*")) - before == {file}
    assert (percent(None), percent(1.0)) == ("-", "100.0")


def test_trackers_continue_the_run_of_the_training(tmp_path: Path) -> None:
    run = digits_run(tmp_path, "--track", "[wandb-offline,tensorboard]")
    wandb.finish()
    (first,) = run.glob("wandb/offline-run-*")
    number = wandb_run(run)
    assert number is not None
    assert first.name.endswith(number)
    subject = load_subject(str(run))
    publish("knn", subject, "", {"top1": 0.25, "n": 3}, None, ["wandb-offline", "tensorboard"])
    assert wandb_run(run) == number
    (second,) = set(run.glob("wandb/offline-run-*")) - {first}
    assert [file.name for file in second.glob("*.wandb")] == [f"run-{number}.wandb"]
    (file,) = second.glob("run-*.wandb")
    deadline = time.monotonic() + 30  # wandb's own process writes, when the machine lets it
    while b"results/knn_top1" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"results/knn_top1" in file.read_bytes()
    assert b"results/knn_n" not in file.read_bytes()
    events = EventAccumulator(str(run))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("results/knn_top1")] == [(6, 0.25)]


def test_the_latest_of_several_wandb_runs_is_continued(tmp_path: Path) -> None:
    assert wandb_run(tmp_path) is None
    for folder, name in (("run-20250102_000000-b", "b"), ("offline-run-20250101_000000-a", "a")):
        (tmp_path / "wandb" / folder).mkdir(parents=True)
        (tmp_path / "wandb" / folder / f"run-{name}.wandb").touch()
    assert wandb_run(tmp_path) == "b"
