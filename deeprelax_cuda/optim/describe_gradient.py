"""The inner loops that average the gradient in words: the fixed point of Hamilton-Jacobi, and the Gaussian average of HEAT."""

from __future__ import annotations

import math
from typing import Any

from deeprelax_cuda.optim.describe import Notes, Seen, digits_notes, number, setting

#: Curvatures, times gamma, at which the rate of the fixed point is given.
CURVATURES = (0.1, 1.0)


def perturbation(group: dict[str, Any]) -> float:
    """Return the standard deviation of y about x in HEAT, sqrt(gamma*T)."""
    return math.sqrt(max(float(group["gamma"]) * float(group["temperature"]), 0.0))


def fixed_point_notes(group: dict[str, Any], averaging: float | str, seen: Seen) -> Notes:
    """Say how far from x the fixed point looks, and for which curvatures it contracts."""
    notes = Notes()
    gamma, length = float(group["gamma"]), group["inner_steps"]
    notes += _drift("drift", gamma, seen, "gamma")
    if averaging == "linear":
        notes.line("damping", "1/j", f'averaging="linear": p is the plain mean of the {length} gradients of a period')
    else:
        a = 1.0 if averaging == "last" else 1.0 - float(averaging)
        most = (2.0 / a - 1.0) / gamma
        words = f"the weight of a new gradient in p; contracts for curvatures h from {number(-1.0 / gamma)} to {number(most)}: "
        notes.line("damping", number(a), words + "-1/gamma to (2/damping - 1)/gamma")
        for name, q in zip(("rate", ""), CURVATURES, strict=True):
            rate = 1.0 - a * (1.0 + q)
            words = f"of the distance to p is left a step at h = {setting(q)}/gamma = {number(q / gamma)}, "
            left = abs(rate) ** (length - 1)
            notes.line(name, number(abs(rate)), words + f"{number(left)} after the {length - 1} that follow the first")
    notes.advise(
        length == 1,
        "inner_steps=1: p is the gradient at x, and the method is SGD. It takes 2 or more to look at x - gamma*p.",
    )
    size = gamma * seen.gradient_rms
    lost = digits_notes({"drift gamma*p": size}, seen.shown, {}, "it wants a larger gamma or wider parameters")
    return notes + (lost if seen.gradients and size == size else Notes())


def heat_notes(group: dict[str, Any], seen: Seen) -> Notes:
    """Say how far about x the gradients are taken, and over how many their mean goes."""
    notes = Notes()
    std, length = perturbation(group), group["inner_steps"]
    words = f"standard deviation of y about x, sqrt(gamma*T) for temperature T = 1/beta = {number(float(group['temperature']))}"
    if std:
        words += f"; a wave of length {number(2.0 * math.pi * std)} is damped to 0.61 of its height, a longer one less"
    notes.line("perturbation", number(std), words)
    notes.advise(std == 0.0, "temperature=0: nothing is smoothed; p is the mean of gradients at x, as of a larger batch.")
    for dtype, size in seen.shown.items():
        part = std / size if size > 0.0 else 0.0
        name = str(dtype).removeprefix("torch.")
        notes.line("", number(part), f"of the size {number(size)} of the {name} weights")
        notes.advise(
            part > 1.0,
            f"The perturbation {number(std)} is {number(part)} times the size of the {name} weights: the gradients are taken "
            "far from anything that was trained. A smaller gamma or temperature.",
        )
    notes.line("mean", f"{length}", f"gradients in p; {length - 1} in the first period, which does not count the one at x")
    return notes + digits_notes({"perturbation": std}, seen.shown, {}, "it wants a larger temperature or wider parameters")


def _drift(name: str, step: float, seen: Seen, words: str) -> Notes:
    notes = Notes()
    if not seen.gradients:
        notes.line(name, "?", "no gradients are present: describe() after backward() says how far from x the next is taken")
    elif math.isnan(seen.gradient_rms):
        notes.line(name, "nan", "gradients hold inf or nan")
    else:
        size = step * seen.gradient_rms
        words = f"how far from x gradients are taken: {words} times the root mean square {number(seen.gradient_rms)} of them"
        notes.line(name, number(size), words)
    return notes
