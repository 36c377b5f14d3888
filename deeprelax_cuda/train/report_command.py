"""`deeprelax report`: the table and the picture of finished runs once more, also of several runs together."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from deeprelax_cuda.cli import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run of deeprelax train")
    parser.add_argument("--levels", type=float, nargs="+", metavar="LEVEL", help="default: those of the runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the run's folder; runs/report-TIME for several")


def run(args: argparse.Namespace) -> int:
    """Write the table and the picture, and print the table; return the exit status."""
    from deeprelax_cuda.train import report, results

    names = [folder.resolve().name for folder in args.runs]
    if len(set(names)) < len(names):  # two folders of one name are told apart by their paths
        names = [str(folder) for folder in args.runs]
    if len(set(names)) < len(names):
        raise UsageError(f"expected each run only once, got {' '.join(names)}")
    comparisons = {name: results.load(folder) for name, folder in zip(names, args.runs, strict=True)}
    made = report.report_of(comparisons, args.levels and tuple(args.levels))
    several = Path("runs") / f"report-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = args.out or (args.runs[0] if len(args.runs) == 1 else several)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = report.write(made, folder)
    except OSError as error:
        raise UsageError(f"--out: {error}") from error
    print(text, folder / report.TABLE, folder / report.PICTURE, sep="\n")
    return 0
