"""Checkpoint files that know whether they are whole: a line of text, the SHA-256 of the rest, and the rest by torch.save."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from deeprelax_cuda import storage
from deeprelax_cuda.cli import UsageError

MAGIC = b"deeprelax train checkpoint 2\n"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write what `read` gives back: tensors, numbers, strings, and containers of them."""
    buffer = BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()
    storage.write(path, MAGIC + hashlib.sha256(body).digest() + body)


def read(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, its tensors on the CPU.

    Raises:
        UsageError: no such file, one that is no checkpoint, or one that is not whole; in one line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    if not content.startswith(MAGIC):
        raise UsageError(f"{path}: not a checkpoint of this version of deeprelax train")
    body = content[len(MAGIC) + hashlib.sha256().digest_size :]
    if content != MAGIC + hashlib.sha256(body).digest() + body:
        raise UsageError(f"{path}: damaged: it is not what was written (its SHA-256 differs)")
    try:
        read: dict[str, Any] = torch.load(BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UsageError(f"{path}: torch {torch.__version__} cannot read it: {str(error).splitlines()[0]}") from error
    return read


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Refuse, in one line, the content of a whole checkpoint that the block cannot use: another version wrote it.

    Raises:
        UsageError: in place of what the block raised.
    """
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"--resume: {path} does not fit this version of deeprelax train: {said}") from error
