"""What a validation measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Measure:
    """A number that is better the lower it is: ``of_mean`` of the mean of ``sum`` over all predictions.

    ``sum`` takes outputs of shape (predictions, classes) and targets of shape (predictions,), and returns a scalar tensor.
    """

    name: str
    unit: str
    sum: Callable[[Tensor, Tensor], Tensor]
    of_mean: Callable[[float], float]

    @property
    def label(self) -> str:
        """The name with the unit, as in "validation error, %"."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def say(self, value: float) -> str:
        """Return a value with its name and unit, as in "error 1.25 %"."""
        return f"{self.name.removeprefix('validation ')} {value:.2f}" + (f" {self.unit}" if self.unit else "")


def _percents(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * (outputs.argmax(dim=1) != targets).sum()  # here, not of the mean: 100 * (700 / 10,000) is above 7


def _nats(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="sum")


def _exp(nats: float) -> float:
    return math.inf if nats > 700.0 else math.exp(nats)  # which raises beyond


MEASURES = {
    "error": Measure("validation error", "%", _percents, lambda mean: mean),
    "perplexity": Measure("validation perplexity", "", _nats, _exp),
}
