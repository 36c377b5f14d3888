"""The loop that every method shares: one step() is one inner step; every inner_steps-th moves the anchor too.

A method adds its defaults, its checks, and how the options of a group become the numbers of its inner step.
"""

from __future__ import annotations

import contextlib
import math
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from deeprelax_cuda import backends
from deeprelax_cuda.clock import Clock
from deeprelax_cuda.noise import check_seed, check_step
from deeprelax_cuda.optim.clocks import Clocks, counts_in_numbers, device_of, in_numbers, is_capturing, set_number
from deeprelax_cuda.optim.describe import Notes, Seen, describe, gamma_notes, outer_notes
from deeprelax_cuda.optim.launches import Call, Launch, Launches, Needs
from deeprelax_cuda.optim.options import check_gamma_rule, check_loop_options, resolve_seed, select_backend, warn_user
from deeprelax_cuda.optim.scoping import gamma_of
from deeprelax_cuda.optim.watched import watched
from deeprelax_cuda.optim.weights import CONTRACT_VERSION, TwoWeights
from deeprelax_cuda.steps import NARROW, Scalars, check_rounding, round_scalar

#: The optimizer's one counter, the same in every group: inner steps taken, of them in this period, and outer steps taken.
COUNTERS = ("step", "position", "outer_steps")


class RelaxationOptimizer(TwoWeights):
    """What Entropy-SGD and its family have in common; see `torch.optim.Optimizer` for the rest.

    A param group holds the options, the counters `COUNTERS`, the current ``gamma``, its initial value and the ``seed``: plain
    numbers, so that they are saved and loaded with everything else. The state of a parameter is created at its first gradient.
    """

    #: Options that are equal in all groups, because there is one counter and one stream of noise.
    SHARED: ClassVar[tuple[str, ...]] = (
        "inner_steps",
        "seed",
        "backend",
        "rounding",
        "master_weights",
        "closure_mode",
        "capturable",
        "foreach",
        "fused",
        "differentiable",
    )
    #: An outer lr below this leaves the anchor where it is; it is what trainers pass to other optimizers.
    SMALLEST_USEFUL_LR: ClassVar[float] = 0.01

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._forget()
        super().__init__(params, {**defaults, "seed": resolve_seed(defaults["seed"])})
        lr = min(float(group["lr"]) for group in self.param_groups)
        if lr < self.SMALLEST_USEFUL_LR:
            warn_user(
                f"lr={lr:g} hardly moves the anchor: lr is the part of the way to the average that each outer step goes, "
                "0.1 to 1; the step along the gradient is inner_lr"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # options that are younger than the state
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()

    def _forget(self) -> None:
        """Set what is neither saved nor copied, and what nothing but speed and the number of warnings depends on."""
        self._launches = Launches()
        self._clocks = Clocks()
        self._has_stepped = False  # as far as is known without asking a device
        self._warned_eval = self._warned_diverging = False

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
            contract_version=CONTRACT_VERSION,
            initial_gamma=float(group["gamma"]),
            initial_inner_lr=float(group["inner_lr"]),
        )
        param_group["gamma"] = gamma_of({**group, **param_group})
        super().add_param_group(param_group)
        if group["capturable"]:
            self._clocks.settle(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as every `torch.optim.Optimizer` does; counters, gamma and lr are plain numbers in any case."""

        def in_plain_numbers(_: Optimizer, state_dict: dict[str, Any]) -> None:
            if isinstance(self.param_groups[0]["step"], Tensor):
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
        self._check_capture()
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
        outer = clocked or first["position"] + 1 >= first["inner_steps"]
        launches = self._launches.prepare(self.param_groups, self.state, outer, self._needs, self._labels)
        if not any(launch.call.bucket.inner for launch in launches):
            return False
        if is_capturing(self.param_groups):
            self._check_captured(launches)
        scalars = [self._scalars(launch.call, outer) for launch in launches]
        for group in self.param_groups if outer else ():
            check_gamma_rule(group)
        phantom = self._is_phantom(launches)
        if clocked and not phantom:
            self._clocks.settle(self.param_groups)
        if from_eval and not phantom:
            self._warn_eval()

        # From here on nothing is refused.
        self._launches.commit(self.param_groups, self.state)
        if phantom:
            return False
        if not self._has_stepped:
            if first["step"] == 0:  # weights may have been loaded since a phantom step made the state
                self.reset_anchors_()
            self._has_stepped = True
        clocks = self._make_clocks(launches) if clocked else [None] * len(launches)
        for launch, numbers, clock in zip(launches, scalars, clocks, strict=True):
            launch.call.plan.run(launch.grads, numbers, addresses=launch.addresses, clock=clock)
            torch.autograd.graph.increment_version(launch.call.bucket.params)
        if clocked:
            self._start_period_on_device()
        else:
            self._count(launches, outer)
        return True

    @property
    def at_outer_boundary(self) -> bool:
        """Whether the anchor has just moved: the parameters hold it, and a new period starts with the next step."""
        first = self.param_groups[0]
        return bool(first["step"] > 0 and first["position"] == 0)

    def stats(self) -> dict[str, int]:
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
        groups = []
        for group in map(in_numbers, self.param_groups):
            kinds = dict.fromkeys((p.device, p.dtype) for p in group["params"])
            params = [torch.zeros(1, device=device, dtype=dtype, requires_grad=True) for device, dtype in kinds]
            groups.append({**group, **dict.fromkeys(COUNTERS, 0), "params": params, "closure_mode": "once", "train_mode": True})
        other = type(self).__new__(type(self))
        other.__setstate__({"defaults": self.defaults, "state": defaultdict(dict), "param_groups": groups})
        other._warned_diverging = True  # nobody trains with it
        for p in [p for group in groups for p in group["params"]]:
            p.grad = torch.ones_like(p)
        # The first two of a period, whose averages may differ, and the last; with capturable a step has them all.
        last = groups[0]["inner_steps"] - 1
        for position in (0, 1, last):
            for group in other.param_groups:
                set_number(group, "position", min(position, last))
            with torch.no_grad():
                other._take_step(False)  # not step(), which is the user's too: hooks, subclasses
        for device in {p.device for group in groups for p in group["params"] if p.is_cuda}:
            torch.cuda.synchronize(device)

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

    # What a method adds.

    @abstractmethod
    def _inner_scalars(self, group: dict[str, Any], dtype: torch.dtype, count: int) -> dict[str, Any]:
        """Return the inner step's part of `Scalars`, rounded; ``count`` is the number of the step in its period's average."""

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse an option of a new group, complete with defaults, by its name; a method checks its own besides."""
        check_loop_options(group)

    def _roles(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        """Return the names of the state that a parameter needs; a method adds its own."""
        roles = ["anchor", "average"]
        if group["momentum"] != 0.0:
            roles.append("outer_momentum")
        if group["master_weights"] and dtype in NARROW:
            roles.append("master")
        return roles

    def _moved_anchor(self) -> None:
        """Say what the values that follow the outer steps have come to; most methods have nothing to say."""

    def _notes(self, group: dict[str, Any], seen: Seen) -> Notes:
        """Return what `describe` says of a group; a method puts its inner loop before."""
        return gamma_notes(group) + outer_notes(group, self.SMALLEST_USEFUL_LR)

    # The loop.

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

    def _warn_eval(self) -> None:
        if not self._warned_eval:
            self._warned_eval = True
            warn_user("step() in eval mode: back to the live weights first; call train() after eval()")

    def _needs(self, group: dict[str, Any], dtype: torch.dtype) -> Needs:
        options = [group[name] for name in ("backend", "foreach", "fused", "capturable")]
        return Needs(self._roles(group, dtype), [*options, os.environ.get("DEEPRELAX_BACKEND")])

    def _is_phantom(self, launches: list[Launch]) -> bool:
        """Whether this is the step that checkpoint tools take to have the state allocated: lr 0 and no gradient but zeros."""
        return self._is_untouched() and not any(bool(grad.any()) for launch in launches for grad in launch.grads)

    def _is_untouched(self) -> bool:
        """Whether there is no state yet and every lr is 0: only then a step may be a phantom."""
        return not any(self.state.values()) and all(float(group["lr"]) == 0.0 for group in self.param_groups)

    def _check_capture(self) -> None:
        """Refuse to be captured in a CUDA graph whose replays would not do what they should."""
        if not is_capturing(self.param_groups):
            return
        if not self.param_groups[0]["capturable"]:
            raise RuntimeError("capturable: expected True where step() is captured in a CUDA graph, got False")
        if not self._has_stepped:
            raise RuntimeError("capturable: take a step before the one that is captured; it makes the state and the launches")
        if not self._is_training():
            raise RuntimeError("capturable: call train() before the capture, which would go back to the live weights each time")

    def _check_captured(self, launches: list[Launch]) -> None:
        """Refuse what would go into the graph of this step beside it."""
        if not all(launch.call.plan.CAPTURABLE for launch in launches):
            raise RuntimeError(f"backend: expected one whose steps can be captured in a CUDA graph, got {self.explain()}")
        for call, *_ in launches:
            for number, p, own in zip(call.bucket.numbers, call.bucket.params, call.states, strict=True):
                if own is not self.state.get(p):
                    label = self._labels()[number]
                    raise RuntimeError(
                        f"params[{label}]: take a step with it before the capture, which would make its state each time"
                    )

    def _leave_device(self) -> None:
        """Go on with counters of the host, after somebody has turned capturable off."""
        for group in self.param_groups:
            group.update({**in_numbers(group), "lr": group["lr"]})
        self.state.update(counts_in_numbers(self.state))

    def _make_clocks(self, launches: list[Launch]) -> list[Clock]:
        """Return the clock of each launch; a group without any counts by itself."""
        clocks, last = [], {launch.call.bucket.group: i for i, launch in enumerate(launches)}
        for i, launch in enumerate(launches):
            index, count = launch.call.bucket.group, launch.call.period_steps
            shared = count if isinstance(count, Tensor) else None
            clocks.append(self._clocks.clock(self.param_groups, index, i, shared, counts=last[index] == i))
        for index, group in enumerate(self.param_groups):
            if index not in last:
                name = select_backend(group, device_of(group, self.param_groups), torch.float32).name
                self._clocks.count_alone(self.param_groups, index, name)
        return clocks

    def _start_period_on_device(self) -> None:
        """Do to the state what the first step of a period needs, where the device is at one; most methods need nothing."""

    def _scalars(self, call: Call, outer: bool) -> Scalars:
        """Return the numbers of a call; with a clock those that it brings itself are left open."""
        group, dtype, clocked = self.param_groups[call.bucket.group], call.bucket.dtype, self.param_groups[0]["capturable"]
        if clocked:
            group = {**group, "step": 0, "lr": 0.0, "gamma": math.inf}
        mu_o = round_scalar("momentum", group["momentum"], dtype)
        return Scalars(
            inner=call.bucket.inner,
            outer=outer,
            wd=round_scalar("weight_decay", group["weight_decay"], dtype),
            maximize=bool(group["maximize"]),
            lr=round_scalar("lr", group["lr"], dtype),
            mu_o=mu_o,
            wd_o=round_scalar("outer_weight_decay", group["outer_weight_decay"], dtype),
            nesterov_o=bool(group["nesterov"]) and mu_o != 0.0,
            seed=check_seed(group["seed"]),
            step=check_step(group["step"]),
            rounding=check_rounding(group["rounding"], dtype, "master" in call.needs.roles),
            **self._inner_scalars(group, dtype, 1 if clocked else call.count),
        )

    def _count(self, launches: list[Launch], outer: bool) -> None:
        """Count the step that has been taken; at the end of a period gamma follows its rule and a new period starts."""
        for call, *_ in launches:
            if call.bucket.inner and "period_steps" in call.needs.roles:
                count = call.count
                for state in call.states:
                    state["period_steps"] = count
        for group in self.param_groups:
            group["step"] += 1
            group["position"] += 1
            if outer:
                group["outer_steps"] += 1
                group["gamma"] = gamma_of(group)
        if outer:
            self._start_period()
            self._moved_anchor()


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
