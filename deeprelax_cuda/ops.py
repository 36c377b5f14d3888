"""``torch.ops.deeprelax``: the fused steps as torch operators, for `torch.compile` and for callers that build graphs.

An operator's schema is the signature of the function below that implements it. Lists that a call does without are empty.
Scalars are binary64 and are rounded here, once, to the compute type; a seed comes as the two's-complement int64 of its 64 bits,
and places as three ints a tensor: offset, run, pitch.

An argument is declared mutated just when the call may write it: so the anchors of a call that takes the outer step have a list
of their own, and the outer step has a list of averages, which it resets, and one of gradient averages, which it only reads.

`deeprelax_cuda.functional` documents the arguments; whoever wants to call the steps wants that module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.checks import check_device, check_grads, check_scale, check_tensors
from deeprelax_cuda.noise import Place, check_range, check_step, from_int64
from deeprelax_cuda.steps import NARROW, Rounding, Scalars, Tensors, round_scalar


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
    number = partial(round_scalar, dtype=_dtype(params))
    scalars = Scalars(
        family="langevin",
        outer=outer,
        eta=number("lr", lr),
        k=number("stiffness", stiffness),
        s=number("noise_std", noise_std),
        a=number("averaging", averaging),
        wd=number("weight_decay", weight_decay),
        mu=number("momentum", momentum),
        damp1=number("1 - dampening", 1.0 - dampening),
        nesterov=nesterov,
        coupling_in_momentum=coupling_in_momentum,
        maximize=maximize,
        lr=number("outer_lr", outer_lr),
        mu_o=number("outer_momentum", outer_momentum),
        wd_o=number("outer_weight_decay", outer_weight_decay),
        kr=number("replica_stiffness", replica_stiffness),
        nesterov_o=outer_nesterov,
        seed=from_int64(seed),
        step=check_step(step),
        rounding=_rounding(rounding, _dtype(params), masters),
    )
    tensors = Tensors(
        params=params,
        anchors=outer_anchors if outer else anchors,
        averages=averages,
        momenta=momenta,
        masters=masters,
        outer_momenta=outer_momenta,
        consensus=consensus,
        numbers=streams or range(len(params)),
        places=_places(places, params),
    )
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
    number = partial(round_scalar, dtype=_dtype(params))
    scalars = Scalars(
        family="gradient_average",
        outer=outer,
        s=number("noise_std", noise_std),
        a=number("averaging", averaging),
        c=number("drift", drift),
        wd=number("weight_decay", weight_decay),
        maximize=maximize,
        lr=number("outer_lr", outer_lr),
        mu_o=number("outer_momentum", outer_momentum),
        wd_o=number("outer_weight_decay", outer_weight_decay),
        kr=number("replica_stiffness", replica_stiffness),
        nesterov_o=outer_nesterov,
        seed=from_int64(seed),
        step=check_step(step),
        rounding=_rounding(rounding, _dtype(params), masters),
    )
    tensors = Tensors(
        params=params,
        anchors=outer_anchors if outer else anchors,
        averages=gradient_averages,
        masters=masters,
        outer_momenta=outer_momenta,
        consensus=consensus,
        numbers=streams or range(len(params)),
        places=_places(places, params),
    )
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
    number = partial(round_scalar, dtype=_dtype(params))
    scalars = Scalars(
        family="gradient_average" if gradient_averages else "langevin",
        inner=False,
        outer=True,
        s=number("noise_std", noise_std),
        lr=number("lr", lr),
        mu_o=number("momentum", momentum),
        wd_o=number("weight_decay", weight_decay),
        kr=number("replica_stiffness", replica_stiffness),
        nesterov_o=nesterov,
        seed=from_int64(seed),
        step=check_step(step),
        rounding=_rounding(rounding, _dtype(params), masters),
    )
    tensors = Tensors(
        params=params,
        anchors=anchors,
        averages=averages or gradient_averages,
        masters=masters,
        outer_momenta=outer_momenta,
        consensus=consensus,
        numbers=streams or range(len(params)),
        places=_places(places, params),
    )
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


def _rounding(rounding: str, dtype: torch.dtype, masters: Sequence[Tensor]) -> Rounding:
    """Return how parameters of type ``dtype`` are rounded; there is nothing to round in the types that are computed in."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'rounding: expected "nearest" or "stochastic", got "{rounding}"')
    if rounding == "nearest" or dtype not in NARROW:
        return "nearest"
    if dtype != torch.bfloat16:
        raise ValueError(f"rounding: stochastic rounding is to torch.bfloat16, the parameters are {dtype}")
    if masters:
        raise ValueError("rounding: stochastic rounding and masters exclude each other")
    return "stochastic"


def _places(places: list[int], params: Sequence[Tensor]) -> list[Place]:
    """Return a place for each of the parameters: the given ones, or the whole tensor."""
    if len(places) % 3:
        raise ValueError(f"places: expected three ints a tensor, offset, run and pitch, got {len(places)} ints")
    if places:
        return list(map(Place, places[::3], places[1::3], places[2::3]))
    return [Place(0, numel, numel) for numel in (max(p.numel(), 1) for p in params)]


def _playing(tensors: Tensors, sc: Scalars) -> Tensors:
    """Return the lists that play a part in the step, refusing it where one of them is missing."""

    def needed(role: str, is_needed: bool, where: str) -> list[Tensor]:
        items: list[Tensor] = getattr(tensors, role)
        if is_needed and tensors.params and not items:
            name = "gradient_averages" if role == "averages" and sc.family == "gradient_average" else role
            raise ValueError(f"{name}: expected {len(tensors.params)} of them, one a parameter, where {where}; got none")
        return items if is_needed else []

    coupled = sc.k != 0.0 or sc.family == "gradient_average"
    averaged = sc.a != 0.0 or sc.c != 0.0
    return replace(
        tensors,
        anchors=needed("anchors", coupled or sc.outer, "there is a stiffness, a gradient average or an outer step"),
        averages=needed("averages", averaged or sc.outer, "there is an averaging, a drift or an outer step"),
        momenta=needed("momenta", sc.mu != 0.0, "the momentum is not 0"),
        masters=tensors.masters if _dtype(tensors.params) in NARROW else [],
        outer_momenta=needed("outer_momenta", sc.outer and sc.mu_o != 0.0, "the outer momentum is not 0"),
        consensus=needed("consensus", sc.outer and sc.kr != 0.0, "the replica stiffness is not 0"),
    )


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

    written = [*tensors.params, *tensors.masters, *tensors.momenta, *tensors.outer_momenta]
    if outer:
        written += tensors.anchors
    if (scalars.inner and scalars.a != 0.0) or (outer and scalars.family == "langevin"):
        written += tensors.averages
    torch.autograd.graph.increment_version(written)


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
                    check_device(role, i, t, params[0].device)
            elif items is not None:
                check_device(role, None, items, params[0].device)

    _register(op, fake, mutates)


def _fake_gaussian(numel: int, *, device: torch.device, **kwargs: object) -> Tensor:
    return torch.empty(numel, dtype=torch.float32, device=device)


_register_step(langevin_step_, mutates=("params", "averages", "momenta", "masters", "outer_anchors", "outer_momenta"))
_register_step(gradient_average_step_, mutates=("params", "gradient_averages", "masters", "outer_anchors", "outer_momenta"))
_register_step(outer_step_, mutates=("params", "anchors", "averages", "outer_momenta", "masters"))
_register(gaussian, _fake_gaussian)
