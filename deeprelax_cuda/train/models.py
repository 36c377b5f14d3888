"""The networks that `deeprelax train` knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Model:
    """How to build a network, and the methods' options that it was published with."""

    build: Callable[[Sequence[int], int], nn.Module]
    """(shape of one input, number of classes) -> the network, its weights drawn from torch's global generator."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """By their command-line names; one that is given on the command line goes before."""


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a network of two hidden ReLU layers of 128, the form of the papers' mnistfc at the size of small images."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


MODELS = {"mlp": Model(mlp)}
