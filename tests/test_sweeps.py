"""The sweep that comes with the package, and the loops of docs/sweeps.md, give commands that run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils

from simclr_pl.cli import main

ROOT = Path(__file__).parents[1]
QUICK = ["--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false"]


def test_each_set_of_values_is_a_command_that_runs(tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "configs/sweeps/temperature.yaml").read_text())
    values = {key: {"value": given["values"][0]} for key, given in sweep["parameters"].items()}
    parts = utils.create_sweep_command_args({"args": values})
    parts["program"] = [sweep["program"]]
    words = []
    for word in utils.create_sweep_command(sweep["command"]):  # as wandb's agent fills it
        name = word.removeprefix("${").removesuffix("}") if word.startswith("${") else None
        words += [word] if name is None else parts[name]
    assert words[:2] == ["simclr", "fit"]
    assert "--model.temperature=0.05" in words
    main([*words[1:], *QUICK, "--trainer.default_root_dir", str(tmp_path)])
    assert sweep["metric"]["name"] == "summary/linear_top1"


@pytest.mark.parametrize("loop", [0, 1])
def test_the_loops_of_the_page_give_different_commands_that_run(loop: int, tmp_path: Path) -> None:
    page = (ROOT / "docs/sweeps.md").read_text()
    script = re.findall(r"```bash\n(for .*?done\n)```", page, re.DOTALL)[loop]
    shown = 'simclr() { printf "%q " "$@"; echo; }\n' + script
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True)
    commands = done.stdout.splitlines()
    assert len(set(commands)) == 3
    main([*shlex.split(commands[-1]), *QUICK, "--trainer.default_root_dir", str(tmp_path)])
