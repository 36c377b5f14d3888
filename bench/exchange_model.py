"""The model of what collectives cost: messages * latency + bytes / bandwidth + bytes in memory / speed of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from deeprelax_cuda.bench.shapes import elements, resnet50
from deeprelax_cuda.replicas.groups import Facts

EXCHANGE, ALL_REDUCE = "exchange", "all_reduce"
FLOAT = 4  # bytes
#: Parle's default period.
PERIOD = 25


class Link(NamedTuple):
    """What the model knows of a network and of its computers."""

    latency: float
    """Seconds of a message, however short."""
    bandwidth: float
    """Bytes a second that each rank sends while all do."""
    memory: float
    """Bytes a second that each rank reads and writes in its memory while all do."""


class Cost(NamedTuple):
    """What a rank does for its part of a collective."""

    messages: int
    sent: float
    """Bytes to other ranks."""
    moved: float
    """Bytes read and written in its own memory, beside what the system does to send and to receive."""

    def seconds(self, link: Link) -> float:
        """Return the time that the model gives."""
        return self.messages * link.latency + self.sent / link.bandwidth + self.moved / link.memory


def exchange_cost(ranks: int, parameters: int) -> Cost:
    """Return the cost of an exchange: roll call, all-to-all, sum of a slice, all-gather."""
    whole = FLOAT * parameters
    part = whole / ranks
    facts = len(Facts._fields) * 8
    copied_in_and_checked = 3 * whole
    own_slices = 2 * 2 * part  # copied by both collectives
    summed = (ranks - 1) * 3 * part + 2 * part
    repeated = whole + part  # the mean, once for each rank
    return Cost(
        messages=3 * (ranks - 1),
        sent=2 * (ranks - 1) * part + (ranks - 1) * facts,
        moved=copied_in_and_checked + own_slices + summed + repeated,
    )


def all_reduce_cost(ranks: int, parameters: int) -> Cost:
    """Return the cost of a ring all-reduce."""
    part = FLOAT * parameters / ranks
    return Cost(messages=2 * (ranks - 1), sent=2 * (ranks - 1) * part, moved=(ranks - 1) * 3 * part)


COSTS: dict[str, Callable[[int, int], Cost]] = {EXCHANGE: exchange_cost, ALL_REDUCE: all_reduce_cost}

#: Links that are not at hand: assumptions, not measurements.
ASSUMED = {
    "10 Gbit/s Ethernet": Link(latency=50e-6, bandwidth=10e9 / 8, memory=10e9),
    "400 Gbit/s fabric": Link(latency=10e-6, bandwidth=400e9 / 8, memory=1e12),
}


def predictions() -> list[dict[str, Any]]:
    """Return seconds a step, for messages alone, of ResNet-50 over links that are assumed."""
    parameters = elements(resnet50())
    rows = []
    for name, link in ASSUMED.items():
        for ranks in (2, 4, 8):
            seconds = {kind: cost(ranks, parameters).seconds(link) for kind, cost in COSTS.items()}
            step = {"ddp": seconds[ALL_REDUCE], "parle": seconds[EXCHANGE] / PERIOD}
            rows.append({"link": name, "ranks": ranks, "parameters": parameters, "predicted_s_a_step": step})
    return rows
