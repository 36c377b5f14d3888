"""The loop that every method shares: one step() is one inner step; every inner_steps-th moves the anchor too."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from deeprelax_cuda import backends
from deeprelax_cuda.clock import Clock, follows
from deeprelax_cuda.noise import check_step
from deeprelax_cuda.optim import captures
from deeprelax_cuda.optim.clocks import Clocks, counts_in_numbers, device_of, in_numbers
from deeprelax_cuda.optim.describe import describe
from deeprelax_cuda.optim.launches import Call, Launch, Launches, Needs
from deeprelax_cuda.optim.method import Method
from deeprelax_cuda.optim.options import (
    check_absent,
    check_number,
    resolve_seed,
    select_backend,
    warn_user,
)
from deeprelax_cuda.optim.rehearsal import rehearse
from deeprelax_cuda.optim.watched import watched
from deeprelax_cuda.optim.weights import CONTRACT_VERSION
from deeprelax_cuda.steps import Scalars, check_rounding, round_scalar

#: The optimizer's one counter, the same in every group: inner steps taken, of them in this period, and outer steps taken.
COUNTERS = ("step", "position", "outer_steps")
#: What the numbers that a law gives are called in errors.
NAMES = {
    "outer": {"k": "1/{width}", "c": "{width}", "s": "sqrt({width}*temperature)", "lr": "lr"},
    "inner": {"k": "1/{width}", "eta": "lr", "s": "sqrt(2*lr*temperature)"},
}


class RelaxationOptimizer(Method):
    """What Entropy-SGD and its family have in common; see `torch.optim.Optimizer` for the rest.

    A param group holds the options, the counters `COUNTERS`, the current ``gamma``, its initial value and the ``seed``: plain
    numbers, so that they are saved and loaded with everything else. The state of a parameter is created at its first gradient.
    """

    def __init__(self, params: ParamsT, options: dict[str, Any]) -> None:
        self._forget()
        super().__init__(params, {**self.WITHOUT, **options, "seed": resolve_seed(options["seed"])})
        lr = min(float(group["lr"]) for group in self.param_groups)
        if lr < self.SMALLEST_USEFUL_LR:
            warn_user(f"lr={lr:g} hardly moves the anchor: lr is {self.LR}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # options that are younger than the state
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()

    def _forget(self) -> None:
        """Set what is neither saved nor copied, and what nothing but speed and the number of warnings depends on."""
        self._launches = Launches()
        self._clocks = Clocks(self.GAMMAS)
        self._has_stepped = False  # as far as is known without asking a device
        self._is_rehearsal = False  # nobody trains with it
        self._warned: set[str] = set()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in mid-training; options that it does not give are the optimizer's.

        Raises:
            ValueError, TypeError: an option outside its range, or one that must be equal in all groups and is not.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: expected a dict, got {type(param_group)}")
        first = self.param_groups[0] if self.param_groups else None
        shared = {name: (first or self.defaults)[name] for name in self.SHARED}
        group = {**self.defaults, **shared, **param_group}
        self._check_group(group)
        self._check_shared(shared, group, len(self.param_groups))
        param_group.update(
            shared,
            **{name: int(first[name]) if first else 0 for name in COUNTERS},
            train_mode=first["train_mode"] if first else True,
            method=self.METHOD,
            contract_version=CONTRACT_VERSION,
            **self._initial_values(group),
        )
        for name, value in group.items():
            param_group.setdefault(name, value)
        self._follow_rules(param_group)
        super().add_param_group(param_group)
        if group["capturable"]:
            self._clocks.settle(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as every `torch.optim.Optimizer` does; counters, gamma and lr are plain numbers in any case."""

        def in_plain_numbers(_: Optimizer, state_dict: dict[str, Any]) -> None:
            state_dict["param_groups"] = [in_numbers(group) for group in state_dict["param_groups"]]
            state_dict["state"] = counts_in_numbers(state_dict["state"])

        handle = self.register_state_dict_post_hook(in_plain_numbers, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; see `TwoWeights.load_state_dict`. A graph has to be captured anew."""
        clocks = self._clocks
        super().load_state_dict(state_dict)
        if self.param_groups[0]["capturable"]:
            self._clocks = clocks
            self._clocks.settle(self.param_groups)

    @watched
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one inner step on the gradients in ``.grad``; every ``inner_steps``-th call moves the anchor too.

        With ``closure_mode="inner_loop"`` a call takes all inner steps up to the next move of the anchor instead, on the
        gradients of the closure, which is evaluated before each of them.

        Args:
            closure: computes the loss and its gradients; evaluated once, or once an inner step.

        Returns:
            What the closure returned, at its first evaluation.

        Raises:
            TypeError, ValueError, RuntimeError: a tensor or an option that cannot be served, by name. No step is taken then.
        """
        captures.check_optimizer(self)
        self._check_call()
        if self.WITHOUT:
            for group in self.param_groups:
                check_absent(group, self.METHOD, self.WITHOUT)
        loops = self.param_groups[0]["closure_mode"] == "inner_loop"
        if loops and closure is None and not self._is_untouched():
            raise ValueError(
                'closure: closure_mode="inner_loop" takes the inner steps of a period in one step(closure), got none; '
                'a GradScaler, which passes none, needs closure_mode="once"'
            )
        from_eval, taken = not self._is_training(), False
        live = {p: own["live"] for p, own in (self._stepped() if from_eval else ()) if "live" in own}
        self.train()
        try:
            loss = _evaluate(closure)
            taken = self._take_step(from_eval)
            while loops and closure is not None and taken and not self.at_outer_boundary:
                _evaluate(closure)
                if not self._take_step(False):
                    break
        except BaseException:
            if from_eval and not taken:
                with contextlib.suppress(ValueError):  # what cannot be shown has not been before
                    self._eval_again(live)
            raise
        if from_eval and not taken:
            self._eval_again(live)
        return loss

    def _take_step(self, from_eval: bool) -> bool:
        """Take one inner step, and the outer one at the end of a period; return whether there was a step to take."""
        self.train()  # whatever a closure has left behind
        first, *others = self.param_groups
        for i, group in enumerate(others, 1):
            self._check_shared(first, group, i)
        clocked = first["capturable"]
        if not clocked and isinstance(first["step"], Tensor):
            self._leave_device()
        # With clocks the device knows whether it is the last step of a period, and each step has the launches of a last one.
        has_periods = first["inner_steps"] is not None
        outer = has_periods and (clocked or first["position"] + 1 >= first["inner_steps"])
        launches = self._launches.prepare(self.param_groups, self.state, outer, self._needs, self._labels)
        if not any(launch.call.bucket.inner for launch in launches):
            return False
        captures.check_launches(self, launches)
        scalars = [self._scalars(launch.call, outer) for launch in launches]
        for group in self.param_groups if outer else ():
            self._check_rules(group)
        phantom = self._is_phantom(launches)
        if clocked and not phantom:
            self._clocks.settle(self.param_groups)
        if from_eval and not phantom:
            self._warn_once("eval", "step() in eval mode: back to the live weights first; call train() after eval()")

        # From here on nothing is refused.
        self._launches.commit(self.param_groups, self.state)
        if phantom:
            return False
        if not self._has_stepped:
            if first["step"] == 0:  # weights may have been loaded since a phantom step made the state
                self.reset_anchors_()
            self._judge()
        self._observe(launches)
        self._run(launches, scalars, self._make_clocks(launches) if clocked else None)
        self._has_stepped = True
        if clocked:
            self._start_period_on_device()
        else:
            self._count(launches, outer)
        return True

    def _run(self, launches: list[Launch], scalars: list[Scalars], clocks: list[Clock] | None) -> None:
        """Take the step; nothing is counted yet."""
        for launch, numbers, clock in zip(launches, scalars, clocks or itertools.repeat(None), strict=False):
            launch.call.plan.run(launch.grads, numbers, addresses=launch.addresses, clock=clock)
            torch.autograd.graph.increment_version(launch.call.bucket.params)

    @property
    def at_outer_boundary(self) -> bool:
        """Whether the anchor has just moved, and a new period starts with the next step.

        The parameters hold the anchor then, but for those of `deeprelax_cuda.HeatSGD`, which are always perturbed, and of
        `deeprelax_cuda.ElasticSGD`, which are never reset.
        """
        first = self.param_groups[0]
        return bool(first["step"] > 0 and first["position"] == 0)

    def stats(self) -> dict[str, float]:
        """Return the inner steps taken, of them in the present period, and the outer steps taken."""
        first = self.param_groups[0]
        return {
            "steps": int(first["step"]),
            "period_steps": int(first["position"]),
            "outer_steps": int(first["outer_steps"]),
        }

    def explain(self) -> str:
        """Return which backend serves the parameters of each device and type, and why, one line each."""
        first = self.param_groups[0]
        lines = []
        for device, dtype in dict.fromkeys((p.device, p.dtype) for group in self.param_groups for p in group["params"]):
            name, reason = select_backend(first, device, dtype)
            waited = f"; {said}" if (said := backends.waited(name)) else ""
            lines.append(f"{name} for {str(dtype).removeprefix('torch.')} parameters on {device}: {reason}{waited}")
        return "\n".join(lines)

    def rehearse(self) -> None:
        """Take steps of each kind with these options on other parameters, of one element: `deeprelax_cuda.backends.warm_up`.

        All that the coming steps need is then compiled and loaded, but for gradient scaling and for parameters that take no
        inner step while others do; this optimizer is left alone.
        """
        rehearse(self, COUNTERS)

    def describe(self) -> str:
        """Return what the options amount to, in words and numbers, with advice where a setting does nothing or does harm.

        Best printed after a ``backward()``: the gradients in ``.grad`` are then compared with the noise. Nothing is changed.
        Groups of equal numbers are described together.
        """
        return describe(self)

    def _check_incoming(self, incoming: dict[str, Any]) -> None:
        super()._check_incoming(incoming)
        # Who reads a checkpoint into the state that other options have allocated gets only that.
        groups = [
            (group, p) for ours, group in zip(self.param_groups, incoming["param_groups"], strict=False) for p in ours["params"]
        ]
        for label, (group, p), (_, values) in zip(self._labels(), groups, self._incoming_state(incoming), strict=False):
            asked_for = self._roles({**self.defaults, **group}, p.dtype)
            missing = [role for role in asked_for if values and role not in values]
            if missing and group.get("step", 0) > 0:
                warn_user(
                    f"state_dict, params[{label}]: no {', '.join(missing)} in its state, which its group's options ask for: "
                    "they begin anew. Was it read into an optimizer with other options?"
                )
                return

    def _check_shared(self, first: dict[str, Any], group: dict[str, Any], index: int) -> None:
        for name in self.SHARED:
            if group[name] != first[name]:
                expected = f"expected the same {name} in all groups"
                raise ValueError(f"{name}: {expected}, got {group[name]!r} in group {index} and {first[name]!r} before it")

    def _eval_again(self, live: dict[Tensor, Tensor]) -> None:
        """Go back to eval mode, with the very live weights: a parameter that was cast meanwhile has only rounded ones."""
        self.eval()
        for p, y in live.items():
            self.state[p]["live"] = y

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned and not self._is_rehearsal:
            self._warned.add(subject)
            warn_user(message)

    def _needs(self, group: dict[str, Any], dtype: torch.dtype) -> Needs:
        options = [group[name] for name in ("backend", "foreach", "fused", "capturable")]
        options.append(os.environ.get("DEEPRELAX_BACKEND"))
        return Needs(self._family(group), self._roles(group, dtype), self.FIRST_COUNT, options)

    def _is_phantom(self, launches: list[Launch]) -> bool:
        """Whether this is the step that checkpoint tools take to have the state allocated: lr 0 and no gradient but zeros."""
        return self._is_untouched() and not any(bool(grad.any()) for launch in launches for grad in launch.grads)

    def _is_untouched(self) -> bool:
        """Whether there is no state yet and every lr is 0: only then a step may be a phantom."""
        cold = not any(self.state.values()) and all(float(group["lr"]) == 0.0 for group in self.param_groups)
        return cold and not self._has_stepped and int(self.param_groups[0]["step"]) == 0

    def _leave_device(self) -> None:
        """Go on with counters of the host, after somebody has turned capturable off."""
        for group in self.param_groups:
            group.update({**in_numbers(group), "lr": group["lr"]})

    def _make_clocks(self, launches: list[Launch]) -> list[Clock]:
        """Return the clock of each launch; a group without any counts by itself."""
        clocks, last = [], {launch.call.bucket.group: i for i, launch in enumerate(launches)}
        for i, launch in enumerate(launches):
            index, count = launch.call.bucket.group, launch.call.period_steps
            law, counts = self._law(self.param_groups[index]), last[index] == i
            clock = self._clocks.clock(self.param_groups, index, law, ordinal=i, period_steps=count, counts=counts)
            clocks.append(clock)
        for index, group in enumerate(self.param_groups):
            if index not in last:
                name = select_backend(group, device_of(group, self.param_groups), torch.float32).name
                self._clocks.count_alone(self.param_groups, index, name)
        return clocks

    def _scalars(self, call: Call, outer: bool) -> Scalars:
        """Return the numbers of a call; with a clock those that it brings itself are left open."""
        group, dtype, clocked = self.param_groups[call.bucket.group], call.bucket.dtype, self.param_groups[0]["capturable"]
        law, family = self._law(group), call.needs.family
        mu_o = round_scalar("momentum", group["momentum"], dtype)
        numbers: dict[str, Any] = self._own_scalars(group, dtype)
        if not clocked:
            width = float(group[self.WIDTH])
            if not width > 0.0:
                raise ValueError(
                    f"{self.WIDTH}: expected a number above 0, got {width}; {self.WIDTH}_min keeps scoping above 0"
                )
            if width == math.inf:
                check_number(self.WIDTH, width, self.GAMMAS)
            for name, value in law.numbers(width, float(group["lr"])).items():
                numbers[name] = round_scalar(NAMES[law.lr][name].format(width=self.WIDTH), value, dtype)
            if (count := call.count) is not None:
                outer = outer and follows(family, count)
                numbers["a"] = round_scalar("1 - averaging", law.weight(count, numbers.get("a", 0.0)), dtype)
        return Scalars(
            family=family,
            inner=call.bucket.inner,
            outer=outer,
            wd=round_scalar("weight_decay", group["weight_decay"], dtype),
            maximize=bool(group["maximize"]),
            mu_o=mu_o,
            wd_o=round_scalar("outer_weight_decay", group["outer_weight_decay"], dtype),
            nesterov_o=bool(group["nesterov"]) and mu_o != 0.0,
            seed=self._seed(group),
            step=0 if clocked else check_step(group["step"]),
            rounding=check_rounding(group["rounding"], dtype, "master" in call.needs.roles),
            **numbers,
        )

    def _count(self, launches: list[Launch], outer: bool) -> None:
        """Count the step that has been taken; at the end of a period gamma follows its rule and a new period starts."""
        for call, *_ in launches:
            if (count := call.count) is not None and (held := call.period_steps) is not None:
                held.fill_(0 if outer else count)
        for group in self.param_groups:
            group["step"] += 1
            group["position"] += 1
            if outer:
                group["outer_steps"] += 1
                self._follow_rules(group)
        if outer:
            self._start_period()
            self._judge()


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
