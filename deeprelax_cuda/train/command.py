"""The options of `deeprelax train`, and the order in which it works."""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from deeprelax_cuda import backends, storage
from deeprelax_cuda.cli import UsageError, check_device
from deeprelax_cuda.machine import versions
from deeprelax_cuda.noise import check_seed
from deeprelax_cuda.train import checkpoint
from deeprelax_cuda.train.data import Data, batches_per_epoch
from deeprelax_cuda.train.datasets import DATASETS
from deeprelax_cuda.train.methods import METHODS, MOST_REPLICAS, REPLICAS
from deeprelax_cuda.train.models import MODELS
from deeprelax_cuda.train.ranks import Alone, Broken, CommonError, joined
from deeprelax_cuda.train.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    from deeprelax_cuda.train.compare import Settings

T = TypeVar("T")

CHECKPOINT = "checkpoint.pt"
DTYPES = ("float32", "bfloat16")
#: What may differ when a run goes on: where things are, and what is seen.
ALONGSIDE_RESUME = ("resume", "data_root", "quiet", "checkpoint_every")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. What is not given is None or False, and takes the data's, the model's or the method's default."""
    problem = parser.add_argument_group("problem")
    problem.add_argument("--data", choices=DATASETS, help="default: digits")
    problem.add_argument("--data-root", type=Path, metavar="DIR", help="the folder with the files of mnist or cifar10")
    problem.add_argument("--model", choices=MODELS, help="default: the data's")
    problem.add_argument("--method", choices=(*METHODS, "all"), nargs="+", help="default: sgd entropy-sgd")
    problem.add_argument("--seeds", type=_seed, nargs="+", help="a run each; default: 0 1 2")

    budget = parser.add_argument_group("budget (default: the data's)")
    budget.add_argument("--epochs", type=_count, help="passes over the data: gradient evaluations / batches per epoch")
    budget.add_argument("--batch-size", type=_count, metavar="EXAMPLES")
    budget.add_argument("--eval-every", type=_positive, metavar="EPOCHS", help="need not be whole; default: 1")
    budget.add_argument("--levels", type=_finite, nargs="+", metavar="LEVEL", help="errors in %%, or perplexities, to time")

    schedule = parser.add_argument_group("learning rate (the outer step, where a method has one)")
    schedule.add_argument("--lr", type=_number, help="default: the method's")
    schedule.add_argument("--lr-schedule", choices=SCHEDULES, help="over the epochs; default: constant")
    schedule.add_argument(
        "--lr-drops", type=_count, nargs="+", metavar="EPOCH", help="for step: the epochs after which it drops"
    )
    schedule.add_argument(
        "--lr-factor", type=_positive, metavar="FACTOR", help="for step: what a drop multiplies by; default: 0.2"
    )

    options = parser.add_argument_group("methods' options (default: the model's, or else the method's)")
    options.add_argument("--momentum", type=_number, help="that of the outer step, where a method has one")
    options.add_argument("--weight-decay", type=_number)
    options.add_argument("--inner-lr", type=_number, help="step along the gradient")
    options.add_argument("--inner-momentum", type=_number)
    options.add_argument("--inner-steps", type=int, help="gradient evaluations per outer step")
    options.add_argument("--gamma", type=_number, help="initial width of the relaxation")
    options.add_argument("--scoping", type=_number, help="each outer step divides gamma by 1 + scoping")
    options.add_argument("--gamma-min", type=_number, help="floor of gamma")
    options.add_argument("--gamma-total", type=_number, help="in place of scoping: gamma runs down from this to --gamma-min")
    options.add_argument(
        "--temperature", type=_number, help="of the noise of inner steps: entropy-sgd, heat, sgld each have their formula"
    )
    options.add_argument("--replicas", type=_replicas, metavar="N", help="of elastic-sgd and parle; default: 3, or a rank each")
    options.add_argument("--rho", type=_number, help="initial width of the coupling of replicas")
    options.add_argument("--rho-scoping", type=_number, help="each outer step divides rho by 1 + rho-scoping")
    options.add_argument("--rho-min", type=_number, help="floor of rho")
    options.add_argument("--ema-decay", type=_number, help="weight of the old average in sgd-ema")
    options.add_argument(
        "--set", type=_assignment, nargs="+", metavar="METHOD.OPTION=VALUE", help="any option of one method's optimizer"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=_device, help="default: cuda where there is one, else cpu")
    machine.add_argument("--dtype", choices=DTYPES, help="of the network's parameters and inputs; default: float32")
    machine.add_argument("--rounding", choices=("nearest", "stochastic"), help="of bfloat16 weights, but for sgd")
    machine.add_argument(
        "--master-weights", action="store_const", const=True, help="float32 weights beside bfloat16 ones, but for sgd"
    )
    machine.add_argument("--backend", help=f"who computes the fused step: auto, {', '.join(backends.NAMES)}")
    machine.add_argument("--threads", type=_threads, help="CPU threads; default: the data's, or else torch's")

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="default: runs/DATA-MODEL-TIME")
    output.add_argument(
        "--checkpoint-every", type=_positive, default=60.0, metavar="SECONDS", help="default: 60; Ctrl-C and SIGTERM save too"
    )
    output.add_argument("--resume", type=Path, metavar="DIR", help="go on, bit for bit, with the run that was left in DIR")
    output.add_argument("--quiet", action="store_true", help="the table without progress")


def run(args: argparse.Namespace) -> int:
    """Train each method at each seed, write the results and print the table; return the exit status."""
    rank = ""
    try:
        with joined() as ranks:
            rank = f"rank {ranks.rank}: " if ranks.size > 1 else ""
            return _train(args, ranks)
    except CommonError:
        raise
    except UsageError as error:
        if not rank:
            raise
        print(f"deeprelax train: {rank}{error}", file=sys.stderr)
        return 2
    except Broken as broken:
        print(f"deeprelax train: {rank}{broken}", file=sys.stderr)
        return 1


def _train(args: argparse.Namespace, ranks: Alone) -> int:
    """Do what `run` says, as one of the ranks."""
    # Imported here, the optional packages are not needed for --help, and a missing one is named before any work.
    from deeprelax_cuda.train import report, results
    from deeprelax_cuda.train.compare import Saver, Settings, compare, rehearse
    from deeprelax_cuda.train.loop import Curve
    from deeprelax_cuda.train.stopping import Stopped, stopping

    begun: dict[str, Any] | None = None  # of the first rank, as it is large

    def settle() -> tuple[Settings, Path | None, Path, dict[str, Any]]:
        """Return settings, where the data are, the folder, and the checkpoint to go on with, but for the run that has begun."""
        nonlocal begun
        if args.resume:
            folder, saved = args.resume, _saved(args)
            with checkpoint.fitting(folder / CHECKPOINT):
                settings = Settings.of(saved["settings"])
        else:
            settings = Settings(**_settings(args, ranks))
            folder = args.out or Path("runs") / f"{settings.data}-{settings.model}-{time.strftime('%Y%m%d-%H%M%S')}"
            saved = _left(folder, settings) if ranks.restarts else {}
        root = args.data_root
        if saved:
            with checkpoint.fitting(folder / CHECKPOINT):
                root = root or (saved["data_root"] and Path(saved["data_root"]))
                begun = saved.pop("run")
        _check_ranks(settings, ranks)
        return settings, root, folder, saved

    def prepare() -> Data:
        """Return the data, on the device."""
        device = ranks.device(settings.device)
        _prepare(device, settings.threads)
        return _load(settings.data, root, settings.batch_size).to(device, getattr(torch, settings.dtype))

    def go_on() -> None:
        """Bring the comparison to where it was left."""
        if comparison.versions != saved["versions"]:
            comparison.versions["begun_with"] = saved["versions"]
        if comparison.data != saved["data"]:
            raise UsageError(f"--resume: the data under {root} is not the data that {folder} was begun with")
        with checkpoint.fitting(folder / CHECKPOINT):
            for name, curves in saved["curves"].items():
                comparison.methods[name].curves.update({seed: Curve(**curve) for seed, curve in curves.items()})

    def claim() -> None:
        """Have the folder, with a checkpoint in it."""
        with _one_line(args, folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(storage.claimed(folder))
            if not saved:
                if saver.path.exists():
                    raise UsageError(f"--out: {folder} has an unfinished run: --resume {folder}, or choose another folder")
                if (folder / results.RESULT).exists():
                    raise UsageError(f"--out: {folder} has the results of another run; choose another folder")
                saver.save(comparison, None)

    def finish() -> str:
        """Write the results, and return the table."""
        with _one_line(args, folder):
            results.save(comparison, folder)
            text = report.write(report.report_of({folder.name: comparison}), folder)
            storage.remove(saver.path)
        return text

    settings, root, folder, saved = ranks.from_first(settle)
    data = ranks.together(prepare)
    if len(set(ranks.gather(data.digest))) > 1:
        raise CommonError("--data-root: the ranks have different data")
    comparison = rehearse(settings, data, ranks)
    if saved:
        ranks.together(go_on)
    saver = Saver(folder / CHECKPOINT, interval=args.checkpoint_every, data_root=root, begun=begun, ranks=ranks)
    try:
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(stopping())
            ranks.from_first(claim)
            with _one_line(args, folder):
                compare(comparison, data, quiet=args.quiet, saver=saver, stop=stop, ranks=ranks)
            text = ranks.from_first(finish)
    except Stopped as stopped:
        print(f"\ndeeprelax train: stopped by {stopped} at {stopped.where}; saved", file=sys.stderr)
        print(f"go on with: {ranks.launcher} train --resume {shlex.quote(str(folder))}", file=sys.stderr)
        return 128 + stopped.signum
    files = (results.RESULT, results.SECONDS, report.TABLE, report.PICTURE)
    print(text, *(folder / file for file in files), sep="\n")
    return 0


@contextlib.contextmanager
def _one_line(args: argparse.Namespace, folder: Path) -> Iterator[None]:
    """Say in one line why a file could not be written."""
    try:
        yield
    except BlockingIOError:
        raise UsageError(f"{'--resume' if args.resume else '--out'}: another process is at work in {folder}") from None
    except OSError as error:
        raise UsageError(f"--out: {error}") from error


def _settings(args: argparse.Namespace, ranks: Alone) -> dict[str, Any]:
    """Return the fields of `Settings` that the options amount to."""
    name = args.data or "digits"
    dataset = DATASETS[name]
    model = args.model or dataset.model
    methods = _distinct("--method", args.method or ["sgd", "entropy-sgd"])
    if "all" in methods:
        if len(methods) > 1:
            raise UsageError(f"--method: all stands for every method, got it with {' '.join(m for m in methods if m != 'all')}")
        methods = tuple(METHODS)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "data": name,
        "model": model,
        "methods": methods,
        "seeds": _distinct("--seeds", args.seeds or [0, 1, 2]),
        "epochs": args.epochs or dataset.epochs,
        "batch_size": args.batch_size or dataset.batch_size,
        "eval_every": args.eval_every or 1.0,
        "levels": tuple(args.levels or dataset.levels),
        "schedule": _schedule(args, args.epochs or dataset.epochs),
        "dtype": args.dtype or "float32",
        "device": str(device),
        "threads": args.threads or dataset.threads or torch.get_num_threads(),
        "options": _options(args, methods, {"replicas": ranks.size if ranks.size > 1 else REPLICAS, **MODELS[model].options}),
    }


def _check_ranks(settings: Settings, ranks: Alone) -> None:
    """Refuse what ranks cannot train, which have one replica each.

    Raises:
        UsageError: it names the option.
    """
    if ranks.size == 1:
        return
    able = " and ".join(name for name, method in METHODS.items() if method.has_replicas)
    for name in settings.methods:
        if not METHODS[name].has_replicas:
            raise UsageError(f"--method: over {ranks.size} ranks only methods with replicas train, {able}; got {name}")
        if (count := settings.options[name]["replicas"]) != ranks.size:
            raise UsageError(f"--replicas: each of the {ranks.size} ranks has one, got {count} of {name}")
    if settings.device not in ("cpu", "cuda"):
        raise UsageError(f"--device: of its node each rank takes its own, expected cpu or cuda, got {settings.device}")


def _schedule(args: argparse.Namespace, epochs: int) -> Schedule:
    kind = args.lr_schedule or "constant"
    for option in ("lr_drops", "lr_factor"):
        if getattr(args, option) is not None and kind != "step":
            raise UsageError(f"--{option.replace('_', '-')}: needs --lr-schedule step")
    if kind == "step" and not args.lr_drops:
        raise UsageError("--lr-schedule step: needs --lr-drops EPOCH...")
    drops = tuple(sorted(args.lr_drops or ()))
    if drops and drops[-1] >= epochs:
        raise UsageError(f"--lr-drops: {drops[-1]} is not before the end, after {epochs} epochs")
    return Schedule(kind, drops, args.lr_factor or (0.2 if kind == "step" else 1.0))


def _options(args: argparse.Namespace, methods: tuple[str, ...], defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each method's options: the defaults here, those given to all, those given to it, each before the one before it."""
    names = dict.fromkeys(name for method in METHODS.values() for name in method.options)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in given:
        if name in ("rounding", "master_weights") and args.dtype != "bfloat16":
            raise UsageError(f"--{name.replace('_', '-')}: needs --dtype bfloat16")
        if not any(name in METHODS[method].options for method in methods):
            raise UsageError(f"--{name.replace('_', '-')}: not an option of {' or '.join(methods)}")
    options = {}
    for method in methods:
        options[method] = {name: value for name, value in {**defaults, **given}.items() if name in METHODS[method].options}
    for method, name, value in args.set or ():
        if method not in methods:
            raise UsageError(f"--set: {method} is none of the methods {' '.join(methods)}")
        options[method][name] = value
    return options


def _saved(args: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the checkpoint in the folder that ``--resume`` names."""
    absent = (None, False)  # by identity: 0 is a value
    given = [name for name, value in vars(args).items() if not any(value is a for a in absent) and name not in ALONGSIDE_RESUME]
    if given:
        raise UsageError(f"--resume: takes its settings from the run in {args.resume}, and no --{given[0].replace('_', '-')}")
    path = args.resume / CHECKPOINT
    if args.resume.is_dir() and not path.exists():
        raise UsageError(f"--resume: {args.resume} has no {CHECKPOINT}: no run was left there, or it is finished")
    saved = checkpoint.read(path)
    with checkpoint.fitting(path):
        versions_then = dict(saved["versions"])
    for name, version in versions().items():
        if (begun := versions_then.get(name)) != version:
            print(f"deeprelax train: begun with {name} {begun}, goes on with {version}: bits may differ", file=sys.stderr)
    return saved


def _left(folder: Path, settings: Settings) -> dict[str, Any]:
    """Return the checkpoint that ranks with these settings left in ``folder`` when one of them failed, or an empty one."""
    from deeprelax_cuda.train.compare import Settings

    path = folder / CHECKPOINT
    if not path.exists():
        return {}
    saved = checkpoint.read(path)
    with checkpoint.fitting(path):
        if Settings.of(saved["settings"]) != settings:
            return {}  # another run's, which is refused where the folder is claimed
    print(f"deeprelax train: started again, goes on with the run in {folder}", file=sys.stderr)
    return saved


def _prepare(device: torch.device, threads: int) -> None:
    """Set what the bits of a run depend on beside its settings."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # read when the device is first used
    check_device(device)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # where NCCL takes its memory
        torch.use_deterministic_algorithms(True, warn_only=True)


def _load(name: str, root: Path | None, batch_size: int) -> Data:
    data = DATASETS[name].load(root)
    if batches_per_epoch(data, batch_size) == 0:
        raise UsageError(f"--batch-size: {batch_size} is more than the {len(data.train_targets)} training examples")
    return data


def _distinct(option: str, values: list[T]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise UsageError(f"{option}: expected each only once, got {' '.join(map(str, values))}")
    return tuple(values)


def _whole(text: str, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most}, got {text}")
    return int(text)


def _count(text: str) -> int:
    """Read a number of things; a million bounds what is held in memory for each."""
    return _whole(text, 1_000_000)


def _replicas(text: str) -> int:
    return _whole(text, MOST_REPLICAS)


def _threads(text: str) -> int:
    """Read a number of threads that torch survives."""
    return _whole(text, 1024)


def _number(text: str) -> float:
    """Read a number, inf included."""
    with contextlib.suppress(ValueError):
        if not math.isnan(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected a number, got {text}")


def _finite(text: str) -> float:
    if math.isinf(value := _number(text)):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def _positive(text: str) -> float:
    if (value := _finite(text)) <= 0.0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # of others neither generators nor clocks are known here
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text}")
    return device


def _assignment(text: str) -> tuple[str, str, Any]:
    """Read METHOD.OPTION=VALUE; a value that is neither a Python literal nor a number (inf) is a string."""
    target, equals, value = text.partition("=")
    method, dot, option = target.partition(".")
    if not (equals and dot and option.isidentifier()):
        raise argparse.ArgumentTypeError(f"expected METHOD.OPTION=VALUE, got {text}")
    for read in (ast.literal_eval, float):
        with contextlib.suppress(ValueError, SyntaxError):
            return method, option, read(value)
    return method, option, value


def _seed(text: str) -> int:
    try:
        return check_seed(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number in [0, 2**64), got {text}") from None
