"""Which parameters of a group go into one launch.

Nearly every step is taken on the same tensors as the one before it. So what was found out then is kept, next to the facts that
it follows from, and each step reads those facts anew as whole lists: to compare two lists costs a hundredth of what it costs
to go through the parameters one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class Bucket:
    """Parameters of one group, type and device that take the same step with the same numbers: one launch.

    Without gradients (``inner`` off) only the outer step is taken. ``positions`` are those in the group, None for all of them;
    ``numbers`` are those in the optimizer.
    """

    inner: bool
    dtype: torch.dtype
    positions: Sequence[int] | None
    numbers: Sequence[int]
    params: list[Tensor]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]

    def pick(self, of_group: list[T]) -> list[T]:
        """Return what belongs to the bucket's parameters, out of a list for all parameters of the group."""
        return of_group if self.positions is None else [of_group[i] for i in self.positions]

    def fits(self, grads: list[Tensor]) -> bool:
        """Whether `check_grads` would return the gradients as they are; False only says that it has to look.

        It asks the same of each tensor, and knows nothing of what is kept here. Zeros without memory have the address 0.
        """
        device, count = self.params[0].device, len(grads)
        return not self.inner or (
            [g.layout for g in grads].count(torch.strided) == count
            and [g.dtype for g in grads].count(self.dtype) == count
            and [g.device for g in grads].count(device) == count
            and [g.shape for g in grads] == self.shapes
            and [g.stride() for g in grads] == self.strides
            and not any(map(Tensor.is_neg, grads))
            and 0 not in [g.data_ptr() for g in grads]
        )


@dataclass(slots=True)
class Call:
    """What a bucket brings to one step; ``count`` is the number of the step in the average of its period.

    ``roles`` are the names of the state that the step needs.
    """

    bucket: Bucket
    group: dict[str, Any]
    roles: list[str]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    count: int


class _Split(NamedTuple):
    params: list[Tensor]
    facts: tuple[Any, ...]
    buckets: list[Bucket]


class Splits:
    """How the parameters of each group were split into launches at the last step."""

    def __init__(self) -> None:
        self._splits: dict[int, _Split] = {}

    def split(
        self, index: int, first: int, params: list[Tensor], inner: list[bool], plays: list[bool], counts: list[int]
    ) -> list[Bucket]:
        """Return the buckets of group number ``index``; they are those of the step before if nothing about them has changed.

        Args:
            index: the number of the group.
            first: the number of its first parameter in the optimizer.
            params: the parameters of the group; so are the lists that follow.
            inner: whether a parameter takes an inner step.
            plays: whether it takes any step.
            counts: the numbers of the step in the averages of their period.
        """
        members = params if all(plays) else list(compress(params, plays))
        facts = (
            first,
            inner,
            plays,
            [count - counts[0] for count in counts] if any(counts) else counts,
            [p.data_ptr() for p in members],
            [p.dtype for p in members],
            [p.shape for p in members],
            [p.stride() for p in members],
        )
        last = self._splits.get(index)
        if last is not None and last.facts == facts and all(map(is_, params, last.params)):
            return last.buckets
        positions: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            if plays[i]:
                positions.setdefault((inner[i], p.dtype, p.device, counts[i]), []).append(i)
        buckets = [
            Bucket(
                inner=is_inner,
                dtype=dtype,
                positions=None if len(at) == len(params) else at,
                numbers=[first + i for i in at],
                params=[params[i] for i in at],
                shapes=[params[i].shape for i in at],
                strides=[params[i].stride() for i in at],
            )
            for (is_inner, dtype, _, _), at in positions.items()
        ]
        self._splits[index] = _Split(list(params), facts, buckets)
        return buckets
