"""Scoping: the rules by which gamma and rho of a group shrink, so that the relaxed loss turns into the loss itself."""

from __future__ import annotations

from typing import Any

from deeprelax_cuda.clock import Rule


def rule_of(group: dict[str, Any]) -> Rule:
    """Return the rule of a group: ``gamma_total`` (then ``scoping`` is ignored), else ``scoping`` where it is not 0."""
    total = group["gamma_total"]
    return Rule(
        inner_steps=int(group["inner_steps"] or 0),
        initial_gamma=float(group["initial_gamma"]),
        scoping=float(group["scoping"]),
        gamma_min=float(group["gamma_min"]),
        gamma_total=0.0 if total is None else float(total),
        inner_lr=float(group["initial_inner_lr"]),
    )


def gamma_of(group: dict[str, Any]) -> float:
    """Return gamma after the group's ``outer_steps`` by the rule that is on, or the value that stands where none is."""
    return rule_of(group).gamma(int(group["outer_steps"]), float(group["gamma"]))


def rho_of(group: dict[str, Any]) -> float:
    """Return rho, the width of the coupling between replicas, after the group's ``outer_steps``, as `gamma_of` does gamma."""
    rule = Rule(
        inner_steps=int(group["inner_steps"]),
        initial_gamma=float(group["initial_rho"]),
        scoping=float(group["rho_scoping"]),
        gamma_min=float(group["rho_min"]),
        gamma_total=0.0,
        inner_lr=0.0,
    )
    return rule.gamma(int(group["outer_steps"]), float(group["rho"]))
