"""The Langevin steps of an inner loop: their options, the state that they need and the numbers that they come to."""

from __future__ import annotations

import math
from typing import Any

import torch

from deeprelax_cuda.optim.options import check_choice, check_number
from deeprelax_cuda.steps import round_scalar

#: The options of a loop that has no more than inner_lr, at the values that leave out what it has not.
PLAIN: dict[str, Any] = {
    "temperature": 0.0,
    "averaging": "last",
    "inner_momentum": 0.0,
    "dampening": 0.0,
    "coupling_in_momentum": True,
    "reset_inner_momentum": False,
}


def check_langevin(group: dict[str, Any]) -> None:
    """Refuse an option of the inner loop, by its name."""
    check_number("inner_lr", group["inner_lr"], "[0, inf)")
    check_number("temperature", group["temperature"], "[0, inf)")
    check_number("inner_momentum", group["inner_momentum"], "[0, 1)")
    check_number("dampening", group["dampening"], "[0, 1]")
    check_averaging(group["averaging"])


def check_averaging(averaging: Any) -> None:
    """Refuse what is not the weight of an old average, "linear" or "last"."""
    if isinstance(averaging, str):
        check_choice("averaging", averaging, ("linear", "last"))
    else:
        check_number("averaging", averaging, "[0, 1)")


def weight_of_sample(averaging: Any) -> float:
    """Return the weight of the new sample; that of "linear" goes by the count."""
    if isinstance(averaging, str):
        check_choice("averaging", averaging, ("linear", "last"))
        return 1.0
    return 1.0 - float(averaging)


def langevin_roles(group: dict[str, Any]) -> list[str]:
    """Return the names of the state that the inner loop needs."""
    roles = ["momentum"] if group["inner_momentum"] != 0.0 else []
    return [*roles, "period_steps"] if group["averaging"] == "linear" else roles


def langevin_scalars(group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the numbers of an inner step, but for the coupling."""
    inner_lr = float(group["inner_lr"])
    variance = 2.0 * inner_lr * float(group["temperature"])
    if variance < 0.0:
        raise ValueError(f"temperature: expected 0 or more with inner_lr={inner_lr}, got {group['temperature']}")
    mu = round_scalar("inner_momentum", group["inner_momentum"], dtype)
    return {
        "eta": round_scalar("inner_lr", inner_lr, dtype),
        "s": round_scalar("noise std", math.sqrt(variance), dtype),
        "a": round_scalar("1 - averaging", weight_of_sample(group["averaging"]), dtype),
        "mu": mu,
        "damp1": round_scalar("1 - dampening", 1.0 - group["dampening"], dtype),
        "nesterov": bool(group["nesterov"]) and mu != 0.0,
        "coupling_in_momentum": bool(group["coupling_in_momentum"]),
    }
