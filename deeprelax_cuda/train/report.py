"""What a reader sees of comparisons: a table, and curves as a picture."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from deeprelax_cuda import storage
from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.colours import COLOURS
from deeprelax_cuda.train.compare import Comparison
from deeprelax_cuda.train.loop import Curve
from deeprelax_cuda.train.measures import Measure

TABLE = "table.txt"
PICTURE = "curves.png"

MARKERS = "osD^vPX*"
#: Evaluations up to which each is marked.
MARKED = 40

PARTS = {"forward_backward": "  forward and backward", "optimizer": "  optimizer", "data": "  data"}


@dataclass
class Column:
    """One method's curves in a report."""

    label: str
    curves: list[Curve]


@dataclass
class Report:
    """Columns of one comparison, or of several of the same data, with what they have in common."""

    title: str
    measure: Measure
    levels: tuple[float, ...]
    columns: list[Column]


def report_of(comparisons: dict[str, Comparison], levels: tuple[float, ...] | None = None) -> Report:
    """Return the report of comparisons, which ``comparisons`` has by a name for each, that of its folder for example.

    ``levels`` default to those of the settings. A method that several comparisons have is labelled with the network, if that
    differs, and else with the comparison's name.

    Raises:
        UsageError: they are of different data, so that there is nothing to compare.
    """
    first = next(iter(comparisons.values()))
    for name, comparison in comparisons.items():
        if (comparison.settings.data, comparison.data) != (first.settings.data, first.data):
            raise UsageError(
                f"{name}: a run on other data ({_data(comparison)}) than {next(iter(comparisons))} ({_data(first)})"
            )
    found = [(name, made, method) for name, made in comparisons.items() for method in made.methods]
    labels: list[str] = [method for _, _, method in found]
    several_models = len({made.settings.model for made in comparisons.values()}) > 1
    if several_models:
        labels = [f"{made.settings.model} {method}" for _, made, method in found]
    labels = [
        f"{label} ({name})" if labels.count(label) > 1 else label for label, (name, _, _) in zip(labels, found, strict=True)
    ]
    columns = [
        Column(label, list(made.methods[method].curves.values()))
        for label, (_, made, method) in zip(labels, found, strict=True)
    ]
    all_levels = {level: None for made in comparisons.values() for level in made.settings.levels}
    title = "\n".join(dict.fromkeys(_title(made) for made in comparisons.values()))
    return Report(title, first.measure, levels or tuple(sorted(all_levels, reverse=True)), columns)


def _data(comparison: Comparison) -> str:
    return f"{comparison.settings.data}, {comparison.data['digest'][:12]}"


def _title(comparison: Comparison) -> str:
    settings, examples = comparison.settings, comparison.data["train_examples"]
    counts = {options["replicas"] for options in settings.options.values() if options.get("replicas", 1) > 1}
    each = f", of each of {' or '.join(map(str, sorted(counts)))} replicas where there are any" if counts else ""
    return (
        f"{settings.data}, {settings.model}: {examples} examples to train on, {comparison.data['val_examples']} to validate; "
        f"{settings.epochs} epochs of {examples // settings.batch_size} gradient evaluations{each}; "
        f"seeds {' '.join(map(str, settings.seeds))}"
    )


def table(report: Report) -> str:
    """Return the table of a report: a column a method, mean +- standard deviation over the seeds.

    A level is reached at the first evaluation that is at or below it. Where only some seeds reach it, the mean is over those
    and their number is said.
    """
    rows = [["", *(column.label for column in report.columns)]]

    def add(name: str, form: str, value: Callable[[Curve], float | None]) -> None:
        rows.append([name, *(_cell([value(curve) for curve in column.curves], form) for column in report.columns)])

    def reached(level: float, values: str) -> Callable[[Curve], float | None]:
        return lambda curve: None if (at := curve.reached(level)) is None else getattr(curve, values)[at]

    def spent(part: str) -> Callable[[Curve], float]:
        return lambda curve: _milliseconds(curve, curve.parts[part])

    add(f"final {report.measure.label}", ".2f", lambda curve: curve.validation[-1])
    add(f"best {report.measure.label}", ".2f", lambda curve: min(curve.validation))
    for level in report.levels:
        goal = f"{level:g} {report.measure.unit}".rstrip()
        add(f"gradient evaluations to {goal}", ".0f", reached(level, "gradient_evaluations"))
        add(f"seconds to {goal}", ".2f", reached(level, "seconds"))
    add("training seconds", ".2f", lambda curve: curve.seconds[-1])
    add("ms per gradient evaluation", ".2f", lambda curve: _milliseconds(curve, curve.seconds[-1]))
    for part, name in PARTS.items():
        add(name, ".2f", spent(part))
    add("time over forward and backward, %", ".1f", _overhead)

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines)


def _milliseconds(curve: Curve, seconds: float) -> float:
    return 1e3 * seconds / curve.gradient_evaluations[-1]


def _overhead(curve: Curve) -> float:
    """Return how much longer training took than its forward and backward passes alone, in %."""
    return 100.0 * (curve.seconds[-1] / curve.parts["forward_backward"] - 1.0)


def _cell(values: Sequence[float | None], form: str) -> str:
    there = [value for value in values if value is not None]
    share = "" if len(there) == len(values) else f" ({len(there)} of {len(values)})"
    if not there:
        return f"-{share}"
    mean = f"{statistics.mean(there):{form}}"
    if len(there) == 1:
        return f"{mean}{share}"
    deviation = statistics.stdev(there) if all(map(math.isfinite, there)) else math.nan
    return f"{mean} +- {deviation:{form}}{share}"


def figure(report: Report) -> Figure:
    """Return the measure of each method against gradient evaluations and against seconds of training.

    Lines are means over the seeds, bands reach from the lowest to the highest seed.
    """
    lines_drawn = False  # of runs that diverged nothing is, and a logarithmic axis needs something
    picture = Figure(figsize=(7.0, 2.9), layout="constrained")
    FigureCanvasAgg(picture)
    by_evaluations, by_seconds = picture.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
    for column, colour, marker in zip(report.columns, itertools.cycle(COLOURS), itertools.cycle(MARKERS)):
        at_each = list(zip(*(curve.validation for curve in column.curves), strict=True))
        mean, lowest, highest = ([f(seeds) for seeds in at_each] for f in (statistics.mean, min, max))
        lines_drawn |= any(map(math.isfinite, mean))
        seconds = [statistics.mean(times) for times in zip(*(curve.seconds for curve in column.curves), strict=True)]
        style = {"color": colour, "linewidth": 1.4, "markersize": 3.2, "label": column.label}
        for axes, x in ((by_evaluations, column.curves[0].gradient_evaluations), (by_seconds, seconds)):
            axes.plot(x, mean, marker=marker if len(x) <= MARKED else None, **style)
            axes.fill_between(x, lowest, highest, color=colour, alpha=0.18, linewidth=0)
    for axes, label in ((by_evaluations, "gradient evaluations"), (by_seconds, "training time (s)")):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    measure = report.measure
    by_evaluations.set_ylabel(f"{measure.name} ({measure.unit})" if measure.unit else measure.name)
    values = [value for column in report.columns for curve in column.curves for value in curve.validation]
    finite = [value for value in values if math.isfinite(value)]
    if lines_drawn and min(finite) > 0:
        _logarithmic(by_evaluations, max(finite) / min(finite))
    seeds = {len(column.curves) for column in report.columns}
    title = f"mean and range of {'/'.join(map(str, sorted(seeds)))} seeds" if max(seeds) > 1 else None
    by_seconds.legend(frameon=False, title=title, alignment="left")
    return picture


def _logarithmic(axes: Axes, span: float) -> None:
    """Errors fall by orders of magnitude: a logarithmic axis, with its ticks, closer for a small span, as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span > 10 else (1, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def write(report: Report, folder: Path) -> str:
    """Write the table and the picture into ``folder``, which exists; return the table with its title."""
    text = f"{report.title}\n\n{table(report)}\n"
    storage.write(folder / TABLE, text.encode())
    picture = BytesIO()
    with rc_context({"font.size": 8}):
        figure(report).savefig(picture, format="png", dpi=300)
    storage.write(folder / PICTURE, picture.getvalue())
    return text
