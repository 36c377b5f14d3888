"""The two sets of weights of a relaxation method: which of them the parameters hold, and how both are saved and loaded.

Between steps the parameters hold the live weights y, where gradients are taken. The answer of the method is the anchor x. They
are swapped as exact copies, so that evaluating never changes training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from deeprelax_cuda.optim.clocks import set_number
from deeprelax_cuda.steps import compute_type

#: Version of the numeric contract that a state follows; another version's state would go on with other bits.
CONTRACT_VERSION = 1


class TwoWeights(Optimizer):
    """A `torch.optim.Optimizer` whose state holds an anchor ``x`` for every parameter that has been stepped.

    State of a parameter, tensors laid out like it and of its compute type (float32, or float64 for float64):

    * "anchor" ``x``, "average" ``m`` or "gradient_average" ``p``, "momentum" ``v``, "outer_momentum" ``w``, "consensus" ``c``,
      and "master", the float32 ``y`` of a narrow parameter; each only where the method and its options ask for it,
    * "live": in eval mode, the exact copy of ``y`` in the parameter's own type,
    * "period_steps": the samples in the average of this period, where somebody has to count them: a tensor of int64 that the
      parameters of a launch share, and a plain number in a `state_dict`.
    """

    #: The method by its name, which its states carry.
    METHOD: ClassVar[str]
    #: What "period_steps" begins with at an anchor; below 0 where that many steps from there do not count.
    FIRST_COUNT: ClassVar[int] = 0

    # The states of the parameters are replaced, not changed, where they gain or lose a tensor: a `state_dict` shares them.

    @torch.no_grad()
    def eval(self) -> None:
        """Let the parameters hold the anchor ``x`` (rounded to nearest where they are narrow); training is not changed."""
        if not self._is_training():
            return
        answer = self._answer()
        for p, state in [(p, {**state, "live": p.detach().clone()}) for p, state in self._stepped(answer)]:
            p.copy_(state[answer])
            self.state[p] = state
        self._set_training(False)

    @torch.no_grad()
    def train(self) -> None:
        """Let the parameters hold the live weights ``y`` again, bit for bit."""
        if self._is_training():
            return
        for p, state in self._stepped("live"):
            p.copy_(state["live"])
            self.state[p] = {role: value for role, value in state.items() if role != "live"}
        self._set_training(True)

    @torch.no_grad()
    def consolidate_(self) -> None:
        """Let training go on from the anchor: ``y = m = x``.

        A new period starts; momentum buffers are treated as at the end of a period.
        """
        for p, state in self._stepped("anchor"):
            p.copy_(state["anchor"])
            if "live" in state:
                state["live"].copy_(state["anchor"])
            if "master" in state:
                state["master"].copy_(state["anchor"])
            self._restart_average(state)
        self._begin_anew()

    def sync_lookahead(self) -> None:
        """Do `consolidate_` under the name that timm calls."""
        self.consolidate_()

    @torch.no_grad()
    def reset_anchors_(self) -> None:
        """Start anew from the weights that the parameters hold, say after ``model.load_state_dict``: ``x = m = y``.

        A new period starts; momentum buffers are treated as at the end of a period. In eval mode too, what the parameters hold
        are the new live weights.
        """
        for p, state in self._stepped(*self._needed(training=True)):
            for role in ("anchor", "consensus", "live", "master"):
                if role in state:
                    state[role].copy_(p)
            self._restart_average(state)
        self._begin_anew()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, keeping the type of every tensor; the tensors are copied, never shared.

        In eval mode the state holds the live weights: load it together with the model's weights and `train` brings them back.

        Raises:
            ValueError: the state of another optimizer, of other shapes, of another version of the numeric contract, or without
                the weights that it should hold. Nothing has been loaded then.
        """
        arrived: dict[str, Any] = {}

        def keep(_: Optimizer, incoming: dict[str, Any]) -> None:
            self._check_incoming(incoming)
            arrived.update(incoming)

        def put_back(_: Optimizer) -> None:  # torch has cast every tensor to the parameter's type, losing bits of a narrow one
            for p, values in self._incoming_state(arrived):
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        dtype = p.dtype if key == "live" else compute_type(p.dtype)
                        self.state[p][key] = torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value)

        # Ours run right around torch's own loading: after the user's pre-hooks, before the user's post-hooks.
        handles = (
            self.register_load_state_dict_pre_hook(keep),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_incoming(self, incoming: dict[str, Any]) -> None:
        versions = {group.get("contract_version") for group in incoming["param_groups"]}
        if versions != {CONTRACT_VERSION}:
            found = ", ".join(map(str, versions))
            raise ValueError(f"state_dict: expected the state of contract version {CONTRACT_VERSION}, got {found}")
        first = incoming["param_groups"][0]
        if (method := first.get("method")) != self.METHOD:
            raise ValueError(f"state_dict: expected the state of {self.METHOD}, got that of {method}")
        needed = self._needed(first.get("train_mode", True))
        if needed and first.get("step", 0) > 0 and not any(incoming["state"].values()):
            raise ValueError(f"state_dict: expected the state of its parameters after {first['step']} steps, got none")
        for label, (p, values) in zip(self._labels(), self._incoming_state(incoming), strict=False):
            for role in needed if values else ():
                if role not in values:
                    hint = "; was it read into an optimizer in train mode? call eval() on that first" if role == "live" else ""
                    raise ValueError(
                        f'state_dict, params[{label}]: expected "{role}" in its state, got {", ".join(values)}{hint}'
                    )
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape != p.shape:
                    shapes = f"expected the shape of its parameter, {tuple(p.shape)}, got {tuple(value.shape)}"
                    raise ValueError(f"state_dict, {key}[{label}]: {shapes}")

    def _answer(self) -> str:
        """Return the role of the answer, which `eval` shows."""
        return "anchor"

    def _needed(self, training: bool) -> list[str]:
        """Return the roles without which the state of a parameter is none."""
        roles = list(dict.fromkeys(("anchor", self._answer())))
        return roles if training else [*roles, "live"]

    def _incoming_state(self, incoming: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for ours, theirs in zip(self.param_groups, incoming["param_groups"], strict=False):  # torch refuses other lengths
            for p, key in zip(ours["params"], theirs["params"], strict=False):
                yield p, incoming["state"].get(key, {})

    def _stepped(self, *roles: str) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return each parameter that has state, with its state, in which all ``roles`` are as they should be.

        An empty state is none: to look at ``optimizer.state[p]`` is enough to make one.
        """
        stepped = []
        params = (p for group in self.param_groups for p in group["params"])
        for label, p in zip(self._labels() if roles else itertools.repeat(""), params, strict=False):
            if state := self.state.get(p):
                for role in roles:
                    if role not in state or state[role].shape != p.shape:
                        found = f"one of shape {tuple(state[role].shape)}" if role in state else "none"
                        raise ValueError(
                            f"params[{label}]: expected in its state {role} of shape {tuple(p.shape)}, got {found}"
                        )
                stepped.append((p, state))
        return stepped

    def _labels(self) -> list[str]:
        """Return the name of each parameter in errors: its number, and its own name where it has one."""
        names: list[str] = []
        for group in self.param_groups:  # parameters that were put into a group by hand have no name
            own = list(group.get("param_names", ()))[: len(group["params"])]
            names += own + [""] * (len(group["params"]) - len(own))
        return [f"{number} {name}".rstrip() for number, name in enumerate(names)]

    def _is_training(self) -> bool:
        return bool(self.param_groups[0]["train_mode"])

    def _set_training(self, training: bool) -> None:
        for group in self.param_groups:
            group["train_mode"] = training

    def _begin_anew(self) -> None:
        """Begin a period, and all that is counted in it, at the anchors."""
        for count in {id(c): c for _, own in self._stepped() if isinstance(c := own.get("period_steps"), Tensor)}.values():
            count.fill_(self.FIRST_COUNT)
        for _, own in self._stepped():
            if isinstance(own.get("period_steps"), int):  # as it was loaded
                own["period_steps"] = self.FIRST_COUNT
        self._start_period()

    def _start_period(self) -> None:
        for group in self.param_groups:
            set_number(group, "position", 0)

    def _restart_average(self, state: dict[str, Any]) -> None:
        """Begin a period's average: that of y at the anchor, where the period begins."""
        if "average" in state:
            state["average"].copy_(state["anchor"])


#: State that goes where it is not asked for.
FOLLOWING = ("anchor", "gradient_average", "period_steps", "master")


def complete_state(state: dict[str, Any], p: Tensor, roles: list[str], first_count: int) -> dict[str, Any]:
    """Return the state of a parameter with all ``roles``, laid out like it: ``state`` itself where it is that already.

    What is missing begins: ``x = m = c = y``, ``p`` and momentum buffers of zeros, "period_steps" at ``first_count``. What lies
    otherwise in memory, since the parameter has been laid out anew, say by ``model.to(memory_format=...)``, is copied. What
    would be wrong when it is asked for again, because it does not follow the steps meanwhile, goes: `FOLLOWING`.
    """
    kept = {role: value for role, value in state.items() if role in roles or role not in FOLLOWING}
    whole = {role: _laid_out_like(p, value) for role, value in kept.items()}
    for role in roles:
        if role in whole:
            continue
        if role in ("anchor", "master"):
            whole[role] = whole.get("master", p.detach()).to(compute_type(p.dtype), copy=True)
        elif role in ("average", "consensus"):
            whole[role] = whole["anchor"].clone()
        elif role == "period_steps":
            whole[role] = first_count
        else:
            whole[role] = torch.zeros_like(p, dtype=compute_type(p.dtype), requires_grad=False)
    unchanged = whole.keys() == state.keys() and all(whole[role] is state[role] for role in whole)
    return state if unchanged else whole


def _laid_out_like(p: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != p.shape or value.stride() == p.stride():
        return value
    return torch.empty_like(p, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)
