"""What a method is to the loop that all share: its options and their bounds, and the questions that the loop asks it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from deeprelax_cuda.clock import COUPLED, Law
from deeprelax_cuda.noise import check_seed
from deeprelax_cuda.optim.describe import GRADIENT_LEGEND, LEGEND, Notes, Seen, gamma_notes, outer_notes
from deeprelax_cuda.optim.launches import Launch
from deeprelax_cuda.optim.options import check_gamma_rule, check_loop_options
from deeprelax_cuda.optim.scoping import gamma_of
from deeprelax_cuda.optim.weights import TwoWeights
from deeprelax_cuda.steps import NARROW, Family


class Method(TwoWeights):
    """The part of an optimizer that its method fills in; what is not asked of most methods has an answer here."""

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
    #: The options of other methods that this one has not, at the values that they then have in its groups: they do nothing.
    WITHOUT: ClassVar[Mapping[str, Any]] = {}
    #: The width of the relaxation among the options, which the coupling of an inner step comes from.
    WIDTH: ClassVar[str] = "gamma"
    #: The interval of the width; without inf, where the formula has it itself and not its reciprocal.
    GAMMAS: ClassVar[str] = "(0, inf]"
    #: Whether the parameters hold the anchor when an outer step has been taken.
    ENDS_AT_ANCHOR: ClassVar[bool] = True
    #: An lr below this leaves the anchor where it is; it is what trainers pass to other optimizers.
    SMALLEST_USEFUL_LR: ClassVar[float] = 0.01
    #: What lr is, in words: for `describe`, and for who has set it too low.
    OUTER_STEP: ClassVar[str] = "lr, the part of the way from x to m that an outer step goes"
    LR: ClassVar[str] = (
        "the part of the way to the average that each outer step goes, 0.1 to 1; the step along the gradient is inner_lr"
    )

    @abstractmethod
    def _own_scalars(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Return the method's part of `Scalars`, rounded, but for what its law says."""

    def _family(self, group: dict[str, Any]) -> Family:
        """Return the family of the inner steps."""
        return "langevin"

    def _law(self, group: dict[str, Any]) -> Law:
        """Return what gamma, lr and the steps of a period are in the formula."""
        return COUPLED

    def _check_call(self) -> None:
        """Refuse a step before its closure is evaluated; most methods take any."""

    def _seed(self, group: dict[str, Any]) -> int:
        """Return the seed of the noise of a group's parameters."""
        return check_seed(group["seed"])

    def _initial_values(self, group: dict[str, Any]) -> dict[str, float]:
        """Return what the rules of a new group start from."""
        return {"initial_gamma": float(group["gamma"]), "initial_inner_lr": float(group.get("inner_lr", 0.0))}

    def _check_rules(self, group: dict[str, Any]) -> None:
        """Refuse what the values of a group could not follow at the coming outer step."""
        check_gamma_rule(group)

    def _follow_rules(self, group: dict[str, Any]) -> None:
        """Set the values of a group that follow the count of its outer steps, and stay where no rule is on."""
        group["gamma"] = gamma_of(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse an option of a new group, complete with defaults, by its name; a method checks its own besides."""
        check_loop_options(group, self.METHOD, self.WITHOUT, self.GAMMAS)

    def _roles(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        """Return the names of the state that a parameter needs; a method adds its own."""
        counted = self._family(group) == "gradient_average"
        roles = ["anchor", *(("gradient_average", "period_steps") if counted else ("average",))]
        if group["momentum"] != 0.0:
            roles.append("outer_momentum")
        if group["master_weights"] and dtype in NARROW:
            roles.append("master")
        return roles

    def _legend(self, group: dict[str, Any]) -> str:
        """Return what the letters of `describe` stand for."""
        return LEGEND if self._family(group) == "langevin" else GRADIENT_LEGEND

    def _observe(self, launches: list[Launch]) -> None:
        """Look at the gradients and the state that a step is about to be taken on; most methods do not."""

    def _start_period_on_device(self) -> None:
        """Do to the state what the first step of a period needs, where the device is at one; most methods need nothing."""

    def _judge(self) -> None:
        """Warn of what the values that follow the outer steps have come to: before the first step, and after each outer one."""

    def _notes(self, group: dict[str, Any], seen: Seen) -> Notes:
        """Return what `describe` says of a group; a method puts its inner loop before."""
        return gamma_notes(group) + outer_notes(group, self.OUTER_STEP, self.LR, self.SMALLEST_USEFUL_LR)
