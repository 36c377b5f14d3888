"""`deeprelax pde`: the pictures of the equations behind the optimizers, and the check that the optimizers follow them.

It stands beside the package `deeprelax_cuda.pde`, which needs numpy and scipy, so that --help needs neither.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deeprelax_cuda import backends, storage
from deeprelax_cuda.cli import UsageError, check_device

if TYPE_CHECKING:
    from deeprelax_cuda.pde.verify import Row

TABLE = "verify.txt"
ROWS = "verify.json"

Tell = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where pictures and numbers go; default: runs/pde, none with --verify alone"
    )
    parser.add_argument("--verify", action="store_true", help="hold the optimizers' estimates of grad u against the solvers'")
    parser.add_argument("--device", help="for --verify: where the optimizers work; default: cpu")
    parser.add_argument("--backend", help=f"for --verify: one of {', '.join(backends.NAMES)}; default: all that serve there")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Draw, verify or both; print what was written and found, and return the exit status."""
    # Imported here, the optional packages are not needed for --help, and a missing one is named before any work.
    from deeprelax_cuda.pde.pictures import PICTURES
    from deeprelax_cuda.pde.verify import table, verify

    importlib.import_module("tqdm")

    for option in ("device", "backend"):
        if getattr(args, option) is not None and not args.verify:
            raise UsageError(f"--{option}: needs --verify")
    folder = args.out or (None if args.verify else Path("runs") / "pde")
    device, names = _asked(args.device or "cpu", args.backend) if args.verify else (None, None)
    with _in(folder) as write:
        if folder:
            with _telling(len(PICTURES), args.quiet) as tell:
                for name, picture in PICTURES.items():
                    tell(name)
                    study = picture.study()
                    write(f"{name}{picture.suffix}", picture.draw(study))
                    tables = {f"{name}{ending}.csv": csv(columns) for ending, columns in study.tables().items()}
                    for table_name, content in tables.items():
                        write(table_name, content)
                    _say(f"{folder / name}{picture.suffix}, {', '.join(tables)}: {study.summary()}")
        if device is None:
            return 0
        with _telling(None, args.quiet) as tell:
            rows = verify(device, names, progress=tell)
        text = table(rows)
        _say(text)
        write(TABLE, f"{text}\n".encode())
        write(ROWS, strict_json(rows))
        if folder:
            _say(f"{folder / TABLE}, {ROWS}")
    return 0 if all(row.agrees for row in rows) else 1


@contextmanager
def _in(folder: Path | None) -> Iterator[Callable[[str, bytes], None]]:
    """Make the folder, have it for this process, and yield what writes a file there; without a folder nothing is written.

    Raises:
        UsageError: the folder cannot be made, written to, or is another process's.
    """

    def write(name: str, content: bytes) -> None:
        if folder is None:
            return
        try:
            storage.write(folder / name, content)
        except OSError as error:
            raise UsageError(f"--out: {error}") from error

    with ExitStack() as claims:
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()  # what cannot be written is said before any work
                claims.enter_context(storage.claimed(folder))
            except BlockingIOError:
                raise UsageError(f"--out: another process is at work in {folder}") from None
            except OSError as error:
                raise UsageError(f"--out: {error}") from error
        yield write


def csv(columns: dict[str, Any]) -> bytes:
    """Return columns, one-dimensional arrays of one length, as a table whose numbers are read back to the last bit."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return "\n".join([",".join(columns), *(",".join(map(repr, row)) for row in rows), ""]).encode()


def strict_json(rows: Sequence[Row]) -> bytes:
    """Return what was verified as JSON, which has no infinity: numbers that are not finite are strings."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    content = [{name: plain(value) for name, value in asdict(row).items()} | {"agrees": row.agrees} for row in rows]
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _asked(device: str, backend: str | None) -> tuple[torch.device, list[str] | None]:
    """Return the device and the backends that were asked for, None for all that serve there.

    Raises:
        UsageError: they cannot be used here.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from error
    check_device(place)
    if backend is None:
        return place, None
    try:
        return place, [backends.select(place, torch.float32, backend).name]
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--backend: {error}") from error


def _say(text: str) -> None:
    """Print a result; below a bar, where there is one on the same terminal."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)


@contextmanager
def _telling(total: int | None, quiet: bool) -> Iterator[Tell]:
    """Yield what is told the name of each thing before it is done: a bar on a terminal, a line elsewhere, or nothing."""
    from tqdm import tqdm

    if quiet:
        yield lambda what: None
    elif not sys.stderr.isatty():
        yield lambda what: print(what, file=sys.stderr, flush=True)
    else:
        with tqdm(total=total, dynamic_ncols=True, leave=False) as bar:

            def tell(what: str) -> None:
                bar.update(1 if bar.desc else 0)
                bar.set_description(what)

            yield tell
