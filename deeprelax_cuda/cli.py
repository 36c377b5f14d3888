"""The `deeprelax` command: picks the sub-command and imports that one only, so that each needs only its own packages."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from deeprelax_cuda import __version__

if TYPE_CHECKING:
    import torch


class Command(NamedTuple):
    """A sub-command: a module with ``add_arguments(parser)`` and ``run(args) -> exit status``, and the extra it needs."""

    module: str
    help: str
    extra: str | None = None


COMMANDS = {
    "train": Command("deeprelax_cuda.train.command", "train a network with one or several methods and compare them", "train"),
    "report": Command("deeprelax_cuda.train.report_command", "make the table and the picture of finished runs again", "train"),
    "pde": Command("deeprelax_cuda.pde_command", "draw the equations behind the methods, and check the methods by them", "pde"),
    "doctor": Command("deeprelax_cuda.doctor", "say what is installed, which backend serves what, and test each of them"),
}


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line and says why."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, also where torchrun has started many of this program."""

    def error(self, message: str) -> NoReturn:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # the first rank says it, and when that has ended torchrun ends the others
            self.exit(2)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def check_device(device: torch.device) -> None:
    """Refuse a device that cannot be computed on here.

    Raises:
        UsageError: it names ``--device``.
    """
    import torch

    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # by the kind of device
        raise UsageError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the program's own) and return the exit status.

    0: done; 1: the sub-command found something wrong, or nobody read its output to the end; 2: wrong options or a missing
    package; 130: interrupted.
    """
    top = Parser(
        prog="deeprelax",
        description="Deep Relaxation optimizers for PyTorch.",
        epilog="commands: " + "; ".join(f"{name}: {command.help}" for name, command in COMMANDS.items()),
    )
    top.add_argument("--version", action="version", version=f"deeprelax_cuda {__version__}")
    top.add_argument("command", choices=COMMANDS)
    rest = top.add_argument("options", nargs=argparse.REMAINDER, help="see deeprelax COMMAND --help")
    rest.required = False
    chosen = top.parse_args(argv)

    command = COMMANDS[chosen.command]
    parser = Parser(prog=f"deeprelax {chosen.command}", description=command.help)
    try:
        module = importlib.import_module(command.module)
        module.add_arguments(parser)
        status: int = module.run(parser.parse_args(chosen.options))
        return status
    except UsageError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "deeprelax_cuda" or command.extra is None:
            raise
        print(f'{parser.prog}: {package} is not installed: pip install "deeprelax_cuda[{command.extra}]"', file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
