"""What is seen while it trains: a bar on a terminal, a line an epoch elsewhere, or nothing."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Is told about every run, gradient step, epoch and evaluation of a comparison; this one says nothing."""

    def run(self, name: str) -> None:
        """A run begins or goes on."""

    def step(self) -> None:
        """A gradient step was taken."""

    def epoch(self, epoch: int, loss: float) -> None:
        """An epoch ended without an evaluation; ``loss`` is the mean since the last one, in nats."""

    def evaluated(self, epoch: float, loss: float, measured: str) -> None:
        """An evaluation, ``epoch`` epochs into the run, gave this."""

    def warn(self, message: str) -> None:
        """Something went wrong that does not end the training; this is said by all."""
        print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """No more is coming."""


class Bar(Progress):
    """One bar over all runs, so that the time left is the time until the result."""

    def __init__(self, steps: int, done: int) -> None:
        self._bar = tqdm(total=steps, initial=done, unit="batch", dynamic_ncols=True)

    def run(self, name: str) -> None:
        self._bar.set_description(name)

    def step(self) -> None:
        self._bar.update()

    def evaluated(self, epoch: float, loss: float, measured: str) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3g}, {measured}", refresh=False)

    def warn(self, message: str) -> None:
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Lines(Progress):
    """One line an epoch on standard error, for logs."""

    def __init__(self, steps: int, done: int, epochs: int) -> None:
        self._steps, self._done, self._epochs = steps, done, epochs
        self._taken = 0
        self._start = time.perf_counter()
        self._name = ""

    def run(self, name: str) -> None:
        self._name = name

    def step(self) -> None:
        self._taken += 1

    def epoch(self, epoch: int, loss: float) -> None:
        self._say(epoch, f"loss {loss:.3g}")

    def evaluated(self, epoch: float, loss: float, measured: str) -> None:
        self._say(epoch, f"loss {loss:.3g}, {measured}")

    def _say(self, epoch: float, what: str) -> None:
        elapsed = time.perf_counter() - self._start
        left = (self._steps - self._done - self._taken) * elapsed / max(1, self._taken)
        line = f"{self._name}: epoch {epoch:.4g}/{self._epochs}, {what}, {elapsed:.0f} s, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


def make_progress(*, steps: int, done: int, epochs: int, quiet: bool) -> Progress:
    """Return what suits standard error for runs of ``epochs`` epochs each, of whose ``steps`` gradient steps some are done."""
    if quiet:
        return Progress()
    return Bar(steps, done) if sys.stderr.isatty() else Lines(steps, done, epochs)
