"""Scoping: the schedules that shrink gamma along training, so that the relaxed loss turns into the loss itself.

Each value is computed from the initial value and the number of outer steps, never from the value before it, by + - * / alone:
a device computes the same numbers inside a graph.

Source: arXiv 1611.01838 (the exponential schedule, there of the stiffness 1/gamma); arXiv 1704.04932 (time runs backwards).
"""

from __future__ import annotations

from typing import Any

from deeprelax_cuda.clock import Rule


def rule_of(group: dict[str, Any]) -> Rule:
    """Return the rule of a group: ``gamma_total`` (then ``scoping`` is ignored), else ``scoping`` where it is not 0."""
    total = group["gamma_total"]
    return Rule(
        inner_steps=int(group["inner_steps"]),
        initial_gamma=float(group["initial_gamma"]),
        scoping=float(group["scoping"]),
        gamma_min=float(group["gamma_min"]),
        gamma_total=0.0 if total is None else float(total),
        inner_lr=float(group["initial_inner_lr"]),
    )


def gamma_of(group: dict[str, Any]) -> float:
    """Return gamma after the group's ``outer_steps`` by the rule that is on, or the value that stands where none is."""
    return rule_of(group).gamma(int(group["outer_steps"]), float(group["gamma"]))
