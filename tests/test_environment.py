"""The environment is plain values, hides secrets and knows git."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import simclr_pl
from simclr_pl import environment as module
from simclr_pl.environment import environment


def test_environment_is_json_and_names_this_machine() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["simclr_pl"] == simclr_pl.__version__
    assert "pandas-no-such" not in found["packages"]
    assert found["devices"][0]["kind"] == "cpu"
    assert found["devices"][0]["name"]
    assert found["cpus"] >= 1
    assert found["memory_gib"] > 0
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_secret_arguments_are_masked_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["simclr", "fit", "--x.api_key", "abc", "--token=def", "--data.y", "7", "s3://u:pw@h/b"]
    monkeypatch.setattr(sys, "argv", given)
    expected = "simclr fit --x.api_key *** --token=*** --data.y 7 s3://u:***@h/b"
    assert environment()["command"] == expected


def test_memory_is_what_a_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    whole = environment()["memory_gib"]
    (tmp_path / "memory.max").write_text(f"{2**29}\n")
    assert environment()["memory_gib"] == 0.5 < whole


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def test_git_state_is_that_of_the_working_folder(tmp_path: Path) -> None:
    assert environment()["git"] is None
    git("init", "-b", "trunk")
    assert environment()["git"] is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = environment()["git"]
    assert clean["branch"] == "trunk"
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert environment()["git"]["dirty"] is True
    git("checkout", "--detach")
    assert environment()["git"]["branch"] is None


def test_importing_it_imports_no_lightning() -> None:
    code = "import sys, simclr_pl.environment; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
