"""``torch.ops.deeprelax``: the fused steps as torch operators, for `torch.compile` and for callers that build graphs.

An operator's schema is the signature of the function below that implements it. Lists that a call does without are empty.
Scalars are binary64 and are rounded here, once, to the compute type; a seed comes as the two's-complement int64 of its 64 bits,
and places as three ints a tensor: offset, run, pitch. ``inv_scale`` is of the compute type, ``found_inf`` is float32.

An argument is declared mutated just when the call may write it: so the anchors of a call that takes the outer step have a list
of their own, and the outer step has a list of averages, which it resets, and one of gradient averages, which it only reads.

`deeprelax_cuda.functional` documents the arguments; whoever wants to call the steps wants that module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.checks import check_device, check_grads, check_scale, check_tensors
from deeprelax_cuda.noise import Place, check_range, check_step, from_int64
from deeprelax_cuda.steps import NARROW, ROLES, Scalars, Tensors, check_rounding, round_scalar

#: By field of `Scalars`: the name of the argument, and its value.
_Numbers = Mapping[str, tuple[str, float]]

#: When a list that may be empty is needed; masters never are.
_NEEDED_WHERE = {
    "anchors": "there is a stiffness, a gradient average or an outer step",
    "averages": "there is an averaging, a drift or an outer step",
    "momenta": "the momentum is not 0",
    "outer_momenta": "the outer momentum is not 0",
    "consensus": "the replica stiffness is not 0",
}

#: What errors call the averages of the other family.
_AVERAGES_ARE_P = {"averages": "gradient_averages"}


def langevin_step_(
    params: list[Tensor],
    grads: list[Tensor],
    anchors: list[Tensor],
    averages: list[Tensor],
    momenta: list[Tensor],
    masters: list[Tensor],
    outer_anchors: list[Tensor],
    outer_momenta: list[Tensor],
    consensus: list[Tensor],
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    *,
    lr: float,
    stiffness: float,
    noise_std: float,
    averaging: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    coupling_in_momentum: bool = True,
    maximize: bool = False,
    outer: bool = False,
    outer_lr: float = 0.0,
    outer_momentum: float = 0.0,
    outer_nesterov: bool = False,
    outer_weight_decay: float = 0.0,
    replica_stiffness: float = 0.0,
    seed: int,
    step: int,
    streams: list[int],
    places: list[int],
    rounding: str = "nearest",
    backend: str = "auto",
) -> None:
    scalars = _scalars(
        params, masters, seed, step, rounding,
        {
            "eta": ("lr", lr), "k": ("stiffness", stiffness), "s": ("noise_std", noise_std), "a": ("averaging", averaging),
            "wd": ("weight_decay", weight_decay), "mu": ("momentum", momentum), "damp1": ("1 - dampening", 1.0 - dampening),
            **_outer_numbers(outer_lr, outer_momentum, outer_weight_decay, replica_stiffness, prefix="outer_"),
        },
        family="langevin", outer=outer, nesterov=nesterov, coupling_in_momentum=coupling_in_momentum, maximize=maximize,
        nesterov_o=outer_nesterov,
    )  # fmt: skip
    anchors = outer_anchors if outer else anchors
    noise = _noise(params, streams, places)
    tensors = Tensors(params, anchors, averages, momenta, masters, outer_momenta, consensus, **noise)
    _run(tensors, grads, scalars, inv_scale, found_inf, backend)


def gradient_average_step_(
    params: list[Tensor],
    grads: list[Tensor],
    anchors: list[Tensor],
    gradient_averages: list[Tensor],
    masters: list[Tensor],
    outer_anchors: list[Tensor],
    outer_momenta: list[Tensor],
    consensus: list[Tensor],
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    *,
    averaging: float,
    drift: float,
    noise_std: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
    outer: bool = False,
    outer_lr: float = 0.0,
    outer_momentum: float = 0.0,
    outer_nesterov: bool = False,
    outer_weight_decay: float = 0.0,
    replica_stiffness: float = 0.0,
    seed: int,
    step: int,
    streams: list[int],
    places: list[int],
    rounding: str = "nearest",
    backend: str = "auto",
) -> None:
    scalars = _scalars(
        params, masters, seed, step, rounding,
        {
            "s": ("noise_std", noise_std), "a": ("averaging", averaging), "c": ("drift", drift),
            "wd": ("weight_decay", weight_decay),
            **_outer_numbers(outer_lr, outer_momentum, outer_weight_decay, replica_stiffness, prefix="outer_"),
        },
        family="gradient_average", outer=outer, maximize=maximize, nesterov_o=outer_nesterov,
    )  # fmt: skip
    anchors = outer_anchors if outer else anchors
    noise = _noise(params, streams, places)
    tensors = Tensors(params, anchors, gradient_averages, [], masters, outer_momenta, consensus, **noise, names=_AVERAGES_ARE_P)
    _run(tensors, grads, scalars, inv_scale, found_inf, backend)


def outer_step_(
    params: list[Tensor],
    anchors: list[Tensor],
    averages: list[Tensor],
    gradient_averages: list[Tensor],
    outer_momenta: list[Tensor],
    masters: list[Tensor],
    consensus: list[Tensor],
    found_inf: Tensor | None,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    replica_stiffness: float = 0.0,
    noise_std: float = 0.0,
    seed: int,
    step: int,
    streams: list[int],
    places: list[int],
    rounding: str = "nearest",
    backend: str = "auto",
) -> None:
    if averages and gradient_averages:
        raise ValueError("averages, gradient_averages: expected one of them, got both")
    scalars = _scalars(
        params, masters, seed, step, rounding,
        {"s": ("noise_std", noise_std), **_outer_numbers(lr, momentum, weight_decay, replica_stiffness)},
        family="gradient_average" if gradient_averages else "langevin", inner=False, outer=True, nesterov_o=nesterov,
    )  # fmt: skip
    noise = _noise(params, streams, places)
    names = _AVERAGES_ARE_P if gradient_averages else {}
    averages = averages or gradient_averages
    tensors = Tensors(params, anchors, averages, [], masters, outer_momenta, consensus, **noise, names=names)
    _run(tensors, [], scalars, None, found_inf, backend)


def gaussian(
    numel: int, *, seed: int, step: int, stream: int = 0, offset: int = 0, device: torch.device, backend: str = "auto"
) -> Tensor:
    numel, offset = check_range("numel", numel, 2**63), check_range("offset", offset, 2**63)
    if numel + offset > 2**63:
        raise ValueError(f"offset: element {offset} + {numel} - 1 does not fit in 63 bits")
    name = backends.select(device, torch.float32, backend).name
    return backends.load(name).gaussian(
        numel,
        seed=from_int64(seed),
        step=check_step(step),
        stream=check_range("stream", stream, 2**32),
        offset=offset,
        device=device,
    )


def _dtype(params: Sequence[Tensor]) -> torch.dtype:
    return params[0].dtype if params else torch.float32


def _scalars(
    params: list[Tensor], masters: list[Tensor], seed: int, step: int, rounding: str, numbers: _Numbers, **others: Any
) -> Scalars:
    """Return the scalars of a step, each of the ``numbers`` rounded to the compute type of the parameters."""
    dtype = _dtype(params)
    rounded: dict[str, Any] = {key: round_scalar(name, value, dtype) for key, (name, value) in numbers.items()}
    rounding = check_rounding(rounding, dtype, bool(masters))
    return Scalars(**rounded, **others, seed=from_int64(seed), step=check_step(step), rounding=rounding)


def _outer_numbers(lr: float, momentum: float, weight_decay: float, replica_stiffness: float, prefix: str = "") -> _Numbers:
    """Return the numbers of the outer step; their arguments are called ``prefix`` and so on where there are inner ones too."""
    return {
        "lr": (f"{prefix}lr", lr),
        "mu_o": (f"{prefix}momentum", momentum),
        "wd_o": (f"{prefix}weight_decay", weight_decay),
        "kr": ("replica_stiffness", replica_stiffness),
    }


def _noise(params: list[Tensor], streams: list[int], places: list[int]) -> dict[str, Any]:
    """Return where the tensors of a step get their noise: the given streams and places, or positions and whole tensors."""
    if len(places) % 3:
        raise ValueError(f"places: expected three ints a tensor, offset, run and pitch, got {len(places)} ints")
    if places:
        as_places = list(map(Place, places[::3], places[1::3], places[2::3]))
    else:
        as_places = [Place(0, numel, numel) for numel in (max(p.numel(), 1) for p in params)]
    return {"numbers": streams or range(len(params)), "places": as_places}


def _playing(tensors: Tensors, scalars: Scalars) -> Tensors:
    """Return the lists that play a part in the step, refusing it where one of them is missing."""
    plays = scalars.reads | scalars.writes
    playing = {role: getattr(tensors, role) if role in plays else [] for role in ROLES}
    for role, where in _NEEDED_WHERE.items():
        if role in plays and tensors.params and not playing[role]:
            expected = f"expected {len(tensors.params)} of them, one a parameter, where {where}; got none"
            raise ValueError(f"{tensors.name(role)}: {expected}")
    if _dtype(tensors.params) not in NARROW:
        playing["masters"] = []
    return replace(tensors, **playing)


def _run(
    tensors: Tensors,
    grads: list[Tensor],
    scalars: Scalars,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str,
) -> None:
    """Check everything, take the step, and tell autograd what was written."""
    tensors, outer = _playing(tensors, scalars), scalars.outer
    check_tensors(tensors, outer=outer)
    if scalars.inner:
        grads = check_grads(tensors, grads, outer=outer)
    check_scale("inv_scale", inv_scale, tensors, outer=outer)
    check_scale("found_inf", found_inf, tensors, outer=outer)
    if not tensors.params:
        return
    name = backends.select(tensors.params[0].device, tensors.params[0].dtype, backend).name
    backends.make_plan(name, tensors).run(grads, scalars, inv_scale, found_inf)

    torch.autograd.graph.increment_version([t for role in scalars.writes for t in getattr(tensors, role)])


_library = torch.library.Library("deeprelax", "DEF")  # type: ignore[no-untyped-call]


def _register(op: Callable[..., object], fake: Callable[..., object], mutates: Collection[str] = ()) -> None:
    """Register an operator for every device.

    Not as a `torch.library.custom_op`, whose layers for autograd and for version counters would each turn all the lists from
    Python to C++ and back: these operators are not differentiable, and `_run` counts what is really written.
    """
    name = op.__name__
    schema = torch.library.infer_schema(op, mutates_args=mutates, op_name=name)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, torch.no_grad()(op), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"deeprelax::{name}", fake, lib=_library)


def _register_step(op: Callable[..., None], mutates: Collection[str]) -> None:
    """Register a step, of which a fake has nothing to return.

    It looks at the devices all the same, as it is also what runs, instead of the step, when one tensor lies on the meta device.
    """
    roles = tuple(inspect.signature(op).parameters)

    def fake(params: list[Tensor], *others: list[Tensor] | Tensor | None, **scalars: object) -> None:
        if not params:
            return
        for role, items in zip(roles, (params, *others), strict=False):
            if isinstance(items, list):
                for i, t in enumerate(items):
                    check_device(f"{role}[{i}]", t, params[0].device)
            elif items is not None:
                check_device(role, items, params[0].device)

    _register(op, fake, mutates)


def _fake_gaussian(numel: int, *, device: torch.device, **kwargs: object) -> Tensor:
    return torch.empty(numel, dtype=torch.float32, device=device)


_register_step(langevin_step_, mutates=("params", "averages", "momenta", "masters", "outer_anchors", "outer_momenta"))
_register_step(gradient_average_step_, mutates=("params", "gradient_averages", "masters", "outer_anchors", "outer_momenta"))
_register_step(outer_step_, mutates=("params", "anchors", "averages", "outer_momenta", "masters"))
_register(gaussian, _fake_gaussian)
