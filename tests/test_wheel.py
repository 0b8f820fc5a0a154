"""The wheel: what it holds, and that it runs where there is no checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import simclr_pl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_the_configs_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"simclr_pl-{simclr_pl.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"simclr_pl", info}
    package = ROOT / "simclr_pl"
    sources = {f for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    sources |= set((ROOT / "configs").rglob("*.yaml"))
    assert {str(file.relative_to(ROOT)) for file in sources if package in file.parents} <= names
    assert {f"simclr_pl/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.yaml")} <= names
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_the_quick_start_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(
        [*pip, "--target", str(site), str(wheel)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    # -S leaves out the checkout, which a .pth file of an editable install puts on the path.
    paths = [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}

    def simclr(*words: str) -> str:
        command = [sys.executable, "-S", str(site / "bin/simclr"), *words]
        options = {"cwd": empty, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, timeout=200, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "# simclr fit --config configs/quickstart.yaml" in simclr("presets", "quickstart")
    where = [sys.executable, "-S", "-c", "import simclr_pl; print(simclr_pl.__file__)"]
    found = subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(site / "simclr_pl/__init__.py")
    text = simclr("fit", "--config", "quickstart", "--trainer.fast_dev_run", "true")
    assert "1 steps in " in text
