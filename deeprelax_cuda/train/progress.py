"""What is seen while it trains: a bar on a terminal, a line an epoch elsewhere, or nothing."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Is told about every run, gradient step and evaluation of a comparison; this one says nothing."""

    def run(self, name: str) -> None:
        """A run begins."""

    def step(self) -> None:
        """A gradient step was taken."""

    def evaluated(self, epoch: int, loss: float, error: float) -> None:
        """An epoch ended with this mean loss (nats) and this validation error (%)."""

    def close(self) -> None:
        """No more is coming."""


class Bar(Progress):
    """One bar over all runs, so that the time left is the time until the result."""

    def __init__(self, steps: int) -> None:
        self._bar = tqdm(total=steps, unit="batch", dynamic_ncols=True)

    def run(self, name: str) -> None:
        self._bar.set_description(name)

    def step(self) -> None:
        self._bar.update()

    def evaluated(self, epoch: int, loss: float, error: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3g}, error {error:.2f} %", refresh=False)

    def close(self) -> None:
        self._bar.close()


class Lines(Progress):
    """One line an epoch on standard error, for logs."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._start = time.perf_counter()
        self._name = ""

    def run(self, name: str) -> None:
        self._name = name

    def evaluated(self, epoch: int, loss: float, error: float) -> None:
        elapsed = time.perf_counter() - self._start
        text = f"{self._name}: epoch {epoch}/{self._epochs}, loss {loss:.3g}, error {error:.2f} %, {elapsed:.1f} s"
        print(text, file=sys.stderr, flush=True)


def make_progress(*, steps: int, epochs: int, quiet: bool) -> Progress:
    """Return what suits standard error for runs of ``epochs`` epochs each and ``steps`` gradient steps in all."""
    if quiet:
        return Progress()
    return Bar(steps) if sys.stderr.isatty() else Lines(epochs)
