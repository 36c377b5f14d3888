"""The files of a data set, under a folder that the user names: found, decompressed, checked, read."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from deeprelax_cuda.cli import UsageError

#: How a file may be stored, in the order in which it is looked for.
READERS: dict[str, Callable[[Path], bytes]] = {
    "": Path.read_bytes,
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
}


def find(root: Path | None, data: str, names: Sequence[str], subfolder: str) -> list[Path]:
    """Return where each of the files ``names`` lies: in ``root``, or in the ``subfolder`` of it that other libraries use.

    In a name with a hyphen before "idx", a dot may stand instead.

    Raises:
        UsageError: no folder, or one that lacks a file; names all that are expected.
    """
    expected = f"{', '.join(names)}, each plain, .gz or .xz"
    if root is None:
        raise UsageError(f"--data-root: --data {data} needs the folder with {expected}")
    if not root.is_dir():
        raise UsageError(f"--data-root: {root} is not a folder; expected the one with {expected}")
    found = [_first(root, subfolder, name) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise UsageError(f"--data-root: no {', '.join(missing)} in {root} or its {subfolder}; expected {expected}")
    return [path for path in found if path is not None]


def _first(root: Path, subfolder: str, name: str) -> Path | None:
    folders = (root, root / subfolder)
    spellings = dict.fromkeys((name, name.replace("-idx", ".idx")))
    paths = (folder / f"{spelling}{ending}" for folder in folders for spelling in spellings for ending in READERS)
    return next((path for path in paths if path.is_file()), None)


def read(paths: Sequence[Path]) -> list[bytes]:
    """Return the decompressed content of each file, read side by side: xz gives only about 20 MB/s a core.

    Raises:
        UsageError: a file that cannot be read, is cut off or is damaged.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(_content, paths))


def _content(path: Path) -> bytes:
    reader = READERS.get(path.suffix, Path.read_bytes)
    try:
        return reader(path)
    except EOFError:
        raise UsageError(f"--data-root: {path} is cut off: the compressed stream has no end") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UsageError(f"--data-root: {path} is damaged: {error}") from None
    except OSError as error:
        raise UsageError(f"--data-root: {path} cannot be read: {error.strerror}") from None


def idx(path: Path, content: bytes, shape: Sequence[int]) -> Tensor:
    """Return the unsigned bytes of an IDX file as a tensor of ``shape``.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
    number, the elements in row-major order.

    Raises:
        UsageError: another type, another shape, or a length that is not the header's.
    """
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    if content[:4] != header[:4]:
        raise UsageError(f"--data-root: {path}: expected IDX magic {header[:4].hex()}, got {content[:4].hex() or 'nothing'}")
    if content[: len(header)] != header:
        dims = struct.unpack_from(f">{len(content[4 : len(header)]) // 4}I", content, 4)
        raise UsageError(f"--data-root: {path}: expected dimensions {_by(shape)}, got {_by(dims)}")
    expected = len(header) + math.prod(shape)
    if len(content) != expected:
        raise UsageError(f"--data-root: {path}: expected {expected} bytes, got {len(content)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).view(*shape)


def records(path: Path, content: bytes, count: int, length: int) -> Tensor:
    """Return a file of ``count`` records of ``length`` bytes each as a uint8 tensor of shape (count, length).

    Raises:
        UsageError: another number of bytes.
    """
    if len(content) != count * length:
        expected = f"{count * length} bytes ({count} records of {length})"
        raise UsageError(f"--data-root: {path}: expected {expected}, got {len(content)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(count, length)


def check_labels(path: Path, labels: Tensor, classes: int) -> None:
    """Refuse a label that is not in [0, ``classes``).

    Raises:
        UsageError: the first such label, and the example it belongs to.
    """
    wrong = (labels >= classes).nonzero().flatten().tolist()
    if wrong:
        got = f"got {int(labels[wrong[0]])} at example {wrong[0]}"
        raise UsageError(f"--data-root: {path}: expected labels from 0 to {classes - 1}, {got}")


def digest(contents: Iterable[bytes]) -> str:
    """Return the SHA-256 of all contents, one after the other, in hexadecimal."""
    total = hashlib.sha256()
    for content in contents:
        total.update(content)
    return total.hexdigest()


def content_of(*parts: tuple[Tensor, Tensor]) -> str:
    """Return a SHA-256, in hexadecimal, of the labels and images of each part that their order in the part does not change.

    It is that of the sorted SHA-256 of the examples, a label byte followed by the pixels.
    """
    total = hashlib.sha256()
    for labels, images in parts:
        examples = torch.cat([labels[:, None], images.flatten(1)], dim=1).numpy()
        total.update(b"".join(sorted(hashlib.sha256(example).digest() for example in examples)))
    return total.hexdigest()


def say_if_other(root: Path, name: str, content: str, published: str) -> None:
    """Say on standard error, in one line, when files with the names and shapes of ``name`` hold something else.

    That is no error: other data sets, Fashion-MNIST for one, are made to be dropped in.
    """
    if content != published:
        print(f"deeprelax train: {root}: files and shapes are {name}'s, the content is not the published one", file=sys.stderr)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "none"
