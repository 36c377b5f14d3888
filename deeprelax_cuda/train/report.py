"""What is written about a comparison: a table, curves as a picture, and everything as JSON."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from deeprelax_cuda import __version__
from deeprelax_cuda.train.compare import Comparison

#: Okabe and Ito's colours, which readers of every kind of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def table(comparison: Comparison) -> str:
    """Return the table of a comparison: a column a method, mean +- standard deviation over the seeds.

    A level is reached at the first evaluation that is at or below it. Where only some seeds reach it, the mean is over those
    and their number is said.
    """
    names = list(comparison.methods)
    columns = [list(trained.curves.values()) for trained in comparison.methods.values()]
    rows = [
        ["", *names],
        ["final validation error, %", *(_mean([c.validation_error[-1] for c in curves], ".2f") for curves in columns)],
        ["best validation error, %", *(_mean([min(c.validation_error) for c in curves], ".2f") for curves in columns)],
        ["training seconds", *(_mean([c.seconds[-1] for c in curves], ".2f") for curves in columns)],
    ]
    for level in comparison.settings.levels:
        found = [[(curve, at) for curve in curves if (at := curve.reached(level)) is not None] for curves in columns]
        shares = ["" if len(f) == len(c) else f" ({len(f)} of {len(c)})" for f, c in zip(found, columns, strict=True)]
        evaluations = [_mean([curve.gradient_evaluations[at] for curve, at in f], ".0f") for f in found]
        seconds = [_mean([curve.seconds[at] for curve, at in f], ".2f") for f in found]
        rows.append([f"gradient evaluations to {level:g} %", *map(str.__add__, evaluations, shares)])
        rows.append([f"seconds to {level:g} %", *map(str.__add__, seconds, shares)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines)


def _mean(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):{form}}"


def figure(comparison: Comparison) -> Figure:
    """Return the validation error of each method against gradient evaluations and against seconds of training.

    Lines are means over the seeds, bands reach from the lowest to the highest seed.
    """
    picture = Figure(figsize=(7.0, 2.9), layout="constrained")
    FigureCanvasAgg(picture)
    by_evaluations, by_seconds = picture.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
    for (name, trained), colour in zip(comparison.methods.items(), itertools.cycle(COLOURS)):
        curves = list(trained.curves.values())
        errors = list(zip(*(curve.validation_error for curve in curves), strict=True))
        mean, lowest, highest = ([f(e) for e in errors] for f in (statistics.mean, min, max))
        seconds = [statistics.mean(times) for times in zip(*(curve.seconds for curve in curves), strict=True)]
        for axes, x in ((by_evaluations, curves[0].gradient_evaluations), (by_seconds, seconds)):
            axes.plot(x, mean, color=colour, linewidth=1.4, label=name)
            axes.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
    for axes, label in ((by_evaluations, "gradient evaluations"), (by_seconds, "training time (s)")):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    by_evaluations.set_ylabel("validation error (%)")
    if all(min(curve.validation_error) > 0 for trained in comparison.methods.values() for curve in trained.curves.values()):
        _log_error_axis(by_evaluations)
    seeds = len(comparison.settings.seeds)
    by_seconds.legend(frameon=False, title=f"mean and range of {seeds} seeds" if seeds > 1 else None, alignment="left")
    return picture


def _log_error_axis(axes: Axes) -> None:
    """Errors fall by orders of magnitude: a logarithmic axis, with its ticks written as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def save(comparison: Comparison, folder: Path) -> None:
    """Write ``result.json`` and ``curves.png`` into ``folder``, which exists; a reader never sees half of either."""
    result = {
        **_jsonable(asdict(comparison)),
        "versions": {
            "deeprelax_cuda": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }
    _write(folder / "result.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    picture = BytesIO()
    with rc_context({"font.size": 8}):
        figure(comparison).savefig(picture, format="png", dpi=200)
    _write(folder / "curves.png", picture.getvalue())


def _jsonable(value: Any) -> Any:
    """Name the numbers JSON has no form for, as ``float`` reads them: "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
