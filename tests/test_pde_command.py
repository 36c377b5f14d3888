"""`deeprelax pde`: the files it writes, that their numbers are those of the solvers and of the theory, and how it refuses."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402

from deeprelax_cuda import pde_command, storage  # noqa: E402
from deeprelax_cuda.cli import main  # noqa: E402
from deeprelax_cuda.colours import COLOURS  # noqa: E402
from deeprelax_cuda.pde import (  # noqa: E402
    Grid,
    differences,
    fokker_planck,
    heat,
    local_entropy,
    moreau_envelope,
    pictures,
    rugged,
    studies,
    valleys,
)

verification = importlib.import_module("deeprelax_cuda.pde.verify")

#: What the studies are asked for here: coarser grids, fewer times.
COARSE: dict[str, dict[str, Any]] = {
    "relaxations-1d": {"points": 513},
    "landscape-2d": {"points": 71},
    "control": {"points": 257, "steps": 200, "shown": 10, "every": 1},
    "widening": {"points": 2049, "times": np.geomspace(1e-4, 10.0, 21)},
    "relaxation": {"points": 129, "times": (0.0, *np.geomspace(1e-3, 1.0, 14))},
}
Numbers = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def coarse() -> dict[str, pictures.Picture]:
    return {name: made._replace(study=partial(made.study, **COARSE[name])) for name, made in pictures.PICTURES.items()}


@pytest.fixture(scope="module")
def drawn(coarse: dict[str, pictures.Picture], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command has drawn its pictures into."""
    folder = tmp_path_factory.mktemp("pde") / "new" / "pictures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "PICTURES", coarse)
        assert main(["pde", "--out", str(folder), "--quiet"]) == 0
    return folder


def read(path: Path) -> Numbers:
    """Return the columns of a table by their names."""
    names = path.read_text().partition("\n")[0].split(",")
    return dict(zip(names, np.loadtxt(path, delimiter=",", skiprows=1, unpack=True), strict=True))


def at(numbers: Numbers, name: str, value: float) -> Numbers:
    """Return the rows in which the column ``name`` is ``value``."""
    rows = numbers[name] == value
    assert rows.any()
    return {column: values[rows] for column, values in numbers.items()}


# The files.


def test_there_is_a_picture_and_a_table_for_each_and_nothing_else(drawn: Path) -> None:
    pairs = [(f"{name}.csv", f"{name}{picture.suffix}") for name, picture in pictures.PICTURES.items()]
    names = sorted(name for pair in [*pairs, ("widening-envelopes.csv",)] for name in pair)
    assert sorted(path.name for path in drawn.iterdir()) == names


#: Parts of a picture: top, bottom, left, right.
LEFT, RIGHT, BELOW_LEFT = (0.0, 1.0, 0.0, 0.5), (0.0, 1.0, 0.5, 1.0), (0.5, 1.0, 0.0, 0.5)
THIRDS = [(0.1, 0.85, i / 3.0, (i + 1) / 3.0) for i in range(3)]


@pytest.mark.parametrize(
    ("name", "colours", "parts"),
    [
        ("relaxations-1d", (0, 1, 2), THIRDS),
        ("landscape-2d", (1,), [LEFT, RIGHT]),
        ("control", (0, 1), [BELOW_LEFT, RIGHT]),
        ("widening", (0, 1, 2), [LEFT, RIGHT]),
    ],
)
def test_a_picture_is_large_and_has_its_colours_and_white_margins(
    drawn: Path, name: str, colours: tuple[int, ...], parts: list[tuple[float, ...]]
) -> None:
    with Image.open(drawn / f"{name}.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255.0
    height, width, _ = pixels.shape
    assert width >= 1600
    assert height >= 800
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert np.all(edge == 1.0), "something is cut off"
    for top, bottom, left, right in parts:
        part = pixels[int(top * height) : int(bottom * height), int(left * width) : int(right * width)]
        for colour in colours:
            assert (np.abs(part - to_rgb(COLOURS[colour])).max(axis=-1) < 0.02).sum() > 100, COLOURS[colour]


def lines_of(axes: Axes, label: str) -> list[np.ndarray]:
    """Return the heights of the lines that have a label."""
    return [np.asarray(line.get_ydata()) for line in axes.get_lines() if line.get_label() == label]


def test_relaxations_are_drawn_as_they_are(coarse: dict[str, pictures.Picture]) -> None:
    study = coarse["relaxations-1d"].study()
    panels = pictures.draw_relaxations(study).axes
    assert [axes.get_title() for axes in panels] == [f"t = {t:g}" for t in study.times]
    for i, axes in enumerate(panels):
        for name, u in study.relaxed.items():
            (line,) = lines_of(axes, pictures.LINES[name]["label"])
            np.testing.assert_array_equal(line, u[i])
        dots = {float(line.get_ydata()[0]) for line in axes.get_lines() if line.get_marker() == "o"}
        assert dots == {u[i].min() for u in study.relaxed.values()}


def test_the_landscape_is_drawn_as_it_is(coarse: dict[str, pictures.Picture]) -> None:
    study = coarse["landscape-2d"].study()
    axes = pictures.draw_plane(study).axes
    flat = [one for one in axes if "minima" in one.get_title()]
    assert [one.get_title().rpartition(": ")[2] for one in flat] == ["35 minima", "2 minima"]
    surfaces = [one for one in axes if hasattr(one, "get_zlim")]
    for surface, u in zip(surfaces, (study.f, study.local_entropy), strict=True):
        assert surface.zz_dataLim.intervalx.tolist() == pytest.approx([u.min(), u.max()], abs=0.03)


def test_the_control_is_drawn_as_it_is(coarse: dict[str, pictures.Picture]) -> None:
    study = coarse["control"].study()
    _, below, right = pictures.draw_steering(study).axes
    np.testing.assert_array_equal(lines_of(below, "SGD")[0], study.sgd[-1])
    np.testing.assert_array_equal(lines_of(below, "controlled SGD")[0], study.controlled[-1])
    np.testing.assert_array_equal(lines_of(right, "E V, SGD")[0], study.loss_of_sgd)
    np.testing.assert_array_equal(lines_of(right, "E V, controlled")[0], study.loss_of_controlled)
    cost = study.loss_of_controlled + study.effort
    np.testing.assert_array_equal(lines_of(right, "E V + effort, controlled")[0], cost)
    assert f"E V + effort = {cost[-1]:.2f} ≤ {study.loss_of_sgd[-1]:.2f} = E V of SGD" in right.get_title()


def test_widening_is_drawn_as_it_is(coarse: dict[str, pictures.Picture]) -> None:
    study = coarse["widening"].study()
    left, right = pictures.draw_widening(study).axes
    for line in left.get_lines():
        label = str(line.get_label())
        if label.startswith("t = "):
            nearest = int(np.argmin(np.abs(np.log(study.times / float(label[4:])))))
            np.testing.assert_array_equal(line.get_ydata(), study.envelopes[nearest])
    crosses = sorted(float(line.get_xdata()[0]) for line in right.get_lines() if line.get_marker() == "X")
    assert crosses == sorted(study.ends[np.isfinite(study.ends)])
    assert f"at most {100.0 * study.error():.2g} % away" in right.get_title()
    assert study.error() == np.nanmax(np.abs(study.curvatures / study.predicted() - 1.0))
    for i, end in enumerate(study.ends):  # rows stop there
        stays = study.times[np.isfinite(study.curvatures[i])]
        assert stays.max() <= end
        assert np.all(study.times[study.times > stays.max()] >= end * (1.0 - 1e-9))


def test_summaries_say_what_the_tables_have(coarse: dict[str, pictures.Picture]) -> None:
    study = coarse["relaxations-1d"].study()
    x = study.grid.axes[0]
    at_last = ", ".join(f"{name.replace('_', ' ')} {x[u[-1].argmin()]:.2f}" for name, u in study.relaxed.items())
    assert study.summary() == f"lowest point of f at x = {x[study.f.argmin()]:.2f}; at t = 0.3, {at_last}"
    plane = coarse["landscape-2d"].study()
    assert f"f has 35 minima, the lowest {plane.f.min():.3f} at (1.00, -1.00)" in plane.summary()
    assert f"2 minima, the lowest {plane.local_entropy.min():.3f} at (-0.50, 0.25)" in plane.summary()


def test_the_animation_loops_and_goes_on_with_every_frame(drawn: Path) -> None:
    frames = []
    with Image.open(drawn / "relaxation.gif") as animation:
        assert animation.info["loop"] == 0
        for i in range(animation.n_frames):
            animation.seek(i)
            frames.append(np.asarray(animation.convert("RGB"), dtype=int))
    assert len(frames) == 15
    for before, after in itertools.pairwise(frames):
        moved = (np.abs(after - before).max(axis=-1) > 50).any(axis=1)
        assert moved[: len(moved) // 6].any(), "the clock stands still"
        assert moved[len(moved) // 4 :].any(), "the curves stand still"
    for colour in (0, 1):
        drawn_in = np.abs(frames[-1] / 255.0 - to_rgb(COLOURS[colour])).max(axis=-1) < 0.05
        assert drawn_in.sum() > 200, COLOURS[colour]


@pytest.mark.slow
def test_the_real_animation_has_a_length_and_a_size_to_be_sent() -> None:
    """Drawn from made-up numbers: what takes time is to solve for the true ones."""
    times = pictures.PICTURES["relaxation"].study.keywords["times"]
    grid = Grid(-4.0, 4.0, 513)
    f = rugged().on(grid)
    fading = np.stack([f * math.exp(-3.0 * t) for t in times])
    made = studies.Relaxations(grid, 1.0, tuple(times), f, {"local_entropy": fading, "moreau_envelope": fading - 0.3})
    content = pictures.animate(made)
    assert 60 <= len(times) <= 100
    assert len({f"{t:.4f}" for t in times}) == len(times), "the clock stands still"
    with Image.open(BytesIO(content)) as animation:
        shown = [(animation.seek(i), animation.info["duration"])[1] for i in range(animation.n_frames)]
    assert shown[0] == shown[-1] == pictures.HELD
    assert set(shown[1:-1]) == {pictures.MILLISECONDS}
    assert len(content) < 2_000_000


# The numbers.


@pytest.mark.parametrize("name", COARSE)
def test_a_table_has_the_numbers_of_the_study_to_the_last_bit(
    drawn: Path, coarse: dict[str, pictures.Picture], name: str
) -> None:
    for ending, columns in coarse[name].study().tables().items():
        numbers = read(drawn / f"{name}{ending}.csv")
        assert list(numbers) == list(columns)
        for column, values in columns.items():
            np.testing.assert_array_equal(numbers[column], values, err_msg=column)


@pytest.mark.parametrize("name", ["relaxations-1d", "relaxation"])
def test_relaxations_are_the_solvers(drawn: Path, name: str) -> None:
    numbers, points = read(drawn / f"{name}.csv"), COARSE[name]["points"]
    grid = Grid(-4.0, 4.0, points)
    f, beta = rugged().on(grid), pictures.PICTURES[name].study.keywords["beta"]
    times = np.unique(numbers["t"])
    assert len(times) == len(COARSE[name].get("times", (0.03, 0.1, 0.3)))
    for t in times:
        there = at(numbers, "t", t)
        np.testing.assert_array_equal(there["x"], grid.axes[0])
        np.testing.assert_array_equal(there["f"], f)
        solved = {
            "local_entropy": local_entropy(f, grid, t, beta).value if t else f,
            "moreau_envelope": moreau_envelope(f, grid, t).value if t else f,
        }
        if name == "relaxations-1d":
            solved["heat"] = heat(f, grid, t, beta).value
        assert {*there} == {"beta", "t", "x", "f", *solved}
        assert np.all(there["beta"] == beta)
        for column, u in solved.items():
            np.testing.assert_array_equal(there[column], u)


def test_relaxations_are_in_the_order_that_theory_has_them_in(drawn: Path) -> None:
    """Local entropy <= heat, by Jensen; local entropy <= Moreau envelope + log(1 + C t)/(2 beta), by comparison.

    With C = sup f_xx the Moreau envelope u has u_xx <= C/(1 + C t), so that u + log(1 + C t)/(2 beta) grows at least as fast as
    the viscous equation asks. Without that term there is no order: local entropy is higher where f is convex, lower where not.
    """
    numbers = read(drawn / "relaxations-1d.csv")
    grid, beta = Grid(-4.0, 4.0, 513), 1.0
    f = rugged().on(grid)
    curvature, tiny = float(differences(f, grid).hessian.max()), 1e-9
    for t in np.unique(numbers["t"]):
        there = at(numbers, "t", t)
        warm, smooth, sharp = there["heat"], there["local_entropy"], there["moreau_envelope"]
        assert f.min() < smooth.min()
        assert np.all(smooth < warm + tiny)
        assert warm.max() < f.max() + tiny
        assert np.all(sharp < f + tiny)
        assert f.min() - curvature * grid.spacing[0] ** 2 / 8.0 < sharp.min() < f.min() + tiny  # f is lower between the nodes
        assert np.argmin(sharp) == np.argmin(f)
        assert np.all(smooth < sharp + math.log1p(curvature * t) / (2.0 * beta) + tiny)
    early = at(numbers, "t", 0.03)
    below = early["local_entropy"] < early["moreau_envelope"] - 0.01
    assert below.any()
    assert not below.all()


def test_the_lowest_point_moves_from_the_hole_to_the_wide_valley(drawn: Path) -> None:
    numbers, n = read(drawn / "landscape-2d.csv"), COARSE["landscape-2d"]["points"]
    grid = Grid((-1.75, -1.75), (1.75, 1.75), (n, n))
    f, u = numbers["f"].reshape(grid.shape), numbers["local_entropy"].reshape(grid.shape)
    keywords = pictures.PICTURES["landscape-2d"].study.keywords
    np.testing.assert_array_equal(numbers["x"].reshape(grid.shape), grid.nodes[0])
    np.testing.assert_array_equal(numbers["y"].reshape(grid.shape), grid.nodes[1])
    np.testing.assert_array_equal(u, local_entropy(f, grid, keywords["t"], keywords["beta"]).value)
    for name, values, place in (("f", f, (1.0, -1.0)), ("local_entropy", u, (-0.5, 0.25))):
        lowest = np.argmin(values)
        assert (numbers["x"][lowest], numbers["y"][lowest]) == pytest.approx(place, abs=0.06)
        assert numbers[f"minimum_of_{name}"][lowest] == 1.0
    count = {name: int(numbers[f"minimum_of_{name}"].sum()) for name in ("f", "local_entropy")}
    assert count == {"f": 35, "local_entropy": 2}  # of the function, and not of its nodes: so it is of finer ones


def test_minima_are_as_wide_as_the_law_has_it_until_a_lower_valley_takes_over(drawn: Path) -> None:
    numbers, times = read(drawn / "widening.csv"), COARSE["widening"]["times"]
    law = numbers["lambda"] / (1.0 + numbers["t"] * numbers["lambda"])
    np.testing.assert_allclose(numbers["lambda/(1+t*lambda)"], law, rtol=1e-14)
    # order 2 in h; the narrowest valley is 0.025 wide, 13 spacings
    np.testing.assert_allclose(numbers["curvature"], law, rtol=2e-3)
    grid = Grid(-2.0, 2.0, COARSE["widening"]["points"])
    x = grid.axes[0]
    landscape = valleys([(-1.0,), (0.1,), (0.5,)], depths=[2.0, 1.0, 0.5], widths=[0.4, 0.1, 0.025])
    f = landscape.on(grid)
    places = np.unique(numbers["x"])
    np.testing.assert_allclose(places, [-1.0, 0.1, 0.5], atol=0.01)
    lambdas = [at(numbers, "x", place)["lambda"][0] for place in places]
    # alone a valley has depth/width^2: another's tail is what is left
    np.testing.assert_allclose(lambdas, [12.5, 100.0, 800.0], rtol=0.03)
    for place, kept in zip(places, ("all", "some", "some"), strict=True):
        there = at(numbers, "x", place)["t"]
        node = int(np.argmin(np.abs(x - place)))
        # by its definition: as long as no y is better than the place itself
        stays = [t for t in times if np.all(f + (x - place) ** 2 / (2.0 * t) >= f[node])]
        np.testing.assert_array_equal(there, stays)
        assert (len(stays) == len(times)) == (kept == "all")


def test_the_control_gains_more_than_its_effort(drawn: Path) -> None:
    """E V(controlled) <= E V(SGD) - effort, and from one start the closed form of Hopf and Cole.

    The law at the end is SGD's times exp(-beta V), brought to mass 1, and the least E V + effort -(1/beta) log E exp(-beta V),
    the expectation over SGD. The scheme comes there with order 1 in h and in the step.
    """
    numbers, n = read(drawn / "control.csv"), COARSE["control"]["points"]
    beta = pictures.PICTURES["control"].study.keywords["beta"]
    grid = Grid(-2.5, 2.5, n)
    landscape = rugged(ripple=0.6, noise=0.2, seed=7)
    loss = landscape.on(grid)
    times = np.unique(numbers["s"])
    assert (len(times), times[0], times[-1]) == (11, 0.0, 1.0)
    for s in times:
        there = at(numbers, "s", s)
        np.testing.assert_array_equal(there["V"], loss)
        for who in ("sgd", "controlled"):
            assert grid.integrate(there[f"density_{who}"]) == pytest.approx(1.0, abs=1e-12)
            assert grid.integrate(there[f"density_{who}"] * loss) == pytest.approx(there[f"E_V_{who}"][0], abs=1e-12)
    begin, end = at(numbers, "s", 0.0), at(numbers, "s", 1.0)
    np.testing.assert_array_equal(begin["density_controlled"], begin["density_sgd"])
    assert begin["x"][np.argmax(begin["density_sgd"])] == pytest.approx(-1.5, abs=grid.spacing[0])
    downhill, step = -landscape.gradient_on(grid), 1.0 / COARSE["control"]["steps"]
    descended = fokker_planck(begin["density_sgd"], grid, [1.0], downhill, 0.5 / beta, step=step)[0]
    np.testing.assert_allclose(end["density_sgd"], descended, atol=1e-10)

    sgd, controlled, effort = (float(end[name][0]) for name in ("E_V_sgd", "E_V_controlled", "effort"))
    assert effort > 0.1
    assert controlled <= sgd - effort
    law = end["density_sgd"] * np.exp(-beta * loss)
    least = -math.log(grid.integrate(law)) / beta
    assert controlled + effort == pytest.approx(least, abs=0.04)
    assert np.abs(law / grid.integrate(law) - end["density_controlled"]) @ grid.weights < 0.1
    np.testing.assert_allclose(end["alpha"], np.gradient(loss, grid.spacing[0], edge_order=2), atol=1e-12)  # u(., T) = V


def test_the_effort_in_time_ends_at_that_of_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def kept(*args: Any, **options: Any) -> Any:
        made.append(solve(*args, **options))
        return made[-1]

    solve = studies.control
    monkeypatch.setattr(studies, "control", kept)
    steering = studies.steering(1.0, 3.0, -1.5, points=65, steps=40, shown=4)
    assert steering.effort[-1] == pytest.approx(made[0].effort, rel=1e-12)
    assert steering.loss_of_controlled[-1] == pytest.approx(made[0].terminal_controlled, rel=1e-12)
    assert np.all(np.diff(steering.effort) > 0.0)


def test_a_minimum_is_lower_than_all_its_neighbours_and_on_no_wall() -> None:
    line = Grid(0.0, 1.0, 9)
    assert [*studies.minima([0.0, 1.0, 0.0, 1.0, 1.0, 0.5, 0.5, 1.0, 0.0], line)[0]] == [2]
    square = Grid((0.0, 0.0), (1.0, 1.0), (5, 6))
    values = np.ones(square.shape)
    values[1, 1], values[2, 2], values[3, 4], values[0, 3] = 0.5, 0.4, 0.3, -1.0
    assert {(int(i), int(j)) for i, j in zip(*studies.minima(values, square), strict=True)} == {(2, 2), (3, 4)}


@pytest.mark.parametrize("variables", [1, 2])
def test_valleys_have_the_gradient_they_say_in_numpy_and_in_torch(variables: int) -> None:
    centres = [(0.2, -0.1)[:variables], (-1.0, 0.5)[:variables]]
    landscape = valleys(centres, depths=[1.0, 2.0], widths=[0.3, 0.7], ripple=0.2, length=0.4)
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (variables, 50))
    h = 1e-5
    for i, partial_derivative in enumerate(landscape.gradient(*x)):
        step = h * np.eye(variables)[i][:, None]
        difference = (landscape.value(*(x + step)) - landscape.value(*(x - step))) / (2.0 * h)
        np.testing.assert_allclose(partial_derivative, difference, atol=1e-7)
    there = torch.from_numpy(x)
    np.testing.assert_allclose(landscape.value(*there), landscape.value(*x), atol=1e-14)
    np.testing.assert_allclose(torch.stack(landscape.gradient(*there)), landscape.gradient(*x), atol=1e-13)


def test_a_valley_alone_has_the_depth_and_the_curvature_it_says() -> None:
    landscape = valleys([(0.5, 0.0)], depths=[2.0], widths=[0.4])
    h = 1e-4
    assert landscape.value(np.float64(0.5), np.float64(0.0)) == -2.0
    slope = landscape.gradient(np.float64(0.5 + h), np.float64(0.0))
    assert slope == pytest.approx((12.5 * h, 0.0), rel=1e-6)


# The verification.


ROW: dict[str, Any] = {
    "landscape": "rugged",
    "method": "HamiltonJacobi",
    "backend": "eager",
    "t": 0.01,
    "beta": math.inf,
    "anchors": 8,
    "copies": 1,
    "gradients": 400,
    "numbers": 8,
    "precision": 0.0,
    "error": 1e-9,
    "bound": 1e-6,
    "from_f": 0.5,
    "from_half": None,
    "same_bits": None,
}


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Rows that a verification, which is not done here, gives; and how it was asked, put in front once it was."""
    rows = [verification.Row(**ROW)]

    def verify(device: torch.device, names: list[str] | None, *, progress: Any) -> list[Any]:
        found = list(rows)
        progress("rugged: HamiltonJacobi, eager")
        rows.insert(0, (str(device), names))
        return found

    monkeypatch.setattr(verification, "verify", verify)
    return rows


def test_verify_alone_prints_the_table_and_writes_nothing(
    verified: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pde", "--verify"]) == 0
    said = capsys.readouterr()
    assert said.out == verification.table(verified[1:]) + "\n"
    assert said.err == "rugged: HamiltonJacobi, eager\n"
    assert verified[0] == ("cpu", None)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_does_not_agree_is_status_1_and_in_the_files(
    verified: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "PICTURES", {})
    verified[:] = [replace(verified[0], error=1e-3), verified[0]]
    rows = list(verified)
    assert main(["pde", "--verify", "--out", str(tmp_path / "out"), "--device", "cpu", "--backend", "eager", "--quiet"]) == 1
    assert verified[0] == ("cpu", ["eager"])
    assert capsys.readouterr().err == ""
    assert (tmp_path / "out" / pde_command.TABLE).read_text() == verification.table(rows) + "\n"

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads((tmp_path / "out" / pde_command.ROWS).read_text(), parse_constant=refuse)
    assert [row["agrees"] for row in saved] == [False, True]
    assert saved[1] == {**ROW, "beta": "inf", "agrees": True}


@pytest.mark.slow
def test_the_optimizers_follow_the_equations(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification itself, with fewer copies, through the command."""
    monkeypatch.setattr(verification, "verify", partial(verification.verify, quick=True, cases=verification.CASES[:1]))
    assert main(["pde", "--verify", "--backend", "eager", "--quiet"]) == 0
    assert "HamiltonJacobi" in capsys.readouterr().out


# What is said and refused.


def test_each_picture_is_named_when_it_begins_and_summed_up_when_it_is_there(
    tmp_path: Path, coarse: dict[str, pictures.Picture], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "control"
    monkeypatch.setattr(pictures, "PICTURES", {name: coarse[name]})
    monkeypatch.chdir(tmp_path)
    assert main(["pde"]) == 0
    said = capsys.readouterr()
    assert said.err == f"{name}\n"
    end = at(read(tmp_path / "runs" / "pde" / f"{name}.csv"), "s", 1.0)
    sgd, controlled, effort = (float(end[column][0]) for column in ("E_V_sgd", "E_V_controlled", "effort"))
    costs = f"E V of SGD {sgd:.2f}, of controlled SGD {controlled:.2f} + effort {effort:.2f} = {controlled + effort:.2f}"
    assert said.out == f"{Path('runs') / 'pde' / name}.png, {name}.csv: {costs}\n"


def test_a_terminal_has_a_bar_that_is_gone_at_the_end(
    tmp_path: Path, coarse: dict[str, pictures.Picture], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "PICTURES", {"control": coarse["control"]})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["pde", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "control:   0%" in said.err
    assert said.err.rstrip(" ").endswith("\r")
    assert "E V of SGD" in said.out


def test_a_folder_is_one_command_s_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with storage.claimed(tmp_path), pytest.raises(SystemExit):
        main(["pde", "--out", str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"deeprelax pde: --out: another process is at work in {tmp_path}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "--device: needs --verify"),
        (["--backend", "eager"], "--backend: needs --verify"),
        (["--verify", "--device", "moon"], "--device: moon cannot be used: "),
        (["--verify", "--device", "hpu"], "--device: hpu cannot be used: "),  # torch looks for a module of that name
        (["--verify", "--backend", "none"], '--backend: backend="none": expected one of '),
        (["--out", "file"], "--out: "),
        (["--out", "file/below"], "--out: "),
        (["more"], "unrecognized arguments: more"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_any_work(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "PICTURES", {})
    monkeypatch.setattr(verification, "verify", lambda *_, **__: pytest.fail("verified"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["pde", *options])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"deeprelax pde: {message}")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_help_needs_none_of_the_optional_packages_and_work_names_what_is_missing(tmp_path: Path) -> None:
    done = python(f"""
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "scipy", "tqdm", "numpy", "PIL")))
from deeprelax_cuda.cli import main
print(main(["pde", "--out", {str(tmp_path / "new")!r}]))
main(["pde", "--help"])
""")
    assert done.returncode == 0, done.stderr
    status, _, rest = done.stdout.partition("\n")
    assert status == "2"
    assert "--verify" in rest
    assert done.stderr.splitlines()[-1] == 'deeprelax pde: numpy is not installed: pip install "deeprelax_cuda[pde]"'
    assert not (tmp_path / "new").exists()
