"""SGD evaluated at an exponential moving average of its weights: what a comparison holds against methods with an anchor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.optim.options import check_number, warn_user
from deeprelax_cuda.steps import compute_type


class AveragedSGD(SGD):
    """`torch.optim.SGD`, bit for bit, with an average of its weights beside: `eval` shows it, `train` brings the weights back.

    At the t-th step, counted from 1, all parameters p of a group, with a gradient or without, are averaged after they moved::

        ema = d*ema + (1 - d)*p;   d = min(ema_decay, (1 + t)/(10 + t))

    from ema = p before the first step, which the small d of the first steps soon forgets. State of a parameter, besides that of
    SGD: "ema", a float32, or a float64 for float64; in eval mode "live", the exact copy of the weights of training.

    Args:
        params, lr: as for `torch.optim.SGD`.
        ema_decay: the weight of the OLD average in the long run, in [0, 1); a group may have its own.
        options: the other options of `torch.optim.SGD`.

    Raises:
        ValueError: ``ema_decay`` outside its range, or an option that SGD refuses.

    Source: the d of the first steps is that of TensorFlow's ``tf.train.ExponentialMovingAverage`` with ``num_updates``.
    """

    def __init__(self, params: ParamsT, lr: float | Tensor, *, ema_decay: float = 0.99, **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.defaults["ema_decay"] = ema_decay
        for group in self.param_groups:
            check_number("ema_decay", group.setdefault("ema_decay", ema_decay), "[0, 1)")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in mid-training."""
        if "ema_decay" in param_group:
            check_number("ema_decay", param_group["ema_decay"], "[0, 1)")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step of SGD and let the average follow; in eval mode go back to the live weights first, and warn."""
        if any("live" in state for state in self.state.values()):
            warn_user("step() in eval mode: back to the live weights first; call train() after eval()")
            self.train()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self._params():
            if "ema" not in self.state[p]:
                self.state[p]["ema"] = p.detach().to(compute_type(p.dtype), copy=True)
        inspect.unwrap(SGD.step)(self)  # without torch's wrapper, which runs the step's hooks: this method has its own
        for group in self.param_groups:
            t = group["ema_steps"] = group.get("ema_steps", 0) + 1
            decay = min(group["ema_decay"], (1 + t) / (10 + t))
            averages = [self.state[p]["ema"] for p in group["params"]]
            weights = [p.to(ema.dtype) for p, ema in zip(group["params"], averages, strict=True)]
            torch._foreach_lerp_(averages, weights, 1.0 - decay)
        return loss

    # The states are replaced, not changed, where they gain or lose the live weights: a `state_dict` shares them.

    @torch.no_grad()
    def eval(self) -> None:
        """Let the parameters hold the average, rounded to their type; training is not changed."""
        for p in self._params():
            state = self.state.get(p, {})
            if "ema" in state and "live" not in state:
                self.state[p] = {**state, "live": p.detach().clone()}
                p.copy_(state["ema"])

    @torch.no_grad()
    def train(self) -> None:
        """Let the parameters hold the live weights again, bit for bit."""
        for p in self._params():
            if "live" in self.state.get(p, {}):
                p.copy_(self.state[p]["live"])
                self.state[p] = {key: value for key, value in self.state[p].items() if key != "live"}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the average keeps its type, where torch would round it to that of its parameter."""
        super().load_state_dict(state_dict)
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        for p, number in zip(self._params(), numbers, strict=True):
            if "ema" in (saved := state_dict["state"].get(number, {})):
                self.state[p]["ema"] = saved["ema"].to(p.device, compute_type(p.dtype), copy=True)

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])
