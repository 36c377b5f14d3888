"""How the learning rate changes over the epochs. It is the outer step of the methods that have two."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

SCHEDULES = ("constant", "step", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule by epochs.

    "step" multiplies the rate by ``factor`` after each of the epochs ``drops``; "cosine" brings it to 0 along half a cosine
    over all epochs; "constant" leaves it alone.
    """

    kind: str = "constant"
    drops: tuple[int, ...] = ()
    factor: float = 1.0

    def make(self, optimizer: Optimizer, epochs: int) -> LRScheduler:
        """Return the scheduler of ``optimizer``, to be stepped at the end of every epoch."""
        if self.kind == "cosine":
            return CosineAnnealingLR(optimizer, T_max=epochs)
        return MultiStepLR(optimizer, milestones=list(self.drops), gamma=self.factor)
