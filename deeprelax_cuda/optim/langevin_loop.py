"""The loop of Entropy-SGD and of what is built on it: periods of Langevin steps on y, coupled to the anchor and averaged."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.describe import Notes, Seen, overshoot_notes
from deeprelax_cuda.optim.describe_langevin import divergence, langevin_notes
from deeprelax_cuda.optim.langevin import check_langevin, langevin_roles, langevin_scalars


class LangevinLoop(RelaxationOptimizer):
    """The inner loop of `deeprelax_cuda.EntropySGD`, whose options and formula are there."""

    SHARED: ClassVar[tuple[str, ...]] = (*RelaxationOptimizer.SHARED, "coupling_in_momentum", "reset_inner_momentum")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_langevin(group)

    def _roles(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        return super()._roles(group, dtype) + langevin_roles(group)

    def _own_scalars(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        return langevin_scalars(group, dtype)

    def _notes(self, group: dict[str, Any], seen: Seen) -> Notes:
        return langevin_notes(group, seen) + super()._notes(group, seen) + overshoot_notes(group)

    def _judge(self) -> None:
        if said := divergence(enumerate(self.param_groups)):
            self._warn_once("diverging", said)

    def _start_period_on_device(self) -> None:
        if self.param_groups[0]["reset_inner_momentum"]:
            for group in self.param_groups:
                starts = group["position"] == 0
                for p in group["params"]:
                    if "momentum" in (state := self.state.get(p, {})):
                        state["momentum"].masked_fill_(starts, 0.0)

    def _start_period(self) -> None:
        super()._start_period()
        if self.param_groups[0]["reset_inner_momentum"]:
            for _, state in self._stepped():
                if "momentum" in state:
                    state["momentum"].zero_()
