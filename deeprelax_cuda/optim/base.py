"""The loop that every method shares: one step() is one inner step; every inner_steps-th moves the anchor too.

A method adds its defaults, its checks, and how the options of a group become the numbers of its inner step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.noise import check_step
from deeprelax_cuda.optim.buckets import Call, Splits
from deeprelax_cuda.optim.launches import Launch, Plans
from deeprelax_cuda.optim.options import check_loop_options, resolve_seed, select_backend, warn_user
from deeprelax_cuda.optim.scoping import gamma_of
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
        self._splits, self._plans = Splits(), Plans()
        self._warned_eval = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in mid-training; options that it does not give are the optimizer's.

        Raises:
            ValueError, TypeError: an option outside its range, or one that must be equal in all groups and is not.
        """
        first = self.param_groups[0] if self.param_groups else None
        shared = {name: (first or self.defaults)[name] for name in self.SHARED}
        group = {**self.defaults, **shared, **param_group}
        self._check_group(group)
        self._check_shared(shared, group, len(self.param_groups))
        param_group.update(
            shared,
            **{name: first[name] if first else 0 for name in COUNTERS},
            train_mode=first["train_mode"] if first else True,
            contract_version=CONTRACT_VERSION,
            initial_gamma=float(group["gamma"]),
            initial_inner_lr=float(group["inner_lr"]),
        )
        param_group["gamma"] = gamma_of({**group, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one inner step on the gradients in ``.grad``; every ``inner_steps``-th call moves the anchor too.

        Args:
            closure: computes the loss and its gradients; evaluated once.

        Returns:
            What the closure returned.

        Raises:
            TypeError, ValueError, RuntimeError: a tensor or an option that cannot be served, by name. No step is taken then.
        """
        if not self._is_training():
            self._warn_eval()
            self.train()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        first, *others = self.param_groups
        for i, group in enumerate(others, 1):
            self._check_shared(first, group, i)
        outer = first["position"] + 1 >= first["inner_steps"]
        calls = self._gather(outer)
        if not any(call.bucket.inner for call in calls):
            return loss
        launches, completed = self._plans.prepare([(call, self._scalars(call, outer)) for call in calls], self._labels)

        # From here on nothing is refused.
        phantom = self._is_phantom(launches)
        self.state.update(completed)
        if phantom:
            return loss
        for launch in launches:
            launch.plan.run(launch.grads, launch.scalars)
        torch.autograd.graph.increment_version([p for call in calls for p in call.bucket.params])
        self._count(calls, outer)
        return loss

    @property
    def at_outer_boundary(self) -> bool:
        """Whether the anchor has just moved: the parameters hold it, and a new period starts with the next step."""
        first = self.param_groups[0]
        return bool(first["step"] > 0 and first["position"] == 0)

    def stats(self) -> dict[str, int]:
        """Return the inner steps taken, of them in the present period, and the outer steps taken."""
        first = self.param_groups[0]
        return {"steps": first["step"], "period_steps": first["position"], "outer_steps": first["outer_steps"]}

    def explain(self) -> str:
        """Return which backend serves the parameters of each device and type, and why, one line each."""
        first = self.param_groups[0]
        lines = []
        for device, dtype in dict.fromkeys((p.device, p.dtype) for group in self.param_groups for p in group["params"]):
            name, reason = select_backend(first, device, dtype)
            lines.append(f"{name} for {str(dtype).removeprefix('torch.')} parameters on {device}: {reason}")
        return "\n".join(lines)

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

    # The loop.

    def _check_shared(self, first: dict[str, Any], group: dict[str, Any], index: int) -> None:
        for name in self.SHARED:
            if group[name] != first[name]:
                expected = f"expected the same {name} in all groups"
                raise ValueError(f"{name}: {expected}, got {group[name]!r} in group {index} and {first[name]!r} before it")

    def _warn_eval(self) -> None:
        if not self._warned_eval:
            self._warned_eval = True
            warn_user("step() in eval mode: back to the live weights first; call train() after eval()")

    def _gather(self, outer: bool) -> list[Call]:
        """Return what a step does to which parameters.

        Without a gradient a parameter takes no inner step; the outer step is for all that have state.
        """
        calls = []
        first = 0  # the number of the group's first parameter
        no_state: dict[str, Any] = {}
        for i, group in enumerate(self.param_groups):
            params = group["params"]
            grads = [p.grad for p in params]
            states = [self.state.get(p, no_state) for p in params]
            inner = [grad is not None for grad in grads]
            plays = [a or bool(state) for a, state in zip(inner, states, strict=True)] if outer else inner
            counts = [state.get("period_steps", 0) for state in states]
            for bucket in self._splits.split(i, first, params, inner, plays, counts):
                roles = self._roles(group, bucket.dtype)
                own = bucket.pick(states)
                count = own[0].get("period_steps", 0) + 1 if "period_steps" in roles else 1
                calls.append(Call(bucket, group, roles, bucket.pick(grads), own, count))
            first += len(params)
        return calls

    def _is_phantom(self, launches: list[Launch]) -> bool:
        """Whether this is the step that checkpoint tools take to have the state allocated: lr 0 and no gradient but zeros."""
        if any(self.state.values()) or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        return not any(bool(grad.any()) for launch in launches for grad in launch.grads)

    def _scalars(self, call: Call, outer: bool) -> Scalars:
        group, dtype = call.group, call.bucket.dtype
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
            seed=group["seed"],
            step=check_step(group["step"]),
            rounding=check_rounding(group["rounding"], dtype, "master" in call.roles),
            **self._inner_scalars(group, dtype, call.count),
        )

    def _count(self, calls: list[Call], outer: bool) -> None:
        """Count the step that has been taken; at the end of a period gamma follows its rule and a new period starts."""
        for call in calls:
            if call.bucket.inner and "period_steps" in call.roles:
                for state in call.states:
                    state["period_steps"] = call.count
        for group in self.param_groups:
            group["step"] += 1
            group["position"] += 1
            if outer:
                group["outer_steps"] += 1
                group["gamma"] = gamma_of(group)
        if outer:
            self._start_period()
