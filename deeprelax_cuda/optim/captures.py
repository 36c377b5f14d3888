"""CUDA graphs that a step is captured in: refused is what would go in beside the step, or not do its work at the replays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deeprelax_cuda.optim.base import RelaxationOptimizer
    from deeprelax_cuda.optim.launches import Launch


def is_capturing(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether what is done now to the parameters goes into a CUDA graph."""
    for group in groups:  # one parameter of each: this is asked at every step
        if group["params"] and group["params"][0].is_cuda:
            return torch.cuda.is_current_stream_capturing()
    return False


def check_optimizer(optimizer: RelaxationOptimizer) -> None:
    """Refuse that a step of ``optimizer`` is captured now, where its replays would not do what they should."""
    if not is_capturing(optimizer.param_groups):
        return
    if not optimizer.param_groups[0]["capturable"]:
        raise RuntimeError("capturable: expected True where step() is captured in a CUDA graph, got False")
    if not optimizer._has_stepped:
        raise RuntimeError("capturable: take a step before the one that is captured; it makes the state and the launches")
    if not optimizer._is_training():
        raise RuntimeError("capturable: call train() before the capture, which would go back to the live weights each time")


def check_launches(optimizer: RelaxationOptimizer, launches: Sequence[Launch]) -> None:
    """Refuse what would go into the graph of these launches beside them, or could not go into it."""
    if not is_capturing(optimizer.param_groups):
        return
    if not all(launch.call.plan.CAPTURABLE for launch in launches):
        raise RuntimeError(f"backend: expected one whose steps can be captured in a CUDA graph, got {optimizer.explain()}")
    for call, *_ in launches:
        for number, p, own in zip(call.bucket.numbers, call.bucket.params, call.states, strict=True):
            if own is not optimizer.state.get(p):
                label = optimizer._labels()[number]
                raise RuntimeError(
                    f"params[{label}]: take a step with it before the capture, which would make its state each time"
                )
