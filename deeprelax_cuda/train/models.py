"""The networks that `deeprelax train` knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

WIDTH = 128


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a network of two hidden ReLU layers, the form of the papers' mnistfc at the size of small images."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, classes),
    )


#: name -> (shape of one input, number of classes) -> the network, its weights drawn from torch's global generator.
MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {"mlp": mlp}
