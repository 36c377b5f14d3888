"""The options of `deeprelax train`, and the order in which it works."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TypeVar

import torch

from deeprelax_cuda import backends
from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.noise import check_seed
from deeprelax_cuda.train.data import DATASETS, batches_per_epoch
from deeprelax_cuda.train.methods import METHODS
from deeprelax_cuda.train.models import MODELS

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. What is left at None takes the data set's or the method's own default."""
    problem = parser.add_argument_group("problem")
    problem.add_argument("--data", choices=DATASETS, default="digits", help="default: %(default)s")
    problem.add_argument("--model", choices=MODELS, help="default: the data's")
    problem.add_argument(
        "--method", choices=METHODS, nargs="+", default=["sgd", "entropy-sgd"], help="default: sgd entropy-sgd"
    )
    problem.add_argument("--seeds", type=_seed, nargs="+", default=[0, 1, 2], help="a run each; default: 0 1 2")

    budget = parser.add_argument_group("budget (default: the data's)")
    budget.add_argument("--epochs", type=_count, help="passes over the data: gradient evaluations / batches per epoch")
    budget.add_argument("--batch-size", type=_count, metavar="EXAMPLES")
    budget.add_argument("--eval-every", type=_count, default=1, metavar="EPOCHS", help="default: 1")
    budget.add_argument(
        "--levels", type=float, nargs="+", metavar="PERCENT", help="errors of which to say when they were reached"
    )

    options = parser.add_argument_group("methods' options (default: the method's)")
    options.add_argument("--lr", type=float, help="step size; that of the outer step for entropy-sgd")
    options.add_argument("--inner-steps", type=int, help="gradient evaluations per outer step")
    options.add_argument("--gamma", type=float, help="initial width of the relaxation; the coupling is 1/gamma")
    options.add_argument("--scoping", type=float, help="each outer step divides gamma by 1 + scoping")
    options.add_argument("--temperature", type=float, help="inner steps get noise of std sqrt(2 * inner_lr * temperature)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--backend", help=f"who computes the fused step: auto, {', '.join(backends.NAMES)}")
    machine.add_argument("--threads", type=_count, help="CPU threads; default: the data's, or else torch's")

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="default: runs/DATA-MODEL-TIME")
    output.add_argument("--quiet", action="store_true", help="the table without progress")


def run(args: argparse.Namespace) -> int:
    """Train each method at each seed, print the table, write result.json and curves.png; return the exit status."""
    # Imported here, the optional packages are not needed for --help, and a missing one is named before any work.
    from deeprelax_cuda.train import report
    from deeprelax_cuda.train.compare import Settings, compare, rehearse

    dataset = DATASETS[args.data]
    settings = Settings(
        data=args.data,
        model=args.model or dataset.model,
        methods=_distinct("--method", args.method),
        seeds=_distinct("--seeds", args.seeds),
        epochs=args.epochs or dataset.epochs,
        batch_size=args.batch_size or dataset.batch_size,
        eval_every=args.eval_every,
        levels=tuple(args.levels or dataset.levels),
        options=_options(args),
    )
    data = dataset.load()
    per_epoch = batches_per_epoch(data, settings.batch_size)
    if per_epoch == 0:
        raise UsageError(f"--batch-size: {settings.batch_size} is more than the {len(data.train_targets)} training examples")
    torch.set_num_threads(args.threads or dataset.threads or torch.get_num_threads())
    comparison = rehearse(settings, data)
    folder = args.out or Path("runs") / f"{settings.data}-{settings.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: {error}") from error

    compare(comparison, data, quiet=args.quiet)
    report.save(comparison, folder)
    examples = f"{len(data.train_targets)} examples to train on, {len(data.val_targets)} to validate"
    budget = f"{settings.epochs} epochs of {per_epoch} gradient evaluations; seeds {' '.join(map(str, settings.seeds))}"
    print(f"{settings.data}, {settings.model}: {examples}; {budget}\n\n{report.table(comparison)}\n")
    print(f"{folder / 'result.json'}\n{folder / 'curves.png'}")
    return 0


def _options(args: argparse.Namespace) -> dict[str, object]:
    """Return the methods' options that were given, refusing one that no chosen method takes."""
    names = dict.fromkeys(name for method in METHODS.values() for name in method.options)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in given:
        if not any(name in METHODS[method].options for method in args.method):
            raise UsageError(f"--{name.replace('_', '-')}: not an option of {' or '.join(args.method)}")
    return given


def _distinct(option: str, values: list[T]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise UsageError(f"{option}: expected each only once, got {' '.join(map(str, values))}")
    return tuple(values)


def _count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def _seed(text: str) -> int:
    try:
        return check_seed(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number in [0, 2**64), got {text}") from None
