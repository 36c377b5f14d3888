"""From parameters to fused calls: which of them go into one launch, and the plans that are kept from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.checks import check_grads, check_tensors
from deeprelax_cuda.noise import as_place
from deeprelax_cuda.optim.options import select_backend
from deeprelax_cuda.steps import NARROW, Plan, Scalars, Tensors


@dataclass(slots=True)
class Bucket:
    """Parameters of one group, type and device that take the same step with the same numbers: one launch.

    ``count`` is the number of the step in the average of its period; without gradients (``inner`` off) only the outer step is
    taken.
    """

    group: dict[str, Any]
    inner: bool
    count: int
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    def tensors(self, scalars: Scalars) -> Tensors:
        """Return the tensors of the launch. Those of the outer step are always among them: one plan serves a whole period."""

        def role(name: str, plays: bool = True) -> list[Tensor]:
            return [state[name] for state in self.states] if plays else []

        return Tensors(
            params=self.params,
            anchors=role("anchor"),
            averages=role("average"),
            momenta=role("momentum", scalars.mu != 0.0),
            masters=role("master", bool(self.group["master_weights"]) and self.dtype in NARROW),
            outer_momenta=role("outer_momentum", scalars.mu_o != 0.0),
            numbers=self.numbers,
        )


class Launch(NamedTuple):
    """A call that has been checked: nothing is written before every launch of a step is one."""

    plan: Plan
    grads: list[Tensor]
    scalars: Scalars


class _Kept(NamedTuple):
    plan: Plan
    tensors: Tensors
    identity: tuple[Any, ...]


class Plans:
    """The plans of the last step, by the number of their first tensor (a parameter is in one launch of a step).

    A plan serves again as long as all its tensors are where they were. A plan that a step does not use is dropped, so that no
    tensor outlives its optimizer's use of it by more than a step; gradients are never held.
    """

    def __init__(self) -> None:
        self._last: Mapping[int, _Kept] = {}

    def prepare(self, buckets: list[tuple[Bucket, Scalars]]) -> list[Launch]:
        """Return the launches of a step, checked.

        Raises:
            TypeError, ValueError: a tensor that cannot be served, by name.
            RuntimeError: no backend, or not the one that was asked for, can serve.
        """
        kept: dict[int, _Kept] = {}
        launches = []
        for bucket, scalars in buckets:
            entry = kept[bucket.numbers[0]] = self._keep(bucket, scalars)
            grads = check_grads(entry.tensors, bucket.grads) if bucket.inner else []
            launches.append(Launch(entry.plan, grads, scalars))
        self._last = kept
        return launches

    def _keep(self, bucket: Bucket, scalars: Scalars) -> _Kept:
        group, t = bucket.group, bucket.tensors(scalars)
        roles = (t.params, t.anchors, t.averages, t.momenta, t.masters, t.outer_momenta)
        identity = (
            *(group[name] for name in ("backend", "foreach", "fused")),
            t.numbers,
            *([(t.data_ptr(), t.numel(), t.dtype) for t in role] for role in roles),
        )
        last = self._last.get(bucket.numbers[0])
        if last is not None and last.identity == identity:
            return last
        t.places = [as_place("place", 0, p.numel()) for p in t.params]
        check_tensors(t, outer=True)
        name = select_backend(group, t.params[0].device, bucket.dtype).name
        return _Kept(backends.make_plan(name, t), t, identity)
