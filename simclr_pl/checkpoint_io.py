"""Checkpoint files that a kill or a full disk cannot tear, and that run nothing when they are read."""

import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from simclr_pl.durable import flush, publish, temporary_of
from simclr_pl.errors import InputError

_MAX_FAILURES = 3  # saves in a row


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place, makes sure of it, and moves it there in one step.

    Whatever kills the process, each name in the folder is the old or the new file, whole. A save that
    fails is a warning, and nothing is removed until a later one succeeds; `SafeModelCheckpoint` ends the
    run where too many fail in a row. Files in object stores, which show none that is incomplete, are
    written by Lightning.

    Attributes:
        failures: saves that failed since the last one that did not.
        reason: of the last failure.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.reason = ""
        self._newest: Path | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint; a warning where that fails.

        Args:
            checkpoint: plain values and tensors.
            path: of the file.
            storage_options: Lightning's, for object stores; must be None.
        """
        try:
            if "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                write_checkpoint(checkpoint, Path(path))
        except Exception as error:  # of the disk, of torch, of what cannot be read back
            # Not raised: only rank 0 writes, and the others would wait for it for ever.
            self.failures += 1
            self.reason = f"{str(path)!r}: {_first_line(error)}"
            warnings.warn(
                f"THE CHECKPOINT WAS NOT SAVED (failure {self.failures} in a row): {self.reason}. "
                "The previous one is kept and training goes on. Free space, or make the folder "
                "writable.",
                stacklevel=2,
            )
            return
        self.failures = 0
        self._newest = Path(path).absolute()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, from the disk, an object store or the web, and runs nothing it holds.

        Args:
            path: of the file, or its address.
            map_location: as `torch.load` has it; by default the CPU.
            weights_only: must not be False.

        Raises:
            InputError: it holds more than plain values and tensors, or ``weights_only`` is False.
        """
        if weights_only is False:
            raise InputError(
                "`weights_only` must be true, or a checkpoint could run any code; got false. Leave "
                "`weights_only` out."
            )
        try:
            return super().load_checkpoint(path, map_location or _on_cpu, weights_only=True)
        except (FileNotFoundError, InputError):
            raise
        except Exception as error:  # unpickling fails in many ways
            raise InputError(
                "a checkpoint must be whole, of plain values and tensors alone; got "
                f"{str(path)!r}: {_first_line(error)} Give another file."
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint that there is a newer one for; links to it lead to that from now on."""
        if self.failures:
            return
        file = Path(path).absolute()
        if self._newest is not None and self._newest.parent == file.parent:
            for link in file.parent.glob("*.ckpt"):
                if link.is_symlink() and link.resolve() == file.resolve():
                    make_link(link, self._newest)
        super().remove_checkpoint(path)


class SafeModelCheckpoint(ModelCheckpoint):
    """ModelCheckpoint on `SafeCheckpointIO`, with the same options.

    A save that failed leaves no trace in its books: the best and the last file are those that exist. All
    ranks know of it, and stop together after three in a row.

    Raises:
        InputError: three saves in a row have failed.
    """

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._true_books(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._true_books(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    @contextmanager
    def _true_books(self, trainer: Trainer) -> Iterator[None]:
        before = {**vars(self), "best_k_models": dict(self.best_k_models)}
        yield
        ours = trainer.strategy.checkpoint_io
        failed = (ours.failures, ours.reason) if isinstance(ours, SafeCheckpointIO) else (0, "")
        failures, reason = trainer.strategy.broadcast(failed)
        if failures:
            vars(self).update(before)
        if failures >= _MAX_FAILURES:
            raise InputError(
                f"checkpoints must be saved; got {failures} failures in a row, the last one of "
                f"{reason}. Free space, or set `trainer.default_root_dir`."
            )

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """As Lightning's, but at all times to a file that is there, and without an end of the run."""
        file, link = Path(filepath).absolute(), Path(linkpath).absolute()
        if trainer.is_global_zero and file != link and file.exists():
            try:
                make_link(link, file)
            except OSError as error:  # rank 0's alone
                warnings.warn(
                    f"{str(link)!r} does not lead to {file.name!r}: {error}.", stacklevel=2
                )
        trainer.strategy.barrier()


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that its name is at all times the old file or the new one, whole.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
        Exception: what was written cannot be read back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    unfinished = temporary_of(path)
    try:
        torch.save(checkpoint, unfinished)
        flush(unfinished)
        saved = torch.load(unfinished, map_location="cpu", mmap=True, weights_only=True)
        if saved.keys() != checkpoint.keys():
            raise OSError("what was read back is not what was written")
        publish(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole and loads with ``weights_only=True``.

    Newer ones that do not are renamed to ``*.ckpt.damaged``, with a warning; what a killed save left is
    removed. Links are passed over: what they lead to counts.

    Returns:
        Its path, or None where there is none.
    """
    remove_unfinished(folder)
    times = {}
    for file in folder.glob("*.ckpt"):
        with suppress(FileNotFoundError):  # set aside by another rank just now
            if not file.is_symlink():
                times[file] = (file.stat().st_mtime_ns, file.name)
    for file in sorted(times, key=times.__getitem__, reverse=True):
        reason = damage(file)
        if reason is None:
            return file
        aside = _free_name(file.with_name(f"{file.name}.damaged"))
        with suppress(FileNotFoundError):  # another rank was first
            file.rename(aside)
        warnings.warn(
            f"the checkpoint {str(file)!r} cannot be used ({reason}); it is now {aside.name!r}, and an "
            "older one is taken.",
            stacklevel=2,
        )
    return None


def damage(file: Path) -> str | None:
    """What keeps a file from being a checkpoint, read in full; None for a good one."""
    try:
        with zipfile.ZipFile(file) as archive:
            if (entry := archive.testzip()) is not None:  # torch does not look at the check sums
                return f"{entry} is not what was written"
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        return _first_line(error)
    if not isinstance(content, dict) or "state_dict" not in content:
        return "it holds no weights"
    return None


def remove_unfinished(folder: Path) -> None:
    """Removes what killed saves left in a folder, which one run at a time may write to."""
    for file in folder.glob(temporary_of(Path("*.ckpt")).name):
        file.unlink(missing_ok=True)


def make_link(link: Path, target: Path) -> None:
    """Makes or turns a relative symbolic link, which at all times leads to the old or the new target."""
    if link.is_symlink() and link.resolve() == target.resolve():
        return
    new = temporary_of(link)
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target, link.parent))
    publish(new, link)


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{n or ''}") for n in range(10**6))
    return next(name for name in names if not name.exists())


def _on_cpu(storage: Any, place: str) -> Any:
    return storage


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
