"""The completion script, asked in a real shell."""

import shutil
import subprocess
from pathlib import Path

import pytest

from simclr_pl.cli import _VERBS, main
from simclr_pl.presets import preset_files

# Calls the function that `complete` names, as bash does when Tab is pressed.
ASK = """
ask() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  $function simclr "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
  echo ${COMPREPLY[@]}
}
set -- $(complete -p simclr)
while [ "$1" != -F ]; do shift; done
function=$2
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "simclr.bash"
    with pytest.MonkeyPatch.context() as patch, open(file, "w") as out:
        patch.setattr("sys.stdout", out)
        main(["completion", "bash"])
    return file


def completions(script: Path, *words: str) -> set[str]:
    line = " ".join(f"'{word}'" for word in words)
    code = f"source {script}\n{ASK}\nask {line}"
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, timeout=20, cwd=script.parent
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_verbs_options_and_choices_are_completed(script: Path) -> None:
    assert completions(script, "simclr", "") == set(_VERBS)
    assert completions(script, "simclr", "fi") == {"fit", "finetune"}
    assert completions(script, "simclr", "data", "") == {"check", "info", "stats", "pack"}
    assert completions(script, "simclr", "fit", "--model.temp") == {"--model.temperature"}
    assert completions(script, "simclr", "fit", "--model.lr_scaling", "") == {
        "linear",
        "sqrt",
        "none",
    }
    assert completions(script, "simclr", "linear", "RUN", "--method", "") == {"lbfgs", "sgd"}
    assert completions(script, "simclr", "data", "pack", "--format", "a") == {"arrow"}
    assert completions(script, "simclr", "completion", "") == {"bash", "zsh"}


def test_a_config_is_completed_by_names_and_files(script: Path) -> None:
    (script.parent / "cifar-mine.yaml").write_text("")
    names = {name for name in preset_files() if name.startswith("cifar")}
    found = completions(script, "simclr", "fit", "--config", "cifar")
    assert found == names | {"cifar-mine.yaml"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_takes_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "zsh"])
    (tmp_path / "_simclr").write_text(capsys.readouterr().out)
    done = subprocess.run(["zsh", "-n", tmp_path / "_simclr"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
