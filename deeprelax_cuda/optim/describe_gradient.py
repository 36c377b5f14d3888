"""The inner loops that average the gradient in words: the fixed point of Hamilton-Jacobi, and the Gaussian average of HEAT."""

from __future__ import annotations

import math
from typing import Any

from deeprelax_cuda.optim.describe import Notes, Seen, digits_notes, drift_notes, number, setting, type_name

#: Curvatures, times gamma, at which the rate of the fixed point is given.
CURVATURES = (0.1, 1.0)


def perturbation(group: dict[str, Any]) -> float:
    """Return the standard deviation of y about x in HEAT, sqrt(gamma*T)."""
    return math.sqrt(max(float(group["gamma"]) * float(group["temperature"]), 0.0))


def fixed_point_notes(group: dict[str, Any], averaging: float | str, seen: Seen) -> Notes:
    """Say how far from x the fixed point looks, and for which curvatures it contracts."""
    notes = Notes()
    gamma, length = float(group["gamma"]), group["inner_steps"]
    notes += drift_notes(seen, gamma, gamma, "from x to where gradients are taken, gamma")
    if averaging == "linear":
        words = f'averaging="linear": p is the plain mean of the {length} gradients of a period; the j-th multiplies the '
        notes.line("damping", "1/j", words + "distance to p by 1 - (1 + gamma*h)/j")
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
    idle = [name for name, unused in (("inner_lr", 0.1), ("inner_momentum", 0.0)) if group[name] != unused]
    notes.advise(bool(idle), f'{" and ".join(idle)}: without effect, as inner="fixed_point".')
    notes.advise(bool(group["nesterov"]) and not group["momentum"], "nesterov=True is ignored, as momentum is 0.")
    size = gamma * seen.gradient_rms
    lost = digits_notes({"drift gamma*p": size}, seen.coarsest, {}, "it wants a larger gamma or wider parameters")
    return notes + (lost if seen.gradients and size == size else Notes())


def heat_notes(group: dict[str, Any], seen: Seen) -> Notes:
    """Say how far about x the gradients are taken, and over how many their mean goes."""
    notes = Notes()
    std, length = perturbation(group), group["inner_steps"]
    words = f"standard deviation of y about x, sqrt(gamma*T) for temperature T = 1/beta = {number(float(group['temperature']))}"
    if std:
        words += f"; a wave of length {number(2.0 * math.pi * std)} is damped to 0.61 of its height, a longer one less"
    notes.line("perturbation", number(std), words)
    notes.advise(bool(group["nesterov"]) and not group["momentum"], "nesterov=True is ignored, as momentum is 0.")
    notes.advise(std == 0.0, "temperature=0: nothing is smoothed; p is the mean of gradients at x, as of a larger batch.")
    for dtype, size in seen.shown.items():
        part = std / size if size > 0.0 else 0.0
        name = type_name(dtype)
        notes.line("", number(part), f"of the size {number(size)} of the {name} weights")
        notes.advise(
            part > 1.0,
            f"The perturbation {number(std)} is {number(part)} times the size of the {name} weights: the gradients are taken "
            "far from anything that was trained. A smaller gamma or temperature.",
        )
    notes.line("mean", f"{length}", f"gradients in p; {length - 1} in the first period, which does not count the one at x")
    return notes + digits_notes({"perturbation": std}, seen.coarsest, {}, "it wants a larger temperature or wider parameters")
