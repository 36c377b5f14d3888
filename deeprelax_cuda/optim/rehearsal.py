"""Steps taken in advance, on other parameters, so that all that the coming steps need is compiled and loaded."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from deeprelax_cuda.optim.clocks import in_numbers, set_number

if TYPE_CHECKING:
    from deeprelax_cuda.optim.base import RelaxationOptimizer

#: Positions in a period whose steps may have other averages, and so other kernels, than the steps that follow them.
FIRST = (0, 1, 2)


def rehearse(optimizer: RelaxationOptimizer, counters: tuple[str, ...]) -> None:
    """Take steps of each kind, with the options of ``optimizer``, on parameters of one element; it is left alone itself."""
    groups = []
    for group in map(in_numbers, optimizer.param_groups):
        kinds = dict.fromkeys((p.device, p.dtype) for p in group["params"])
        params = [torch.zeros(1, device=device, dtype=dtype, requires_grad=True) for device, dtype in kinds]
        groups.append({**group, **dict.fromkeys(counters, 0), "params": params, "closure_mode": "once", "train_mode": True})
    other = type(optimizer).__new__(type(optimizer))
    other.__setstate__({"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": groups})
    other._is_rehearsal = True
    for p in [p for group in groups for p in group["params"]]:
        p.grad = torch.ones_like(p)
    length = groups[0]["inner_steps"]  # with capturable a step has all kinds of kernels
    positions = list(FIRST) if length is None else sorted({min(at, length - 1) for at in (*FIRST, length - 1)})
    for position in positions * (2 if optimizer.FIRST_COUNT else 1):  # the averages of a first period may be others too
        for group in other.param_groups:
            set_number(group, "position", position)
        with torch.no_grad():
            other._take_step(False)  # not step(), which is the user's too: hooks, subclasses
    for device in {p.device for group in groups for p in group["params"] if p.is_cuda}:
        torch.cuda.synchronize(device)
