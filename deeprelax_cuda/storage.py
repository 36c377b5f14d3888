"""Files that are there as a whole or not at all, in folders that one process at a time works in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if os.name == "posix":
    import fcntl


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Have ``folder``, which exists, for this process alone. The claim ends with the process, however that ends.

    It holds against processes on the same system that claim too, where the system and the file system know locks.

    Raises:
        BlockingIOError: another process has it.
    """
    if os.name != "posix":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems have no locks for folders
            pass
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, and what a process that was killed left of a newer one."""
    for leftover in (path, _temporary(path)):
        leftover.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write a file by write, fsync and rename: whatever happens meanwhile, ``path`` is the old file or the new one."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name is on the disk when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")
