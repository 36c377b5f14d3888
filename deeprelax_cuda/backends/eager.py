"""The contract in plain torch ops: runs wherever torch runs, and is what the fused backends are compared with.

Each formula is written once, on a piece of a tensor small enough to stay in cache from its first op to its last. Torch's fused
forms (``alpha=``, ``value=``, addcmul, lerp) contract a product and a sum into one rounding where the contract rounds both, so
there are only plain products and sums here. Bfloat16 is widened and rounded as integers: no hardware conversion gets to flush
denormals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda.backends.eager_noise import normals, rounding_bits
from deeprelax_cuda.clock import Clock
from deeprelax_cuda.noise import DOMAIN_NOISE, DOMAIN_ROUNDING, STREAMS_PER_DOMAIN, Place
from deeprelax_cuda.steps import NARROW, ROLES, STORED, Scalars, Tensors, compute_type

NAME = "eager"

# Elements worked on at a time. On a CPU a piece should stay in cache, and yet be long enough for torch to use several threads
# (from 2**15 elements an op; Philox works on four elements at once). Elsewhere it only bounds the memory of the temporaries.
PIECE_CPU = 2**18
PIECE_DEVICE = 2**22

_SIGN = -(2**31)
_INFINITY = 0x7F800000
_LARGEST = 0x7F7FFFFF
_QUIET = 0x400000


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None where this backend serves parameters of type ``dtype`` on ``device``, else the reason in words."""
    if dtype not in STORED:
        return f"expected one of {', '.join(map(str, STORED))}, got {dtype}"
    if device.type == "mps":
        return "the noise takes its square root in float64, which MPS lacks"
    return None


def gaussian(numel: int, *, seed: int, step: int, stream: int, offset: int, device: torch.device) -> Tensor:
    """Return float32 standard normals, shape ``(numel,)``: elements offset, offset + 1, ... of counter word ``stream``."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    for lo, hi, place in _pieces(Place(offset, max(numel, 1), max(numel, 1)), numel, _piece_size(device)):
        out[lo:hi] = normals(place, hi - lo, seed=seed, step=step, stream=stream, device=device)
    return out


class _Roles(NamedTuple):
    """One parameter's tensors, or the same piece of each of them, 1-d in storage order; a role that plays no part is empty.

    The fields are `ROLES` under the names of the formula.
    """

    param: Tensor
    x: Tensor
    m: Tensor  # p in the gradient-average family
    v: Tensor
    master: Tensor
    w: Tensor
    c: Tensor


class EagerPlan:
    """The eager backend's hold on the tensors of a call; see `deeprelax_cuda.steps.Plan`."""

    CAPTURABLE: ClassVar[bool] = False

    @torch.no_grad()
    def __init__(self, tensors: Tensors) -> None:
        params, count = tensors.params, len(tensors.params)
        self._dtype = params[0].dtype if params else torch.float32
        self._device = params[0].device if params else torch.device("cpu")
        lists = {role: getattr(tensors, role) for role in ROLES}
        if self._dtype not in NARROW:
            lists["masters"] = []
        self._absent = torch.empty(0, device=self._device)
        flat = [[_flat(t) for t in role] if role else [self._absent] * count for role in lists.values()]
        self._roles = [_Roles(*row) for row in zip(*flat, strict=True)]
        self._numbers = tensors.numbers or range(count)
        self._places = tensors.places or [Place(0, max(p.numel(), 1), max(p.numel(), 1)) for p in params]

    @torch.no_grad()
    def run(
        self,
        grads: Sequence[Tensor],
        scalars: Scalars,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        addresses: bytes | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Take the step in place, or nothing at all where ``found_inf`` holds a number other than 0.

        ``found_inf`` is never read by the host: the step is taken on copies, and the device chooses what to write. A clock is:
        so a step with a clock waits for the device, and cannot be captured.
        """
        if clock is not None:
            if found_inf is not None and bool(found_inf != 0.0):
                return
            scalars = clock.advance(scalars, self._dtype)
        sc = scalars
        if not (sc.inner or sc.outer):
            return
        noisy = sc.s != 0.0 and (sc.inner or sc.family == "gradient_average")
        stochastic = sc.rounding == "stochastic" and self._dtype == torch.bfloat16
        if inv_scale is not None:
            inv_scale = inv_scale.reshape(())
        skip = None if found_inf is None else found_inf.reshape(()) != 0.0  # true for NaN
        written = [role in sc.writes for role in ROLES]
        size = _piece_size(self._device)

        flat_grads = [_flat(g) for g in grads] if sc.inner else [self._absent] * len(self._roles)
        for whole, whole_g, number, place in zip(self._roles, flat_grads, self._numbers, self._places, strict=True):
            for lo, hi, part in _pieces(place, whole.param.numel(), size):
                old = _Roles(*(t[lo:hi] for t in whole))
                new = old if skip is None else _Roles(*(t.clone() for t in old))
                z = bits = self._absent
                if noisy:
                    z = self._draw(normals, part, hi - lo, sc, DOMAIN_NOISE, number).to(compute_type(self._dtype))
                if stochastic:
                    bits = self._draw(rounding_bits, part, hi - lo, sc, DOMAIN_ROUNDING, number)
                _take(new, whole_g[lo:hi], z, bits, inv_scale, sc)
                if skip is not None:
                    for t, stepped, is_written in zip(old, new, written, strict=True):
                        if is_written:
                            torch.where(skip, t, stepped, out=t)

    def _draw(self, noise: Callable[..., Tensor], place: Place, numel: int, sc: Scalars, domain: int, number: int) -> Tensor:
        stream = domain * STREAMS_PER_DOMAIN + number
        return noise(place, numel, seed=sc.seed, step=sc.step, stream=stream, device=self._device)


make_plan = EagerPlan


def _take(piece: _Roles, g: Tensor, z: Tensor, bits: Tensor, inv_scale: Tensor | None, sc: Scalars) -> None:
    """Take the inner step, the outer step, or the one after the other, in place on one piece."""
    param, x, m, v, master, w, c = piece
    stored_wide = param.dtype not in NARROW
    y = param if stored_wide else master if master.numel() else _widen(param)

    def store(y: Tensor) -> None:
        """Round y to its storage type; y is the stored y from here on."""
        if stored_wide:
            return
        param.copy_(_round(y, param.dtype, bits))
        if not master.numel():
            y.copy_(_widen(param))

    if sc.inner and sc.family == "langevin":
        langevin_step(y, _gradient(g, y, inv_scale, sc), x, m, v, z, store, sc)
    elif sc.inner:
        gradient_average_step(y, _gradient(g, y, inv_scale, sc), x, m, z, store, sc)
    if sc.outer:
        outer_step(y, x, m, w, c, z, store, sc)


def _gradient(g: Tensor, y: Tensor, inv_scale: Tensor | None, sc: Scalars) -> Tensor:
    """Return d of both inner steps before the coupling: a copy, as g itself is only read."""
    d = _widen(g)
    if inv_scale is not None:
        d *= inv_scale
    if sc.maximize:
        d.neg_()
    if sc.wd != 0.0:
        d += sc.wd * y
    return d


def langevin_step(
    y: Tensor, d: Tensor, x: Tensor, m: Tensor, v: Tensor, z: Tensor, store: Callable[[Tensor], None], sc: Scalars
) -> None:
    """d = g + wd*y + k*(y - x);  v = mu*v + damp1*d;  y = y - eta*d + s*z;  m = m + a*(y - m)."""
    if sc.k != 0.0:
        e = y - x
        e *= sc.k
        if sc.coupling_in_momentum:
            d += e
    if sc.mu != 0.0:
        v *= sc.mu
        v += sc.damp1 * d
        if sc.nesterov:
            d += sc.mu * v
        else:
            d.copy_(v)  # not d = v: what is added to d below must not reach v
    if sc.k != 0.0 and not sc.coupling_in_momentum:
        d += e
    d *= sc.eta
    y -= d
    if sc.s != 0.0:
        y += sc.s * z
    store(y)
    if sc.a == 1.0:
        m.copy_(y)
    elif sc.a != 0.0:
        e = y - m
        e *= sc.a
        m += e


def gradient_average_step(
    y: Tensor, d: Tensor, x: Tensor, p: Tensor, z: Tensor, store: Callable[[Tensor], None], sc: Scalars
) -> None:
    """p = p + a*(d - p);  y = x - c*p + s*z."""
    if sc.a == 1.0:
        p.copy_(d)
    elif sc.a != 0.0:
        d -= p
        d *= sc.a
        p += d
    y.copy_(x)
    if sc.c != 0.0:
        y -= sc.c * p
    if sc.s != 0.0:
        y += sc.s * z
    store(y)


def outer_step(
    y: Tensor, x: Tensor, m: Tensor, w: Tensor, c: Tensor, z: Tensor, store: Callable[[Tensor], None], sc: Scalars
) -> None:
    """d = x - m (or p) + kr*(x - c);  w = mu_o*w + d;  x = x - lr*d;  m = x;  y = x (or x + s*z)."""
    d = x - m if sc.family == "langevin" else m.clone()
    if sc.wd_o != 0.0:
        d += sc.wd_o * x
    if sc.kr != 0.0:
        e = x - c
        e *= sc.kr
        d += e
    if sc.mu_o != 0.0:
        w *= sc.mu_o
        w += d
        if sc.nesterov_o:
            d += sc.mu_o * w
        else:
            d.copy_(w)
    d *= sc.lr
    x -= d
    y.copy_(x)
    if sc.family == "langevin":
        m.copy_(x)
    elif sc.s != 0.0:
        y += sc.s * z
    store(y)


def _widen(t: Tensor) -> Tensor:
    """Return a copy of ``t`` in its compute type; bfloat16 is the upper half of a float32."""
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).view(torch.float32)
    return t.to(compute_type(t.dtype), copy=True)


def _round(y: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 to a narrow ``dtype``: to nearest even, or to bfloat16 by the random ``bits`` where there are any.

    A bfloat16 keeps the upper half of    s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm
    after adding to the lower half        bits in [0, 2**16), or 0x7FFF + the last bit kept
    """
    if dtype == torch.float16:
        return y.to(torch.float16)
    i = y.view(torch.int32)
    magnitude = i & 0x7FFFFFFF
    if bits.numel():  # never from a finite number to infinity; the maximum keeps an infinity
        rounded = (magnitude + bits).clamp_(max=_LARGEST).maximum(magnitude)
    else:
        rounded = ((magnitude >> 16) & 1).add_(0x7FFF).add_(magnitude)
    rounded = torch.where(magnitude > _INFINITY, magnitude | _QUIET, rounded)  # NaN
    return rounded.bitwise_or_(i & _SIGN).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _flat(t: Tensor) -> Tensor:
    """View a dense tensor of any strides as 1-d in storage order."""
    return t.as_strided((t.numel(),), (1,))


def _piece_size(device: torch.device) -> int:
    return PIECE_CPU if device.type == "cpu" else PIECE_DEVICE


def _pieces(place: Place, numel: int, size: int) -> Iterator[tuple[int, int, Place]]:
    """Cut local elements 0..numel-1 into pieces [lo, hi), each a part of one run or some whole runs, with their places."""
    lo = 0
    while lo < numel:
        row, column = divmod(lo, place.run)
        length = size // place.run * place.run or min(size, place.run - column)
        hi = min(lo + length, numel)
        yield lo, hi, Place(place.offset + row * place.pitch + column, place.run, place.pitch)
        lo = hi
