"""The files of `configs/cluster`: what they start, and when it is started again.

Small programs stand in for the commands of SLURM. `torchrun.sh` is run by test_two_hosts.py.
"""

import csv
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import processes_of

from simclr_pl.cli import main

FOLDER = Path(__file__).parents[1] / "configs/cluster"
PREEMPTED, LOST, KILLED = 85, 75, 137
STAND_IN = '#!/bin/sh\nprintf "%s\\n" "$@" > {name}.txt\nexit {code}\n'
JOB = {"SLURM_JOB_ID": "12", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
ARRAY = {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "13", "SLURM_ARRAY_TASK_ID": "3"}


def submit(folder: Path, code: int, *arguments: str, **environment: str) -> int:
    """Runs the script as SLURM does, from a copy; the stand-ins write down what they are asked for."""
    for name, end in (("srun", code), ("scontrol", 0)):
        program = folder / name
        program.write_text(STAND_IN.format(name=name, code=end))
        program.chmod(0o755)
    script = shutil.copy(FOLDER / "slurm.sbatch", folder / "slurm_script")
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(script), *arguments]
    environment = {**path, **JOB, **environment}
    return subprocess.run(command, cwd=folder, env=environment, timeout=20).returncode


def asked(folder: Path, name: str) -> list[str]:
    file = folder / f"{name}.txt"
    return file.read_text().splitlines() if file.is_file() else []


@pytest.mark.parametrize("code", [PREEMPTED, LOST, KILLED])
def test_a_job_that_may_go_on_is_queued_again(code: int, tmp_path: Path) -> None:
    assert submit(tmp_path, code, "run.yaml", SLURM_RESTART_COUNT="99") == code
    assert asked(tmp_path, "scontrol") == ["requeue", "12"]


@pytest.mark.parametrize(("code", "restarts"), [(0, "0"), (1, "0"), (2, "0"), (PREEMPTED, "100")])
def test_a_job_that_is_done_or_wrong_is_not_queued_again(
    code: int, restarts: str, tmp_path: Path
) -> None:
    assert submit(tmp_path, code, "run.yaml", SLURM_RESTART_COUNT=restarts) == code
    assert asked(tmp_path, "scontrol") == []


def test_tasks_run_the_configuration_on_all_gpus_under_the_jobs_name(tmp_path: Path) -> None:
    submit(tmp_path, 0, "run.yaml", "--data.source.root", "a b", SLURM_CPUS_PER_TASK="6")
    command = asked(tmp_path, "srun")
    assert "--cpus-per-task=6" in command
    assert " ".join(command[command.index("simclr") :]) == (
        "simclr fit --config run.yaml --resume auto --trainer.num_nodes 2 --trainer.devices 8 "
        "--name=slurm-12 --data.source.root a b"
    )
    assert command[-1] == "a b"


def test_tasks_of_an_array_have_names_and_seeds_of_their_own(tmp_path: Path) -> None:
    submit(tmp_path, 0, "run.yaml", **ARRAY)
    assert asked(tmp_path, "srun")[-2:] == ["--name=slurm-13_3", "--seed_everything=3"]


def test_slurm_tells_the_tasks_not_the_script_and_appends_to_the_output() -> None:
    options = (FOLDER / "slurm.sbatch").read_text().splitlines()
    for option in ("--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}" in options


def container() -> dict[str, Any]:
    _, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return found


CONFIG = """
name: run
model:
  encoder: {class_path: simclr_pl.ConvEncoder, init_args: {width: 4, in_channels: 1}}
data: {source: {class_path: simclr_pl.data.Digits}, global_batch_size: 64, bank_size: 30}
trainer: {max_epochs: 1, limit_train_batches: 4, log_every_n_steps: 1, accelerator: cpu}
pictures: null
summary: null
"""


def be_a_pod(folder: Path) -> None:
    """Has the variables of the file's container, and no others."""
    values = {
        "MASTER_ADDR": os.environ["MASTER_ADDR"],
        "MASTER_PORT": os.environ["MASTER_PORT"],
        "NODE_RANK": os.environ["RANK"],
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        del os.environ[name]
    os.environ.update(
        {variable["name"]: values[variable["name"]] for variable in container()["env"]}
    )
    os.chdir(folder)
    log = os.open(f"log_{values['NODE_RANK']}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _, *command = container()["command"]
    here = ["--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    main([*command, *container()["args"], *here])


def test_pods_find_each_other_by_the_variables_of_the_kubernetes_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    pods = processes_of(2, be_a_pod, tmp_path)
    for pod in pods:
        pod.join(60)
    logs = [(tmp_path / f"log_{rank}.txt").read_text() for rank in (0, 1)]
    assert [pod.exitcode for pod in pods] == [0, 0], logs
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in logs[1]
    (table,) = tmp_path.glob("runs/run/version_*/metrics.csv")  # one run, not two
    with table.open() as file:
        assert sum(bool(row["train/loss"]) for row in csv.DictReader(file)) == 4


def test_pods_that_were_asked_to_stop_or_lost_another_are_replaced_without_being_counted() -> None:
    _, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    codes, disruption = job["spec"]["podFailurePolicy"]["rules"]
    assert (codes["action"], disruption["action"]) == ("Ignore", "Ignore")
    assert codes["onExitCodes"]["values"] == [LOST, PREEMPTED]
    assert codes["onExitCodes"]["containerName"] == container()["name"]
