"""The steps of SGLD in words: drift, noise, the law they end in, and the coupling."""

from __future__ import annotations

import math
from typing import Any

from deeprelax_cuda.optim.constants import noise_std
from deeprelax_cuda.optim.describe import Notes, Seen, digits_notes, drift_notes, number, setting, suggestion
from deeprelax_cuda.optim.describe_langevin import CURVATURES, KEEPS_DIGITS


def sgld_notes(group: dict[str, Any], seen: Seen) -> Notes:
    """Say what the options of a group amount to, next to the gradients where there are some."""
    notes = Notes()
    lr, gamma, temperature = float(group["lr"]), float(group["gamma"]), float(group["temperature"])
    std, drift = noise_std(lr, temperature), lr * seen.gradient_rms
    limit = f"; stable for curvatures h + 1/gamma below {number(2.0 / lr)}" if lr else ""
    notes.line("step", number(lr), f"lr, the step along the gradient{limit}")
    if decay := group["weight_decay"]:
        notes.line("weight decay", number(decay), f"in the gradient: a part {number(lr * decay)} of y a step")
    notes += drift_notes(seen, lr, lr, "a step, lr")
    part = std / drift if seen.gradients and drift > 0.0 else math.nan
    words = f"standard deviation a step, sqrt(2*lr*T) for temperature T = 1/beta = {number(temperature)}"
    notes.line("noise", number(std), words + ("" if math.isnan(part) else f"; {number(part)} of the drift"))
    if std:
        for name, q in zip(("T_eff", "", ""), CURVATURES, strict=True):
            ratio = 1.0 / (1.0 - q / 2.0)
            words = (
                f"= {number(ratio)} T, the temperature of the samples at H = h + 1/gamma = {setting(q)}/lr = {number(q / lr)}"
            )
            notes.line(name, number(ratio * temperature), words)
    if gamma == math.inf:
        notes.line("coupling", "0", "gamma=inf: y is free, and there is no x")
    else:
        words = "stiffness 1/gamma"
        if temperature:
            words += f"; where f is flat, samples lie within sqrt(gamma*T) = {number(math.sqrt(gamma * temperature))} of x"
        if lr:
            words += f", and forget where they were in gamma/lr = {number(gamma / lr)} steps"
        notes.line("coupling", number(1.0 / gamma), words)
    notes.advise(lr == 0.0, "lr=0: the sample stands still.")
    notes.advise(bool(lr) and temperature == 0.0, "temperature=0: there is no noise, and this is gradient descent.")
    notes.advise(
        lr >= 2.0 * gamma,
        f"gamma={setting(gamma)}: the coupling makes the steps diverge, as lr/gamma = {number(lr / gamma)} is not below 2. "
        f"Set gamma={suggestion(lr)} or more, or a smaller lr.",
    )
    other = "it wants a larger lr"
    return notes + digits_notes({"noise": std, "drift": drift if seen.gradients else 0.0}, seen.held, KEEPS_DIGITS, other)
