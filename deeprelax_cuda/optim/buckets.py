"""Which parameters of a group go into one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Bucket:
    """Parameters of one group, type and device that take the same step with the same numbers: one launch.

    Without gradients (``inner`` off) only the outer step is taken. ``group`` is the group's number, ``numbers`` are those of
    the parameters in the optimizer, ``streams`` those of their noise.
    """

    group: int
    inner: bool
    dtype: torch.dtype
    numbers: Sequence[int]
    streams: Sequence[int]
    params: list[Tensor]


def split(
    group: int, first: int, first_stream: int, params: list[Tensor], inner: list[bool], plays: list[bool], counts: list[int]
) -> list[Bucket]:
    """Return the buckets of a group.

    Args:
        group: its number.
        first: the number of its first parameter in the optimizer.
        first_stream: the number of that parameter's noise.
        params: its parameters; so are the lists that follow.
        inner: whether a parameter takes an inner step.
        plays: whether it takes any step.
        counts: the numbers of the step in the averages of their period.
    """
    members: dict[tuple[bool, torch.dtype, torch.device, int], list[int]] = {}
    for i, p in enumerate(params):
        if plays[i]:
            members.setdefault((inner[i], p.dtype, p.device, counts[i]), []).append(i)
    return [
        Bucket(group, is_inner, dtype, [first + i for i in at], [first_stream + i for i in at], [params[i] for i in at])
        for (is_inner, dtype, _, _), at in members.items()
    ]
