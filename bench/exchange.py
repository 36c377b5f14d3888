"""An exchange of replicas beside the all-reduce of data parallelism: bytes and seconds, measured and predicted.

Processes of this machine, one thread each, talk by gloo over the loopback. For each number of ranks, in one run:

* the three figures of the model: seconds of a message that is empty, bytes a second that each rank sends while all do (each to
  the next), and bytes a second that each reads and writes in memory;
* for lists of float32 parameters, in turn: an exchange (`deeprelax_cuda.replicas.groups.OverRanks`) with its parts, and
  `torch.distributed.all_reduce` of as many numbers. A sample is the seconds of the slowest rank, after a barrier;
* for both the bytes that a rank hands to TCP, as its sockets count them, and the bytes on the loopback, which include TCP's
  headers and acknowledgements, and what other programs send meanwhile;
* LeNet trained by Parle over ranks and by DistributedDataParallel with SGD, in turn, a period each: bytes and seconds a step.

The model is T = messages * latency + bytes / bandwidth + bytes in memory / speed of memory. Loopback bandwidth is processor
time, and where there are more ranks than cores, ranks wait for each other: compare ratios within a run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import deeprelax_cuda as dr
from deeprelax_cuda import machine
from deeprelax_cuda.bench.exchange_model import (
    ALL_REDUCE,
    ASSUMED,
    COSTS,
    EXCHANGE,
    FLOAT,
    PERIOD,
    Link,
    all_reduce_cost,
    exchange_cost,
    predictions,
)
from deeprelax_cuda.bench.shapes import Shape, elements, resnet50
from deeprelax_cuda.bench.timing import summary, write_rows
from deeprelax_cuda.bench.wire import count_bytes
from deeprelax_cuda.replicas.groups import Facts, OverRanks
from deeprelax_cuda.train.models import lenet

#: Elements of the messages and of the buffers by which the bandwidths are measured.
PROBE = 2**22


def in_turn(contenders: dict[str, Callable[[], object]], seconds: float, most: int) -> dict[str, list[float]]:
    """Return samples of each, after two that are left out: for about so many seconds, at least five and at most ``most``."""

    def round_() -> torch.Tensor:
        samples = []
        for work in contenders.values():
            dist.barrier()
            start = time.perf_counter()
            work()
            samples.append(time.perf_counter() - start)
        slowest = torch.tensor(samples, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest

    round_()
    first = float(round_().sum())
    rounds = min(most, max(5, int(seconds / first)))
    columns = torch.stack([round_() for _ in range(rounds)]).T.tolist()
    return dict(zip(contenders, columns, strict=True))


def to_the_next(message: torch.Tensor) -> Callable[[], None]:
    """Return what sends a message to the next rank while one comes from the rank before."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(message)

    def shift() -> None:
        works = [dist.irecv(received, (rank - 1) % ranks), dist.isend(message, (rank + 1) % ranks)]
        for work in works:
            if work is not None:
                work.wait()

    return shift


def measure_link(seconds: float, probe: int) -> dict[str, Any]:
    """Return the figures of the model."""
    a, b = torch.ones(probe), torch.ones(probe)
    contenders: dict[str, Callable[[], object]] = {
        "empty message": to_the_next(torch.empty(0)),
        "message": to_the_next(a),
        "add": lambda: b.add_(a),
    }
    samples = in_turn(contenders, seconds, most=101)
    latency, message, add = (statistics.median(samples[name]) for name in contenders)
    link = Link(latency, FLOAT * probe / max(message - latency, 1e-9), 3 * FLOAT * probe / add)
    return {"link": link._asdict(), "samples": {name: summary(times) for name, times in samples.items()}}


@contextmanager
def parts_timed(parts: dict[str, list[float]]) -> Iterator[None]:
    """Have the exchanges of this rank leave the seconds of their parts; the all-gather is gloo's second all-to-all."""

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = work(*args, **kwargs)
            parts.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return call

    with (
        mock.patch.object(OverRanks, "_roll_call", timed("roll call", OverRanks._roll_call)),
        mock.patch.object(dist, "all_to_all_single", timed("both", dist.all_to_all_single)),
        mock.patch.object(OverRanks, "mean", timed("whole", OverRanks.mean)),
    ):
        yield
    both = parts.pop("both")
    parts["all-to-all"], parts["all-gather"] = both[::2], both[1::2]
    whole = parts.pop("whole")
    parts["copies and sum"] = [all_ - sum(some) for all_, *some in zip(whole, *parts.values(), strict=True)]


def measure_list(name: str, shapes: Sequence[Shape], link: Link, seconds: float) -> dict[str, Any]:
    """Return a row: an exchange of a list of parameters and an all-reduce of as many numbers."""
    ranks, parameters = dist.get_world_size(), elements(shapes)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    flat = torch.zeros(parameters)
    group, facts = OverRanks(dist.distributed_c10d._get_default_group()), Facts(0, 0, PERIOD, parameters=0)
    contenders: dict[str, Callable[[], object]] = {
        EXCHANGE: lambda: group.mean([tensors], [facts]),
        ALL_REDUCE: lambda: dist.all_reduce(flat),
    }
    parts: dict[str, list[float]] = {}
    with parts_timed(parts):
        samples = in_turn(contenders, seconds, most=101)
    row: dict[str, Any] = {"parameters": name, "elements": parameters, "tensors": len(shapes), "rounds": len(samples[EXCHANGE])}
    for kind, work in contenders.items():
        cost, middle = COSTS[kind](ranks, parameters), summary(samples[kind])
        predicted = cost.seconds(link)
        row[kind] = {
            **middle,
            "predicted_s": predicted,
            "measured_over_predicted": middle["median_s"] / predicted,
            "predicted_bytes": cost.sent,
            "bytes": count_bytes(work),
        }
    row["exchange_over_all_reduce"] = row[EXCHANGE]["median_s"] / row[ALL_REDUCE]["median_s"]
    row["parts_median_s"] = {part: statistics.median(times) for part, times in parts.items()}
    return row


# ---- A training loop ----------------------------------------------------------------------------------------------------


def measure_training(periods: int) -> dict[str, Any]:
    """Return a row: LeNet by Parle over ranks, and by DistributedDataParallel with SGD."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    models = [lenet((1, 28, 28), 10) for _ in range(2)]
    parle = dr.Parle(models[0].parameters(), group=dist.group.WORLD, inner_steps=PERIOD, seed=0)
    parallel = DistributedDataParallel(models[1])
    sgd = torch.optim.SGD(parallel.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(8, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (8,), generator=generator)

    def period(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def work() -> None:
            for _ in range(PERIOD):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

        return work

    contenders: dict[str, Callable[[], object]] = {"parle": period(models[0], parle), "ddp": period(parallel, sgd)}
    samples = in_turn(contenders, seconds=0.0, most=periods)
    parameters = sum(p.numel() for p in models[0].parameters())
    predicted = {"parle": exchange_cost(ranks, parameters).sent / PERIOD, "ddp": all_reduce_cost(ranks, parameters).sent}
    row: dict[str, Any] = {"parameters": "LeNet", "elements": parameters, "inner_steps": PERIOD}
    for name, work in contenders.items():
        counted = {counter: None if n is None else n / PERIOD for counter, n in count_bytes(work, periods).items()}
        middle = summary([seconds / PERIOD for seconds in samples[name]])
        row[name] = {**middle, "predicted_bytes": predicted[name], "bytes": counted}
    row["ddp_bytes_over_parle"] = {
        counter: None if counted is None else row["ddp"]["bytes"][counter] / counted
        for counter, counted in row["parle"]["bytes"].items()
    }
    return row


# ---- The command --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What every rank measures."""

    lists: list[tuple[str, list[Shape]]]
    seconds: float
    """Of timed rounds for each list."""
    probe: int
    periods: int


def make_plan(sizes: Sequence[int] | None, quick: bool) -> Plan:
    """Return what the options ask for."""
    chosen = sizes or ([2**10, 2**16] if quick else [2**k for k in range(10, 25, 2)])
    lists: list[tuple[str, list[Shape]]] = [(f"{size:,}", [(size,)]) for size in chosen]
    if quick:
        return Plan(lists, seconds=0.1, probe=2**18, periods=1)
    return Plan([*lists, ("ResNet-50", resnet50())], seconds=2.0, probe=PROBE, periods=4)


def run_rank(rank: int, ranks: int, folder: str, plan: Plan) -> None:
    """Measure as one of the ranks; the first prints rows as they are made, and leaves them in the folder."""
    torch.set_num_threads(1)
    if loopback := next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None):
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
    dist.init_process_group("gloo", init_method=Path(folder, "store").as_uri(), rank=rank, world_size=ranks)
    rows: list[dict[str, Any]] = []

    def keep(kind: str, row: dict[str, Any]) -> None:
        rows.append({"kind": kind, "ranks": ranks, **row})
        if rank == 0:
            print(line(rows[-1]), flush=True)
            Path(folder, "rows.json").write_text(json.dumps(rows))

    keep("link", measure_link(plan.seconds, plan.probe))
    link = torch.tensor(list(rows[0]["link"].values()), dtype=torch.float64)
    dist.broadcast(link, 0)
    for name, shapes in plan.lists:
        keep("list", measure_list(name, shapes, Link(*link.tolist()), plan.seconds))
    keep("training", measure_training(plan.periods))
    dist.barrier()
    dist.destroy_process_group()


HEADER = (
    f"{'parameters':>12} {'exchange ms':>11} {'of model':>8} {'all-reduce ms':>13} {'of model':>8} {'exchange/all-reduce':>19} "
    f"{'MB sent':>9} {'of model':>8} {'loopback':>8} {'all-reduce':>10} {'loopback':>8}"
)


def line(row: dict[str, Any]) -> str:
    """Return a row of the table; "of model" is measured over predicted."""
    if row["kind"] == "link":
        latency, bandwidth, memory = Link(**row["link"])
        figures = f"{1e6 * latency:.0f} us a message, {bandwidth / 1e9:.2f} GB/s sent and {memory / 1e9:.1f} GB/s in memory"
        return f"\n{row['ranks']} ranks: {figures}, by each rank while all do\n{HEADER}"
    if row["kind"] == "training":
        parle, ddp = row["parle"], row["ddp"]
        sent = [_ratio(part["bytes"]["tcp"], 1e3) for part in (parle, ddp)]
        times = " and ".join(_ratio(n) for n in row["ddp_bytes_over_parle"].values())
        seconds = f"{1e3 * parle['median_s']:.2f} and {1e3 * ddp['median_s']:.2f} ms a step"
        return f"{row['parameters']:>12} Parle and DDP send {' and '.join(sent)} kB a step and rank, {times} times; {seconds}"
    exchange, all_reduce = row[EXCHANGE], row[ALL_REDUCE]
    counters = [(part, counter) for part in (exchange, all_reduce) for counter in ("tcp", "loopback")]
    counted = [_ratio(part["bytes"][counter], part["predicted_bytes"]) for part, counter in counters]
    return (
        f"{row['parameters']:>12} {1e3 * exchange['median_s']:11.2f} {exchange['measured_over_predicted']:8.2f} "
        f"{1e3 * all_reduce['median_s']:13.2f} {all_reduce['measured_over_predicted']:8.2f} "
        f"{row['exchange_over_all_reduce']:19.2f} {exchange['predicted_bytes'] / 1e6:9.3f} "
        f"{counted[0]:>8} {counted[1]:>8} {counted[2]:>10} {counted[3]:>8}"
    )


def _ratio(value: float | None, over: float = 1.0) -> str:
    return "?" if value is None else f"{value / over:.3f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of processes (default 2 3 4; --quick: 2)")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of parameters (default 2**10, 2**12, ... 2**24)")
    parser.add_argument("--quick", action="store_true", help="few and small: whether it runs, not figures to keep")
    parser.add_argument("--out", type=Path, help="JSON file, written after each number of ranks")
    options = parser.parse_args(arguments)
    options.ranks = options.ranks or ([2] if options.quick else [2, 3, 4])
    for name, least in (("ranks", 2), ("sizes", 1)):
        if wrong := [n for n in getattr(options, name) or [] if n < least]:
            parser.error(f"--{name}: expected numbers of at least {least}, got {wrong[0]}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, keep it as JSON."""
    options = parse(arguments)
    torch.set_num_threads(1)
    plan = make_plan(options.sizes, options.quick)
    head: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": machine.versions(),
        "platform": {**machine.platform(), "cores": os.cpu_count()},
        "settings": {"ranks": options.ranks, "quick": options.quick, "seconds": plan.seconds, "probe": plan.probe},
        "assumed_links": {name: link._asdict() for name, link in ASSUMED.items()},
        "predicted_not_measured": predictions(),
    }
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            processes.spawn(run_rank, (ranks, folder, plan), nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]
            rows += json.loads(Path(folder, "rows.json").read_text())
        if options.out:
            write_rows(options.out, head, rows)
    print("\nPredicted, not measured: ms of messages a step of ResNet-50, over links that are assumed")
    for row in head["predicted_not_measured"]:
        ddp, parle = (1e3 * row["predicted_s_a_step"][name] for name in ("ddp", "parle"))
        print(f"{row['link']:>20}, {row['ranks']} ranks: DDP {ddp:8.3f}, Parle {parle:8.3f}")


if __name__ == "__main__":
    main()
