"""Where the time of training goes, without slowing it."""

from __future__ import annotations

import time

import torch

#: The parts of a gradient evaluation: fetching the batch; the loss and its gradients; the optimizer's step.
PARTS = ("data", "forward_backward", "optimizer")


class Stopwatch:
    """Adds up the seconds of the parts of a step.

    On a CUDA device the laps are events in the stream, read in bulk, so that no lap waits for the device; elsewhere they are
    readings of the clock.
    """

    #: Events are read when so many have come together.
    BULK = 4096

    def __init__(self, device: torch.device) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._cuda = device.type == "cuda"
        self._last = 0.0
        self._events: list[tuple[str, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step; the time since the last lap is not counted."""
        if self._cuda:
            self._record("")
        else:
            self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap, or since the start, as that of ``part``."""
        if self._cuda:
            self._record(part)
        else:
            now = time.perf_counter()
            self._seconds[part] += now - self._last
            self._last = now

    def read(self) -> dict[str, float]:
        """Return the seconds of each part so far; on a CUDA device this waits for what was recorded."""
        if self._events:
            self._events[-1][1].synchronize()
            for (_, before), (part, after) in zip(self._events, self._events[1:], strict=False):
                if part:
                    self._seconds[part] += before.elapsed_time(after) / 1e3
            del self._events[:-1]
        return dict(self._seconds)

    def set(self, seconds: dict[str, float]) -> None:
        """Go on from these sums."""
        self._events.clear()
        self._seconds = dict(seconds)

    def _record(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))  # not that of the current device, which may be another
        self._events.append((part, event))
        if len(self._events) >= self.BULK:
            self.read()
