"""`step` as torch wraps it, for as long as somebody watches: a profiler, or hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer, optimizer

Step = TypeVar("Step", bound=Callable[..., Any])

#: The registries of the hooks of all optimizers; None where torch has them no more, and then somebody always watches.
_GLOBAL_HOOKS = [getattr(optimizer, f"_global_optimizer_{when}_hooks", None) for when in ("pre", "post")]


#: Keeps the compiler out; torch's own decorator of that kind does so without importing it.
_DISABLE = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def watched(step: Step) -> Step:
    """Return the method ``step`` of an optimizer in torch's wrapper, which is passed by while nobody watches.

    The wrapper tells the profiler of the step and calls the hooks. After a backward pass of some milliseconds, which leaves
    nothing of Python in the caches, opening and closing the profiler's range alone costs 0.15 ms. Watching are hooks, torch's
    profilers and `emit_nvtx`; an `ExecutionTraceObserver` without a profiler does not see the step.

    No compiler looks into the step: it would break the graph anyway, and sets capturable in every optimizer that it looks into.

    A subclass's own ``step`` is wrapped by torch, so that the hooks are called there and not once more in here. One that a
    program has put in the place of the class's is not: ``functools.wraps`` copies the ``hooked`` by which torch would know.
    """
    step = _DISABLE(step)
    in_torchs_wrapper = Optimizer.profile_hook_step(step)
    torchs_code = in_torchs_wrapper.__code__

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if _somebody_watches(self) and getattr(type(self).step, "__code__", None) is not torchs_code:
            return in_torchs_wrapper(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # what torch asks before it wraps
    return wrapper  # type: ignore[return-value]


def _somebody_watches(self: Optimizer) -> bool:
    return bool(
        getattr(torch.autograd.profiler, "_is_profiler_enabled", True)
        or self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or any(hooks is None or hooks for hooks in _GLOBAL_HOOKS)
    )
