"""The command itself: overview, unknown words, interruption; each verb's help."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trained import QUICKSTART, simclr

import simclr_pl
from simclr_pl.cli import _VERBS, main

HEAVY = ("torch", "numpy", "lightning", "jsonargparse", "simclr_pl.training_cli")


def test_the_overview_names_every_verb_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for name, verb in _VERBS.items():
        assert f"\n  {name:12}{verb.text}\n" in text
        assert verb.example.startswith(("simclr ", 'eval "$(simclr '))
        assert f" {verb.example}\n" in text
    main([])
    assert capsys.readouterr().out == text


def test_overview_and_mistakes_import_nothing_heavy() -> None:
    code = (
        "import sys; from simclr_pl.cli import main\n"
        "for words in (['--help'], ['--version'], ['ftt']):\n"
        "    try: main(words)\n"
        "    except SystemExit as leaving: assert leaving.code == 2\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_presets_are_listed_without_torch() -> None:
    code = "import sys; from simclr_pl.cli import main; main(['presets']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_module_is_the_command() -> None:
    done = simclr("--version")
    assert (done.returncode, done.stdout) == (0, f"simclr {simclr_pl.__version__}\n")
    done = simclr("presets", "--nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: simclr presets [NAME] [OPTIONS]\n")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["ftt"], "`simclr` must be followed by a command; got 'ftt'. Did you mean `simclr fit`?"),
        (["zzzz"], "got 'zzzz'. `simclr --help` lists them."),
        (["--config", "x"], "got '--config'. `simclr --help` lists them."),
        (["data", "chek"], "got 'chek'. Did you mean `simclr data check`?"),
    ],
)
def test_an_unknown_word_is_one_line_with_the_nearest(
    words: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith(f"{remedy}\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("verb", [name for name, verb in _VERBS.items() if verb.place])
def test_help_of_a_verb_has_an_example_and_explains_each_option(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"data": ["pack"]}.get(verb, [])
    with pytest.raises(SystemExit) as leaving:
        main([verb, *words, "--help"])
    assert not leaving.value.code
    text = capsys.readouterr().out
    prog = " ".join(["simclr", verb, *words])
    assert text.startswith(f"usage: {prog}")
    assert " ".join(text.split()).count(f"{prog} ") > 1, "no example"
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("  --"):  # explained on the same line or the next
            following = lines[i + 1] if i + 1 < len(lines) else ""
            assert "  " in line.strip() or following.startswith(" " * 20), f"no text: {line}"
        assert len(line) <= 106


def test_help_of_pack_gives_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "pack", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "SRC OUT [OPTIONS]",
        "in pixels",
        "256 suits crops of 224",
        "(default: 90)",
        "litdata",
    ):
        assert words in text


def test_ctrl_c_ends_a_fit_with_one_line_and_130(tmp_path: Path) -> None:
    options = ["--trainer.max_epochs", "1000", "--trainer.default_root_dir", str(tmp_path)]
    options += ["--summary", "null", "--trainer.enable_progress_bar", "false"]
    options += ["--model.encoder.width", "4", "--checkpoint.every_n_epochs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "simclr_pl", "fit", "--config", QUICKSTART, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    folder, deadline = tmp_path / "quickstart/version_0/checkpoints", time.monotonic() + 120
    while not list(folder.glob("*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    assert "KeyboardInterrupt" not in error
