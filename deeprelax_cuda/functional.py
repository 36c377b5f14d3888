"""The fused steps as functions on lists of tensors, for optimizers and for other libraries.

One call takes one step for all the tensors of its lists, in place and with the same bits on every backend. The names are those
of the formulas: ``y`` a live parameter, ``x`` its anchor, ``m`` the running average of ``y``, ``p`` that of the gradient, ``v``
and ``w`` momenta, ``z`` standard normal noise, ``g`` a gradient.

Parameters and gradients share one floating type: float32, bfloat16, float16 or float64. Every other tensor is float32, or
float64 beside float64 parameters, and has its parameter's shape and layout. Parameters are dense, in any order of their
dimensions. What a call writes overlaps nothing else in the call. A refused call writes nothing. Autograd records nothing.

``averaging`` is here the weight of the *new* sample; in the optimizers, as in the paper, it is the weight of the old average.

Under `torch.compile` a step number that changes does not compile anew; a float that changes does, as everywhere in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from deeprelax_cuda import ops  # noqa: F401  (registers torch.ops.deeprelax)
from deeprelax_cuda.noise import STREAMS_PER_DOMAIN, as_place, check_range, check_seed, check_step, to_int64
from deeprelax_cuda.steps import Family, Rounding, compute_type, round_scalar

TensorPlace = int | tuple[int, int, int]


@dataclass
class OuterStep:
    """The outer step that ends a period, fused with the period's last inner step. The arguments are those of `outer_step_`.

    ``momenta`` is ``w``, needed for a ``momentum`` other than 0; ``consensus`` is ``c``, needed for a ``replica_stiffness``.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    replica_stiffness: float = 0.0
    momenta: Sequence[Tensor] | None = None
    consensus: Sequence[Tensor] | None = None


def gaussian(
    numel: int,
    *,
    seed: int,
    step: int,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Return standard normals, the noise ``z`` of the steps: a pure function of (seed, step, stream, element).

    Args:
        numel: how many.
        seed: in [0, 2**64).
        step: the number of inner steps taken before this one, in [0, 2**32).
        stream: in [0, 2**32): the tensor number for the noise of a step, plus 2**28 for the words of its stochastic rounding.
        offset: the number of the first element.
        device: where to compute and to return them.
        backend: "auto" or a name out of ``backends.available(device)``.

    Returns:
        float32 normals of shape ``(numel,)``, on ``device``.

    Raises:
        TypeError, ValueError: a number that is not an int in its range, or a backend that does not exist.
        RuntimeError: a backend that cannot serve.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10); Box and Muller 1958.
    """
    return torch.ops.deeprelax.gaussian(  # type: ignore[no-any-return]
        check_range("numel", numel, 2**63),
        seed=to_int64(check_seed(seed)),
        step=check_step(step),
        stream=check_range("stream", stream, 2**32),
        offset=check_range("offset", offset, 2**63),
        device=torch.device(device),
        backend=backend,
    )


def langevin_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor] | None,
    averages: Sequence[Tensor] | None,
    momenta: Sequence[Tensor] | None = None,
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
    seed: int = 0,
    step: int = 0,
    streams: Sequence[int] | None = None,
    places: Sequence[TensorPlace] | None = None,
    rounding: Rounding = "nearest",
    masters: Sequence[Tensor] | None = None,
    maximize: bool = False,
    inv_scale: float | Tensor | None = None,
    found_inf: float | Tensor | None = None,
    outer: OuterStep | None = None,
    backend: str = "auto",
) -> None:
    """Take an inner step that averages the position: Langevin dynamics coupled to an anchor (Entropy-SGD, SGLD, Elastic-SGD).

    ::

        d = g + weight_decay*y + stiffness*(y - x)
        v = momentum*v + (1 - dampening)*d;   d = d + momentum*v [nesterov]  or  v
        y = y - lr*d + noise_std*z
        m = m + averaging*(y - m)

    A term whose factor is 0 is left out, and so is its list, which may be None or is left alone.

    Args:
        params: ``y``, written.
        grads: ``g``, of the parameters' type; in another layout than its parameter's (transposed, expanded) it is copied.
        anchors: ``x``, read; needed for ``stiffness`` and ``outer``.
        averages: ``m``, written; needed for ``averaging`` and ``outer``.
        momenta: ``v``, written; needed for ``momentum``. Starts at 0.
        lr: the step size.
        stiffness: 1/gamma, the strength of the coupling to the anchor.
        noise_std: the noise's standard deviation in a step; ``sqrt(2*lr*temperature)`` samples ``exp(-potential/temperature)``.
        averaging: the weight of the new sample, the opposite of the optimizers'; 1 keeps the last one.
        weight_decay: added to the gradient as ``weight_decay*y``.
        momentum, dampening, nesterov: as in `torch.optim.SGD`, except that ``v`` starts at 0. They do not see the noise.
        coupling_in_momentum: whether they see the coupling; if not, it is added to ``d`` after them.
        seed: in [0, 2**64).
        step: the number of inner steps taken before this one, in [0, 2**32).
        streams: the tensors' numbers in [0, 2**28), which tell their noise apart; None for their positions in the list.
        places: for each tensor, where its elements lie in the logical tensor of which it is a shard: an offset, or
            (offset, run, pitch) if local element j is element offset + (j // run)*pitch + j % run. None for whole tensors.
        rounding: of ``y`` to a narrow type, to the "nearest" number or, for bfloat16 without masters, "stochastic".
        masters: the float32 ``y`` of bfloat16 or float16 parameters, which are then its rounding; written. Ignored for float32
            and float64.
        maximize: whether to ascend.
        inv_scale: a number, or a tensor of one element, that the gradients are multiplied by first.
        found_inf: a number, or a tensor of one element: unless it is 0, nothing is written.
        outer: the outer step to take after this one, in the same pass; the bits are those of taking the two in turn.
        backend: "auto" or a name out of ``backends.available(device)``.

    Raises:
        TypeError: a tensor of the wrong type, or something else where a tensor or an int is expected.
        ValueError: a list, shape, layout, place, device or number that does not fit, overlapping tensors, an unknown backend.
        RuntimeError: a backend that cannot serve.

    Source: Chaudhari et al., "Deep Relaxation", arXiv 1704.04932; "Entropy-SGD", arXiv 1611.01838, algorithm 1.
    """
    params = _tensors("params", params)
    anchors = _tensors("anchors", anchors)
    torch.ops.deeprelax.langevin_step_(
        params,
        _tensors("grads", grads),
        anchors if outer is None else [],
        _tensors("averages", averages),
        _tensors("momenta", momenta),
        _tensors("masters", masters),
        anchors if outer is not None else [],
        _tensors("outer.momenta", None if outer is None else outer.momenta),
        _tensors("outer.consensus", None if outer is None else outer.consensus),
        _inv_scale(inv_scale, params),
        _found_inf(found_inf, params),
        **_numbers(
            lr=lr,
            stiffness=stiffness,
            noise_std=noise_std,
            averaging=averaging,
            weight_decay=weight_decay,
            momentum=momentum,
            dampening=dampening,
        ),
        nesterov=nesterov,
        coupling_in_momentum=coupling_in_momentum,
        maximize=maximize,
        **_outer_scalars(outer),
        **_noise(params, seed, step, streams, places),
        rounding=rounding,
        backend=backend,
    )


def gradient_average_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    gradient_averages: Sequence[Tensor] | None,
    *,
    averaging: float,
    drift: float,
    noise_std: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    step: int = 0,
    streams: Sequence[int] | None = None,
    places: Sequence[TensorPlace] | None = None,
    rounding: Rounding = "nearest",
    masters: Sequence[Tensor] | None = None,
    maximize: bool = False,
    inv_scale: float | Tensor | None = None,
    found_inf: float | Tensor | None = None,
    outer: OuterStep | None = None,
    backend: str = "auto",
) -> None:
    """Take an inner step that averages the gradient: the non-viscous Hamilton-Jacobi and the heat smoothing.

    ::

        d = g + weight_decay*y
        p = p + averaging*(d - p)
        y = x - drift*p + noise_std*z

    Args:
        anchors: ``x``, read.
        gradient_averages: ``p``, written; needed for ``averaging``, ``drift`` and ``outer``.
        averaging: the weight of the new gradient, the opposite of the optimizers'; 1 forgets the old average.
        drift: how far along the average gradient from the anchor the next gradient is taken: gamma for Hamilton-Jacobi.
        noise_std: the spread of the points about the anchor: ``sqrt(gamma*temperature)`` for the heat smoothing.

    The other arguments, and what is raised, are those of `langevin_step_`.

    Source: Chaudhari et al., "Deep Relaxation", arXiv 1704.04932.
    """
    params = _tensors("params", params)
    anchors = _tensors("anchors", anchors)
    torch.ops.deeprelax.gradient_average_step_(
        params,
        _tensors("grads", grads),
        anchors if outer is None else [],
        _tensors("gradient_averages", gradient_averages),
        _tensors("masters", masters),
        anchors if outer is not None else [],
        _tensors("outer.momenta", None if outer is None else outer.momenta),
        _tensors("outer.consensus", None if outer is None else outer.consensus),
        _inv_scale(inv_scale, params),
        _found_inf(found_inf, params),
        **_numbers(averaging=averaging, drift=drift, noise_std=noise_std, weight_decay=weight_decay),
        maximize=maximize,
        **_outer_scalars(outer),
        **_noise(params, seed, step, streams, places),
        rounding=rounding,
        backend=backend,
    )


def outer_step_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    averages: Sequence[Tensor],
    outer_momenta: Sequence[Tensor] | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    replica_stiffness: float = 0.0,
    consensus: Sequence[Tensor] | None = None,
    family: Family = "langevin",
    noise_std: float = 0.0,
    seed: int = 0,
    step: int = 0,
    streams: Sequence[int] | None = None,
    places: Sequence[TensorPlace] | None = None,
    rounding: Rounding = "nearest",
    masters: Sequence[Tensor] | None = None,
    found_inf: float | Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Move the anchor, and the parameter with it: the step that ends a period of inner steps.

    ::

        d = x - m [langevin]  or  p [gradient_average]
        d = d + weight_decay*x + replica_stiffness*(x - c)
        w = momentum*w + d;   d = d + momentum*w [nesterov]  or  w
        x = x - lr*d
        m = x, y = x [langevin]  or  y = x + noise_std*z [gradient_average]

    Args:
        params: ``y``, written.
        anchors: ``x``, written.
        averages: ``m``, written, in family "langevin"; ``p``, read, in family "gradient_average".
        outer_momenta: ``w``, written; needed for ``momentum``. Starts at 0.
        lr: the step size; there is no 1/gamma in ``d``.
        momentum, nesterov: as in `torch.optim.SGD`, except that ``w`` starts at 0.
        weight_decay: added to the direction as ``weight_decay*x``.
        replica_stiffness: 1/rho, the strength of the coupling to the consensus of the replicas.
        consensus: ``c``, read; needed for ``replica_stiffness``.
        family: of the inner steps of the period.
        noise_std: of those inner steps; read in family "gradient_average" only.
        seed, step, streams, places, rounding, masters: those of the inner step that ended the period, whose noise and whose
            rounding this one repeats.

    The other arguments, and what is raised, are those of `langevin_step_`.

    Source: Chaudhari et al., "Deep Relaxation", arXiv 1704.04932; "Parle", arXiv 1707.00424.
    """
    if family not in ("langevin", "gradient_average"):
        raise ValueError(f'family: expected "langevin" or "gradient_average", got "{family}"')
    params = _tensors("params", params)
    averages = _tensors("averages", averages)
    torch.ops.deeprelax.outer_step_(
        params,
        _tensors("anchors", anchors),
        averages if family == "langevin" else [],
        averages if family == "gradient_average" else [],
        _tensors("outer_momenta", outer_momenta),
        _tensors("masters", masters),
        _tensors("consensus", consensus),
        _found_inf(found_inf, params),
        **_numbers(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            replica_stiffness=replica_stiffness,
            noise_std=noise_std,
        ),
        nesterov=nesterov,
        **_noise(params, seed, step, streams, places),
        rounding=rounding,
        backend=backend,
    )


def _tensors(name: str, tensors: Sequence[Tensor] | None) -> list[Tensor]:
    """Return the tensors as a list, refusing what is not one."""
    if tensors is None:
        return []
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a list of tensors, got a tensor")
    tensors = list(tensors)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(t).__name__}")
    return tensors


def _inv_scale(scale: float | Tensor | None, params: Sequence[Tensor]) -> Tensor | None:
    """Return a number, or a tensor of one, in the compute type on the parameters' device."""
    if scale is None or not params:
        return None
    dtype, device = compute_type(params[0].dtype), params[0].device
    if isinstance(scale, Tensor):
        return scale.detach().to(device, dtype)
    if not torch.compiler.is_compiling():  # which cannot trace it
        scale = round_scalar("inv_scale", scale, dtype)
    return torch.full((), scale, dtype=dtype, device=device)


def _found_inf(found: float | Tensor | None, params: Sequence[Tensor]) -> Tensor | None:
    """Return a number, or a tensor of one, as float32 on the parameters' device: other than 0 just where it is."""
    if found is None or not params:
        return None
    device = params[0].device
    if not isinstance(found, Tensor):
        return torch.full((), 1.0 if found != 0 else 0.0, dtype=torch.float32, device=device)
    found = found.detach()
    return (found if found.dtype == torch.float32 else found != 0).to(device, torch.float32)


def _numbers(**scalars: float) -> dict[str, float]:
    """Return the scalars, refusing one that is not a number in one line; those of a trace are left as they are."""
    if torch.compiler.is_compiling():
        return scalars
    for name, value in scalars.items():
        if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        scalars[name] = float(value)
    return scalars


def _outer_scalars(outer: OuterStep | None) -> dict[str, float]:
    if outer is None:
        return {}
    numbers = _numbers(
        outer_lr=outer.lr,
        outer_momentum=outer.momentum,
        outer_weight_decay=outer.weight_decay,
        replica_stiffness=outer.replica_stiffness,
    )
    return {"outer": True, "outer_nesterov": outer.nesterov, **numbers}


def _noise(
    params: Sequence[Tensor], seed: int, step: int, streams: Sequence[int] | None, places: Sequence[TensorPlace] | None
) -> dict[str, object]:
    """Return what the noise is a function of, in the form that an operator takes."""
    flat: list[int] = []
    if places is not None:
        if len(places) != len(params):
            raise ValueError(f"places: expected {len(params)} of them, one a parameter, got {len(places)}")
        for i, (place, p) in enumerate(zip(places, params, strict=True)):
            flat += as_place(f"places[{i}]", place, p.numel())
    return {
        "seed": to_int64(check_seed(seed)),
        "step": check_step(step),
        "streams": [check_range(f"streams[{i}]", number, STREAMS_PER_DOMAIN) for i, number in enumerate(streams or ())],
        "places": flat,
    }
