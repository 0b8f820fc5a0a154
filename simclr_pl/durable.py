"""Files that are at all times the old or the new one, whole, whatever ends the process or the power."""

import os
from pathlib import Path


def temporary_of(file: Path) -> Path:
    """The sibling that is written before it takes the name of ``file``."""
    return file.with_name(f".{file.name}.tmp")


def publish(temporary: Path, file: Path) -> None:
    """Gives a written file its name, in place of what has it; after that, it survives a power cut.

    Args:
        temporary: on the same file system; a file, or a symbolic link.
        file: its name.
    """
    if not temporary.is_symlink():
        flush(temporary)
    os.replace(temporary, file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
