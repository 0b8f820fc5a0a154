"""Kills, full disks, damage and hostile files, with real processes and files."""

import http.server
import os
import pickle
import resource
import signal
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks, processes_of
from tiny import tiny_data, tiny_model, tiny_trainer, weights

from simclr_pl.checkpoint_io import (
    SafeCheckpointIO,
    SafeModelCheckpoint,
    damage,
    make_link,
    newest_valid,
    write_checkpoint,
)
from simclr_pl.errors import InputError
from simclr_pl.simclr import SimCLR


def content(step: int, numbers: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((numbers,), float(step))}, "step": step}


def write(path: Path, step: int) -> Path:
    write_checkpoint(content(step), path)
    os.utime(path, (step, step))
    return path


def saves(folder: Path, elsewhere: Path, started: Path) -> None:
    """Saves for ever as `ModelCheckpoint` does, with TMPDIR on another file system."""
    os.environ["TMPDIR"] = str(elsewhere)
    tempfile.tempdir = None
    io, step = SafeCheckpointIO(), 0
    started.touch()
    while True:
        step += 1
        io.save_checkpoint(content(step, 1_000_000), folder / f"{step % 3}.ckpt")
        io.remove_checkpoint(folder / f"{(step - 1) % 3}.ckpt")
        make_link(folder / "last.ckpt", folder / f"{step % 3}.ckpt")


def test_kills_during_saves_tear_nothing_and_leave_nothing(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", Path("/dev/shm")
    folder.mkdir()
    assert elsewhere.stat().st_dev != folder.stat().st_dev
    kills = int(os.environ.get("SIMCLR_TEST_KILLS", "10"))
    torn, halves, generator = [], 0, torch.Generator().manual_seed(0)
    for n in range(kills):
        started = tmp_path / f"started{n}"
        (process,) = processes_of(1, saves, folder, elsewhere, started)
        while not started.exists():
            time.sleep(0.001)
        time.sleep(0.05 * torch.rand((), generator=generator).item())
        process.kill()
        process.join()
        files = list(folder.iterdir())
        halves += any(file.suffix == ".tmp" for file in files)
        found = {file.name: damage(file) for file in files if file.suffix == ".ckpt"}
        torn += [(name, reason) for name, reason in found.items() if reason is not None]
    print(f"{kills} kills, {halves} of them within a save: {len(torn)} torn")
    assert halves  # some hit a save
    assert torn == []
    assert newest_valid(folder) is not None
    assert {file.suffix for file in folder.iterdir()} == {".ckpt"}


def test_a_killed_save_leaves_an_orphan_that_the_next_save_or_start_removes(tmp_path: Path) -> None:
    for removes in (lambda: write(tmp_path / "b.ckpt", 1), lambda: newest_valid(tmp_path)):
        (tmp_path / ".a.ckpt.tmp").write_bytes(b"half")
        (tmp_path / ".last.ckpt.tmp").symlink_to("nowhere")
        removes()
        assert [file.name for file in tmp_path.iterdir()] == ["b.ckpt"]


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "bomb"])
def test_damaged_files_are_set_aside_and_the_older_one_is_taken(tmp_path: Path, harm: str) -> None:
    good, bad = write(tmp_path / "a.ckpt", 1), write(tmp_path / "b.ckpt", 2)
    (tmp_path / "last.ckpt").symlink_to("b.ckpt")
    data = bytearray(bad.read_bytes())
    if harm == "flipped":
        data[data.find(torch.full((4,), 2.0).numpy().tobytes()) + 2] ^= 1
    changed = {"truncated": data[:-700], "flipped": data, "empty": b"", "bomb": bomb(tmp_path)}
    bad.write_bytes(changed[harm])
    with pytest.warns(UserWarning, match="b.ckpt.*cannot be used"):
        assert newest_valid(tmp_path) == good
    assert (tmp_path / "b.ckpt.damaged").read_bytes() == changed[harm]
    assert not (tmp_path / "executed").exists()
    assert newest_valid(tmp_path) == good


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "absent") is None


def full_disk(bytes_free: int) -> None:
    """Makes each file of this process end at a size, as a full disk does, for root, too."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_free, resource.RLIM_INFINITY))


@pytest.fixture
def disk() -> Iterator[None]:
    """Has room again after the test."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("disk")
def test_a_full_disk_warns_and_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    io = SafeCheckpointIO()
    io.save_checkpoint(content(1), tmp_path / "a.ckpt")
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    full_disk(1000)
    for step, name in ((2, "b.ckpt"), (3, "a.ckpt")):
        with pytest.warns(UserWarning, match=rf"NOT SAVED.*{name}.*Free space"):
            io.save_checkpoint(content(step), tmp_path / name)
    full_disk(resource.RLIM_INFINITY)
    io.remove_checkpoint(tmp_path / "a.ckpt")  # as a ModelCheckpoint that believes in its b.ckpt
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 1
    assert io.failures == 2
    io.save_checkpoint(content(4), tmp_path / "c.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert io.failures == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 4


class FullFor(Callback):
    """The disk is full after the first step, for so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1 and self.steps:
            full_disk(1000)
        if trainer.global_step == 1 + self.steps:
            full_disk(resource.RLIM_INFINITY)


def train(folder: Path, steps: int, ranks: int, **options: Any) -> tuple[str, int, dict[str, Any]]:
    """Saves each of 8 steps, on a disk that is full for some; the error, the steps, the books."""
    torch.set_num_threads(1)
    keep = SafeModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last="link", **options)
    trainer = tiny_trainer(
        [FullFor(steps), keep],
        plugins=[SafeCheckpointIO()],
        enable_checkpointing=True,
        use_distributed_sampler=False,
        limit_val_batches=0,
        max_epochs=2,
        **({"strategy": "ddp", "devices": ranks} if ranks > 1 else {}),
    )
    error = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(tiny_model(batch_norm=False), datamodule=tiny_data())
        except InputError as stopped:
            error = str(stopped)
    return error, trainer.global_step, keep.state_dict()


@pytest.mark.parametrize("best", [{}, {"monitor": "step", "mode": "max", "save_top_k": 2}])
def test_three_failures_in_a_row_stop_both_ranks_and_the_first_checkpoint_stays(
    tmp_path: Path, best: dict[str, Any]
) -> None:
    results = on_ranks(2, partial(train, **best), tmp_path, 99, 2)
    for error, steps, books in results:
        assert "got 3 failures in a row" in error
        assert "step=4.ckpt" in error
        assert steps == 4
        assert books["best_model_path"] == str(tmp_path / "step=1.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "step=1.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("weights_only", [False, True])
def test_after_two_failures_training_has_gone_on_and_the_books_name_what_exists(
    tmp_path: Path, weights_only: bool
) -> None:
    options = {"monitor": "step", "mode": "max", "save_top_k": 2, "save_weights_only": weights_only}
    error, steps, books = train(tmp_path, 2, 1, **options)
    assert (error, steps) == ("", 8)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["last.ckpt", "step=7.ckpt", "step=8.ckpt"]
    assert {Path(file).name for file in books["best_k_models"]} == {"step=7.ckpt", "step=8.ckpt"}
    assert Path(books["best_model_path"]).name == "step=8.ckpt"
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert ("optimizer_states" in saved) is not weights_only


@pytest.mark.usefixtures("disk")
def test_the_command_ends_at_a_full_disk_with_one_line_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from simclr_pl.cli import main  # not for the ranks, which import this file each time

    config = tmp_path / "full.yaml"
    config.write_text("""
data: {source: Digits, bank_size: 60, global_batch_size: 64}
model: {encoder: {class_path: simclr_pl.ConvEncoder, init_args: {width: 4, in_channels: 1}}}
checkpoint: {init_args: {every_n_train_steps: 1}}
pictures: null
trainer: {accelerator: cpu, max_steps: 8, enable_progress_bar: false, logger: false,
  callbacks: [{class_path: test_checkpoint_io.FullFor, init_args: {steps: 99}}]}
""")
    with pytest.warns(UserWarning, match="NOT SAVED"), pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config)])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: checkpoints must be saved; got 3 failures in a row")
    last = tmp_path / "runs/simclr/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 1


def test_a_link_that_cannot_be_made_ends_no_rank(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()  # no link can take its place
    for error, steps, books in on_ranks(
        2, partial(train, enable_version_counter=False), tmp_path, 0, 2
    ):
        assert (error, steps) == ("", 8)
        assert books["best_model_path"] == str(tmp_path / "step=8.ckpt")
    assert (tmp_path / "last.ckpt").is_dir()


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.mark}",))


def bomb(folder: Path) -> bytes:
    file = folder.parent / "bomb.bin"
    torch.save({"state_dict": {}, "b": Bomb(folder / "executed")}, file)
    return file.read_bytes()


@pytest.fixture
def address(tmp_path: Path) -> Any:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/zip.ckpt").write_bytes(bomb(tmp_path))
    (tmp_path / "site/raw.ckpt").write_bytes(pickle.dumps(Bomb(tmp_path / "executed"), protocol=2))
    with zipfile.ZipFile(tmp_path / "site/traversal.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}}, protocol=2))
        archive.writestr("archive/version", "3")
        archive.writestr("../executed", "")
        archive.writestr(str(tmp_path / "executed"), "")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "site"))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["zip.ckpt", "raw.ckpt"])
@pytest.mark.parametrize("remote", [False, True])
def test_pickle_bombs_do_not_go_off(
    tmp_path: Path, address: str, name: str, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    path = f"{address}/{name}" if remote else str(tmp_path / "site" / name)
    trainer = tiny_trainer([], plugins=[SafeCheckpointIO()])
    with pytest.raises(InputError, match="plain values"):
        trainer.fit(tiny_model(), datamodule=tiny_data(), ckpt_path=path)
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights"):
        SimCLR.load_from_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["zip.ckpt", "raw.ckpt", "traversal.ckpt"])
@pytest.mark.parametrize("command", ["fit", "fit over http", "knn"])
def test_commands_end_at_hostile_files_with_one_line(
    tmp_path: Path,
    address: str,
    name: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from simclr_pl.cli import main  # not for the ranks, which import this file each time

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    file = tmp_path / "site" / name
    quickstart = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
    arguments = ["fit", "--config", quickstart, "--trainer.enable_progress_bar", "false"]
    arguments += ["--ckpt_path", f"{address}/{name}" if command == "fit over http" else str(file)]
    with pytest.raises(SystemExit) as end:
        main(["knn", str(file)] if command == "knn" else arguments)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: a checkpoint must be")
    assert not (tmp_path / "executed").exists()


def test_weights_only_false_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.ckpt", 1)
    with pytest.raises(InputError, match="weights_only"):
        SafeCheckpointIO().load_checkpoint(file, weights_only=False)


def test_a_resumed_model_is_the_saved_one(tmp_path: Path) -> None:
    keep = SafeModelCheckpoint(tmp_path, save_last="link")
    trainer = tiny_trainer([keep], plugins=[SafeCheckpointIO()], enable_checkpointing=True)
    trainer.fit(tiny_model(), datamodule=tiny_data())
    loaded = SafeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert (tmp_path / "last.ckpt").is_symlink()
    for name, value in weights(trainer.lightning_module).items():
        assert torch.equal(loaded[name], value)
