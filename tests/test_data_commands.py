"""The commands `simclr data ...` as a user meets them."""

import json
import os
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
    assert "Every image is usable." in capsys.readouterr().out


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
