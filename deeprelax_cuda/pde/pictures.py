"""The studies drawn: pictures for a lecture, each a figure or an animation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from deeprelax_cuda.colours import COLOURS
from deeprelax_cuda.pde.studies import (
    Plane,
    Relaxations,
    Steering,
    Study,
    Widening,
    minima,
    plane,
    relaxations,
    steering,
    widening,
)

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, GREY = COLOURS
#: Of what is drawn in several pictures.
LINES: dict[str, dict[str, Any]] = {
    "f": {"color": "0.6", "linewidth": 1.6, "label": "f"},
    "heat": {"color": GREEN, "linewidth": 2.2, "label": "heat"},
    "local_entropy": {"color": BLUE, "linewidth": 2.2, "label": "local entropy (viscous)"},
    "moreau_envelope": {"color": RED, "linewidth": 2.2, "label": "Moreau envelope (non-viscous)"},
}
#: What is shown of `rugged`.
WINDOW: dict[str, Any] = {"xlim": (-2.2, 2.2), "ylim": (-1.8, 6.4)}
FONT: Any = {"font.size": 13.0, "axes.titlesize": 14.0, "figure.titlesize": 16.0, "legend.fontsize": 13.0}
DPI = 150
#: How long a frame of an animation is shown, and its first and last one.
MILLISECONDS, HELD = 80, 1500


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    """Draw as a fresh matplotlib would, whatever the user's own settings, in larger type."""
    with rc_context():
        rcdefaults()
        rcParams.update(FONT)
        yield


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, text: str, at: tuple[float, float], away: tuple[float, float], **style: Any) -> None:
    """Write a text beside a point, so many printer's points away."""
    axes.annotate(text, at, away, textcoords="offset points", **style)


def draw_relaxations(study: Relaxations) -> Figure:
    """Draw f and its relaxations, a panel for each time, with their lowest points marked."""
    x = study.grid.axes[0]
    with _style():
        figure = _figure(13.0, 5.4)
        panels = figure.subplots(1, len(study.times), sharey=True)
        for i, (axes, t) in enumerate(zip(panels, study.times, strict=True)):
            axes.plot(x, study.f, **LINES["f"])
            for name, relaxed in study.relaxed.items():
                u, style = relaxed[i], LINES[name]
                axes.plot(x, u, **style)
                lowest = np.argmin(u)
                axes.plot(x[lowest], u[lowest], "o", color=style["color"], markersize=10, markeredgecolor="white")
            axes.set(title=f"t = {t:g}", xlabel="x", **WINDOW)
            _bare(axes)
        panels[0].set_ylabel("f and u")
        lines = panels[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(
            "The Moreau envelope keeps the lowest point, local entropy is smooth, heat only blurs"
            f"   (β = {study.beta:g}; dots: lowest points)"
        )
        return figure


def draw_plane(study: Plane) -> Figure:
    """Draw f and its local entropy as contours and as surfaces, with their minima."""
    x, y = study.grid.nodes
    low, high = float(study.f.min()), float(study.f.max())
    ticks = {"xlabel": "x", "ylabel": "y", "xticks": (-1, 0, 1), "yticks": (-1, 0, 1)}
    names = ("f", f"local entropy of f, t = {study.t:g}, β = {study.beta:g}")
    with _style():
        figure = _figure(11.5, 10.0)
        figure.suptitle("The lowest point of f is in a narrow hole, that of its local entropy in the wide valley")
        top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
        flats = top.subplots(1, 2)
        for i, (name, u, axes) in enumerate(zip(names, (study.f, study.local_entropy), flats, strict=True)):
            nodes = np.transpose(minima(u, study.grid))
            by_depth = [tuple(node) for node in nodes[np.argsort(u[tuple(nodes.T)])]]
            filled = axes.contourf(x, y, u, np.linspace(low, high, 25), cmap="viridis")
            for node in by_depth:
                axes.plot(x[node], y[node], "o", color="white", markersize=5, markeredgecolor=BLACK, markeredgewidth=0.8)
            for kind, there in (("wide valley", x < 0.5), ("narrow hole", x > 0.5)):
                node = next(node for node in by_depth if there[node])
                lowest = node == by_depth[0]
                marker: dict[str, Any] = {"marker": "*", "markersize": 22} if lowest else {"marker": "o", "markersize": 10}
                axes.plot(x[node], y[node], color=RED, markeredgecolor="white", **marker)
                text = f"{kind}\n{_number(u[node])}{', lowest' if lowest else ''}"
                box = {"facecolor": "white", "edgecolor": "none", "boxstyle": "round,pad=0.2"}
                _label(axes, text, (x[node], y[node]), (0, -14), ha="center", va="top", bbox=box, zorder=10)
            axes.set(title=f"{name}: {len(by_depth)} minima", aspect="equal", **ticks)
            surface = bottom.add_subplot(1, 2, 1 + i, projection="3d")
            surface.plot_surface(x, y, u, cmap="viridis", vmin=low, vmax=high, rcount=81, ccount=81, linewidth=0)
            surface.set(zlim=(low, high), zticks=(-1.0, -0.5, 0.0), **ticks)
            surface.view_init(elev=38, azim=-65)
            surface.set_box_aspect((4, 4, 2.4), zoom=1.05)
        top.colorbar(filled, ax=flats, shrink=0.9, ticks=(-1.0, -0.5, 0.0))
        return figure


def draw_steering(study: Steering) -> Figure:
    """Draw the terminal densities of SGD and controlled SGD over the loss, and loss and effort in time."""
    x, s = study.grid.axes[0], study.times
    with _style():
        figure = _figure(13.0, 6.2)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1.0))
        top = figure.add_subplot(grid[0, 0])
        below = figure.add_subplot(grid[1, 0], sharex=top)
        right = figure.add_subplot(grid[:, 1])

        top.plot(x, study.loss, color=BLACK, linewidth=1.8)
        height = float(np.interp(study.start, x, study.loss))
        top.plot(study.start, height, "o", color=BLACK, markersize=11)
        _label(top, "start", (study.start, height), (12, 4))
        top.set(ylabel="loss V", xlim=(-2.0, 2.0), ylim=(-1.0, 4.5))
        top.tick_params(labelbottom=False)
        for density, colour, name in ((study.sgd, BLUE, "SGD"), (study.controlled, RED, "controlled SGD")):
            below.plot(x, density[-1], color=colour, linewidth=2.0, label=name)
            below.fill_between(x, density[-1], color=colour, alpha=0.25, linewidth=0)
        below.set(xlabel="x", ylabel=f"density of x at s = {s[-1]:g}", ylim=(0.0, None))
        below.legend(frameon=False, loc="upper right")

        cost = study.loss_of_controlled + study.effort
        ends = []
        for values, name, colour, style in (
            (study.loss_of_sgd, "E V, SGD", BLUE, "-"),
            (cost, "E V + effort, controlled", RED, "--"),
            (study.loss_of_controlled, "E V, controlled", RED, "-"),
        ):
            right.plot(s, values, color=colour, linestyle=style, linewidth=2.4, label=name)
            ends.append(_number(values[-1]))
            _label(right, ends[-1], (s[-1], values[-1]), (8, 0), va="center", color=colour)
        right.set(xlabel="time s", ylabel="expected loss E V", xlim=(0.0, 1.12 * s[-1]))
        right.legend(frameon=False, loc="upper right")
        right.set_title(f"at s = {s[-1]:g}:  E V + effort = {ends[1]} ≤ {ends[0]} = E V of SGD")
        for axes in (top, below, right):
            _bare(axes)
        figure.suptitle(rf"The optimal control $\alpha = \nabla u$ gains more than its effort  (β = {study.beta:g})")
        return figure


def draw_widening(study: Widening) -> Figure:
    """Draw Moreau envelopes with their minima, and the curvatures at those against the law."""
    x, times = study.grid.axes[0], study.times
    colours = (BLUE, RED, GREEN)
    with _style():
        figure = _figure(13.0, 5.8)
        left, right = figure.subplots(1, 2)
        left.plot(x, study.f, color="0.8", linewidth=4, label="f")
        for time, style in zip((0.01, 0.1, 1.0), (":", "--", "-"), strict=True):
            at = int(np.argmin(np.abs(np.log(times / time))))
            left.plot(x, study.envelopes[at], color=BLACK, linestyle=style, linewidth=1.5, label=f"t = {times[at]:.2g}")
        for node, colour in zip(study.nodes, colours, strict=True):
            left.plot(x[node], study.f[node], "o", color=colour, markersize=10)
        left.set(xlabel="x", ylabel="f and u", xlim=(-2.0, 2.0))
        left.set_title("f and its Moreau envelopes u: minima stay in place\nuntil a lower valley takes over")
        left.legend(frameon=False, loc="lower right")

        laws = study.predicted()
        for lam, end, curvature, law, colour in zip(study.lambdas, study.ends, study.curvatures, laws, colours, strict=True):
            there = times < end
            right.loglog(times[there], law[there], color=colour, linewidth=1.8)
            right.loglog(times, curvature, "o", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.5)
            _label(right, f"λ = {lam:.3g}", (times[0], law[0]), (0, 8), color=colour)
            if np.isfinite(end):
                last = lam / (1.0 + end * lam)
                right.loglog(end, last, "X", color=colour, markersize=12, markeredgecolor="black", zorder=5)
                _label(right, f"gone at t = {end:.2g}", (end, last), (14, 10), color=colour)
        lowest = np.argmin(study.f[study.nodes])
        text = {"ha": "right", "va": "top", "color": colours[lowest]}
        _label(right, "lowest of f: stays", (times[-6], laws[lowest, -6]), (-12, -6), **text)
        right.set(xlabel="t", xlim=(0.7 * times[0], 3.0 * times[-1]), ylim=(0.05, 3e3), ylabel="curvature of u at the minimum")
        right.set_title(f"lines: λ/(1 + tλ);  dots: from the solver's Hessian,\nat most {100.0 * study.error():.2g} % away")
        for axes in (left, right):
            _bare(axes)
        figure.suptitle("The Moreau envelope widens minima")
        return figure


def animate(study: Relaxations) -> bytes:
    """Draw the viscous and the non-viscous relaxation over f, a frame for each time; return a GIF that loops."""
    x = study.grid.axes[0]
    frames = []
    with _style():
        figure = _figure(7.2, 4.8)
        axes = figure.subplots()
        axes.plot(x, study.f, **LINES["f"])
        moving = [axes.plot(x, study.f, **LINES[name])[0] for name in study.relaxed]
        clock = axes.text(0.5, 0.97, "", transform=axes.transAxes, ha="center", va="top", fontsize=20)
        axes.set(xlabel="x", **WINDOW)
        axes.set_title(f"f relaxes to u(x, t)  (β = {study.beta:g})", pad=10)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=11, columnspacing=1.2)
        _bare(axes)
        for i, t in enumerate(study.times):
            for line, relaxed in zip(moving, study.relaxed.values(), strict=True):
                line.set_ydata(relaxed[i])
            clock.set_text(f"t = {t:.4f}")
            frames.append(_image(figure))
            figure.set_layout_engine("none")  # after the first frame all stays where it is
    return _gif(frames)


def _image(figure: Figure) -> Image.Image:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Image.open(file).convert("RGB")


def _gif(frames: list[Image.Image]) -> bytes:
    """Return frames in the colours of the middle one, each for `MILLISECONDS`, the first and the last for longer."""
    palette = frames[len(frames) // 2].quantize(64, Image.Quantize.MAXCOVERAGE)
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    shown = [MILLISECONDS] * len(frames)
    shown[0] = shown[-1] = HELD
    file = BytesIO()
    drawn[0].save(file, format="GIF", save_all=True, append_images=drawn[1:], duration=shown, loop=0)
    return file.getvalue()


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def png(draw: Callable[[Any], Figure], study: Study) -> bytes:
    """Return what ``draw`` makes of a study as the content of a PNG file."""
    file = BytesIO()
    figure = draw(study)
    with _style():
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


class Picture(NamedTuple):
    """A picture: the ending of its file, the study it shows, and how that is drawn as a file's content."""

    suffix: str
    study: Callable[..., Study]
    draw: Callable[[Any], bytes]


#: By the name of the file.
PICTURES = {
    "relaxations-1d": Picture(
        ".png", partial(relaxations, times=(0.03, 0.1, 0.3), beta=1.0, points=1025), partial(png, draw_relaxations)
    ),
    "landscape-2d": Picture(".png", partial(plane, t=0.3, beta=4.0, points=141), partial(png, draw_plane)),
    "control": Picture(
        ".png",
        partial(steering, duration=1.0, beta=3.0, start=-1.5, points=2049, steps=1600, every=4),
        partial(png, draw_steering),
    ),
    "widening": Picture(
        ".png", partial(widening, times=np.geomspace(1e-4, 10.0, 41), points=4097), partial(png, draw_widening)
    ),
    "relaxation": Picture(
        ".gif",
        partial(
            relaxations,
            times=(0.0, *np.geomspace(1e-3, 1.0, 71).tolist()),
            beta=1.0,
            names=("local_entropy", "moreau_envelope"),
            points=641,
        ),
        animate,
    ),
}
