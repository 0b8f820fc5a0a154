"""The commands `simclr data ...` as a user meets them."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from packing import flip_byte, image_folder, started
from trained import QUICKSTART, digits_run, simclr

from simclr_pl.augment import Augment
from simclr_pl.cli import main
from simclr_pl.data import Digits


def test_data_commands_in_processes_of_their_own(tmp_path: Path) -> None:
    source, out = image_folder(tmp_path / "source", 8), tmp_path / "out"
    (source / "train/ants/bad.jpg").write_bytes(b"bad")
    options = ["--short_side", "20", "--workers", "1"]
    done = simclr("data", "pack", str(source), str(out), *options)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    assert first.startswith("Packed 8 train, 2 query images in 2 shards, ")
    assert second == f"Left out 1 that cannot be read; all are in {out}/index.json:"
    assert third == "  train/ants/bad.jpg: of no known image format"
    flip_byte(out / "query-00000.arrow", b"JFIF")
    done = simclr("data", "check", str(out), "--report", str(tmp_path / "report.json"))
    assert (done.returncode, done.stderr) == (1, "")
    assert f"damaged: {out}/query-00000.arrow: the shard is not what was written" in done.stdout
    assert "damaged: query: test/ants/001.jpg (query-00000.arrow, row 0): its bytes" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["usable"]
    assert report["counts"]["damaged"] == 2
    assert report["findings"][0]["path"] == f"{out}/query-00000.arrow"


def test_data_check_says_yes_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "check", str(image_folder(tmp_path / "source", 8)), "--workers", "0"])
    assert "All images are usable." in capsys.readouterr().out


class Sounds(Digits):
    unit = "sounds"


def parsed(command: str) -> None:
    """Reads the options of a `simclr fit` that was printed, as it would."""
    with pytest.raises(SystemExit) as caught:
        main([*shlex.split(command.removeprefix("simclr ")), "--print_config"])
    assert not caught.value.code


def test_data_check_fixes_a_set_and_says_how_to_train_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = image_folder(tmp_path / "my set", 8), tmp_path / "out"
    (source / "train/ants/bad.jpg").write_bytes(b"bad")
    shutil.copy(source / "test/ants/001.jpg", source / "train/ants/leak.jpg")
    main(["data", "check", str(source), "--fix", str(out), "--tiny", "41", "--workers", "0"])
    text = capsys.readouterr().out
    assert "unreadable: train: train/ants/bad.jpg: of no known image format\n" in text
    leak = "leak: train: train/ants/leak.jpg: the same bytes as test/ants/001.jpg, in query\n"
    assert leak in text
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows[:2] == [["train", "10", "2", "8"], ["query", "2", "0", "2"]]
    assert rows[2:] == [
        ["unreadable", "1", "left out"],
        ["leak", "1", "left out"],
        ["tiny", "10", "kept, to be judged"],
    ]
    *_, wrote, command = text.splitlines()
    size = sum(file.stat().st_size for file in out.rglob("*.*g"))
    assert wrote == (
        f"Wrote {out}: 10 hard links to {size / 1e3:.3g} KB. {out}/cleaning.json lists what is left out."
    )
    assert command == f"Train from it: simclr fit --config imagenet --data.source.root {out}"
    parsed(command.removeprefix("Train from it: "))
    record = json.loads((out / "cleaning.json").read_text())
    asked = {"src": str(source), "fix": str(out), "tiny": 41, "max_pixels": 100_000_000}
    assert record["arguments"] == asked


def test_data_check_fixes_the_set_of_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "pack", str(image_folder(tmp_path / "images", 4)), str(tmp_path / "packed")])
    config = tmp_path / "my.yaml"
    config.write_text(
        f"data:\n  source: {{class_path: Shards, init_args: {{root: {tmp_path}/packed}}}}\n"
    )
    for src, fitting in (
        (str(config), f"simclr fit --config {config}"),
        (f"{tmp_path}/packed", "simclr fit --config imagenet --data.source Shards"),
    ):
        out = tmp_path / Path(src).name.replace(".", "-fixed-")
        out = out.with_name(f"{out.name}-out")
        capsys.readouterr()
        main(["data", "check", src, "--fix", str(out), "--workers", "0"])
        *_, wrote, command = capsys.readouterr().out.splitlines()
        assert wrote.startswith(f"Wrote {out}: 2 shards of ")
        assert command == f"Train from it: {fitting} --data.source.root {out}"
        parsed(command.removeprefix("Train from it: "))


def test_data_check_shows_twenty_images_that_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_folder(tmp_path / "source", 4)
    for i in range(23):
        (source / f"train/ants/empty {i}.jpg").write_bytes(b"")
    main(["data", "check", str(source), "--fix", str(tmp_path / "out"), "--workers", "0"])
    text = capsys.readouterr().out
    assert text.count("empty: train: ") == 20
    assert "and 3 more\n" in text


@pytest.mark.parametrize(
    "source",
    ["Digits", "simclr_pl.data.Digits", QUICKSTART, "quickstart", "packed", "run"],
)
def test_data_stats_takes_any_source(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "packed":
        source = str(tmp_path / "packed")
        main(["data", "pack", "Digits", source, "--workers", "0"])
        capsys.readouterr()
    elif source == "run":
        source = str(digits_run(tmp_path) / "config.yaml")
        capsys.readouterr()
    main(["data", "stats", source, "--workers", "0"])
    comment, *lines = capsys.readouterr().out.splitlines()
    assert comment == f"# {source}: 1,347 training images, 1,379,328 pixels"
    digits = Digits()
    digits.open()
    pixels = digits.train.pixels.double() / 255
    expected = {"mean": [round(pixels.mean().item(), 4)], "std": [round(pixels.std().item(), 4)]}
    assert yaml.safe_load("\n".join(lines)) == expected


def test_data_stats_can_be_pasted_into_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "stats", "Digits", "--max_images", "50", "--workers", "0"])
    table = yaml.safe_load(capsys.readouterr().out)
    augment = Augment(**table)
    assert augment.mean == table["mean"]


def test_data_stats_writes_a_config_and_the_command_that_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats.yaml"
    main(["data", "stats", "Digits", "--workers", "0", "--out", str(out)])
    comment, *lines, last = capsys.readouterr().out.splitlines()
    command = f"simclr fit --config quickstart --config {out}"
    assert last == f"# Train with them: {command}"
    assert out.read_text().splitlines()[:2] == [f"# {command}", comment]
    config = yaml.safe_load(out.read_text())
    assert config == {"data": {"augment": {"init_args": yaml.safe_load("\n".join(lines))}}}
    parsed(command)


def test_data_info_shows_folders_and_packs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_folder(tmp_path / "source", 8)
    main(["data", "pack", str(source), str(tmp_path / "out"), "--shard_mb", "0.004"])
    capsys.readouterr()
    for root in ("source", "out"):
        main(["data", "info", str(tmp_path / root), "--workers", "0"])
        text = capsys.readouterr().out
        (row,) = (line for line in text.splitlines() if "train" in line)
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert (cells[:3], cells[-1]) == (["train", "8", "2"], "50 x 40")
    assert "packed as arrow: " in text
    assert "short_side 256, quality 90, shard_mb 0.004" in text


def test_an_interrupted_pack_ends_at_once_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["data", "pack", str(image_folder(tmp_path / "source", 200)), str(out)]
    process = started(main, [*arguments, "--workers", "1", "--shard_mb", "0.0001"])
    while not list(out.glob("*.arrow")):
        assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(4)
    assert process.exitcode == 130
    assert capfd.readouterr().err.strip().endswith("interrupted")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["check", "nonsense"],
            "`src` must be a folder, a YAML config or its name, or a source (CIFAR10, ",
        ),
        (["check", "no/such/config.yaml"], "a config must be readable; got no/such/config.yaml"),
        (["check", "empty.yaml"], "a config must have `data.source`; got none in empty.yaml"),
        (["check", "wrong.yaml"], "`src` 'wrong.yaml' must describe a source; got: "),
        (["check", "ImageFolder"], "`src` 'ImageFolder' must describe a source; got: "),
        (["check", "Digits", "--fix", "out"], "`fix` takes a folder of images or one packed as"),
        (["stats", "Digits", "--out", "empty.yaml"], "`out` must be a new file in a folder"),
        (["stats", "Digits", "--out", "no/stats.yaml"], "`out` must be a new file in a folder"),
        (
            ["check", "test_data_commands.Sounds", "--fix", "out"],
            "must hold images; got sounds, of Sounds. Train",
        ),
        (["stats", "test_data_commands.Sounds"], "must hold images; got sounds, of Sounds. Train"),
        (["stats", "no.such.Source"], "`src` 'no.such.Source' must describe a source; got: "),
        (["check", "s3://bucket/set"], "an object store needs a local folder"),
        (["pack", "images", "out", "--quality", "0"], "`quality` must be within [1, 100]; got 0"),
        (["info", "images"], "must hold images"),
        (
            ["pack", "Digits", "empty.yaml/out"],
            "must be writable; got Not a directory for 'empty.yaml",
        ),
        (
            ["check", "Digits", "--report", "no/report.json"],
            "`report` must lie in a folder that exists",
        ),
    ],
)
def test_a_mistake_in_a_data_command_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "wrong.yaml").write_text(
        "data:\n  source: {class_path: Digits, init_args: {a: 1}}\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["data", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
