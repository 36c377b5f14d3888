"""Entropy-SGD: gradient descent on the local entropy of the loss."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.optim.langevin_loop import LangevinLoop
from deeprelax_cuda.optim.options import arguments, check_count, check_number
from deeprelax_cuda.steps import Rounding


class EntropySGD(LangevinLoop):
    """Entropy-SGD: gradient descent on the local entropy u of the loss f, at the width gamma and the temperature T.

    u(x) = -T log of the mean of exp(-f(y)/T) over y normal around x with variance gamma*T; it solves the viscous
    Hamilton-Jacobi equation. Its gradient (x - <y>)/gamma is estimated by Langevin steps on the live weights y, one a call of
    `step`, with the gradients at y; every ``inner_steps``-th call moves the anchor x towards their average m::

        inner   d = g + weight_decay*y + (y - x)/gamma;   v = inner_momentum*v + (1 - dampening)*d
                y = y - inner_lr*(d + inner_momentum*v) + sqrt(2*inner_lr*T)*z;   m = m + (1 - averaging)*(y - m)
        outer   d = x - m + outer_weight_decay*x;   w = momentum*w + d
                x = x - lr*(d + momentum*w);   m = y = x

    Between steps the parameters hold y. The answer is x: `eval` shows it, `train` brings y back. The noise z is a function of
    (seed, step, parameter, element): no generator is read, and every backend on every device takes the same steps bit for bit.

    * PDE: viscous Hamilton-Jacobi, u_t = -|grad u|^2/2 + T/2 Lap u at t = gamma, u = f at t = 0. With ``gamma_total`` its time
      runs backwards, which is the controlled SGD of the paper: gamma is the time that is left of the run.
    * Noise of a step: standard deviation sqrt(2*inner_lr*T).
    * Cost: one gradient evaluation a step, ``inner_steps`` of them an outer step.
    * When: to train, and if in doubt: the average takes out the noise of minibatches, and wide valleys win over narrow ones of
      the same depth. With ``gamma_total`` where the length of the run is known and ``scoping`` would have to be tuned.

    Args:
        params: as for every `torch.optim.Optimizer`: tensors, named tensors or groups; float32, float64, bfloat16 or float16.
        lr: the outer step, the part of the way from x to m that x moves; what LR schedulers change.
        inner_lr: the step along the gradient.
        inner_steps: L, inner steps a period; equal in all groups.
        gamma: the width of the relaxation; the coupling of y to x has stiffness 1/gamma. ``inf``: no coupling. The group's
            "gamma" is its current value.
        scoping: after n outer steps gamma is ``max(gamma_min, gamma / (1 + scoping)**n)``. 0: gamma stays.
        gamma_min: the floor of gamma. Keep 1/gamma well under 1/inner_lr: a stiffer coupling makes the inner steps diverge,
            which is warned of once when scoping gets there.
        gamma_total: the other rule, controlled SGD: gamma is ``max(gamma_min, gamma_total - n*inner_steps*inner_lr)``, with the
            initial inner_lr. It needs ``0 < gamma_min < gamma_total``; ``gamma`` and ``scoping`` are then ignored.
        temperature: T, so that the noise of an inner step has the standard deviation sqrt(2*inner_lr*T) and y samples
            exp(-V/T) for V = f + |y - x|^2/(2 gamma), exactly so for inner_momentum 0 and small inner_lr.
        averaging: the weight of the OLD average in m, in [0, 1); "linear": the plain mean of the period; "last": m = y.
        momentum: of the outer step.
        inner_momentum: of the inner steps; noise stays outside it.
        nesterov: for both momenta; ignored where a momentum is 0.
        dampening: of the inner momentum; 1 - dampening weights the first d too, unlike in torch.optim.SGD.
        weight_decay: added to the gradient, inside the inner steps.
        outer_weight_decay: in the outer step.
        coupling_in_momentum: whether the inner momentum sees the coupling; the public Entropy-SGD code has False.
        reset_inner_momentum: whether each period begins with an empty inner momentum; the public Entropy-SGD code has True.
        maximize: climb f instead.
        seed: in [0, 2**64), the same on all data-parallel ranks. None: ``torch.initial_seed()``. Give several optimizers of one
            program `deeprelax_cuda.derive_seed(seed, i)`.
        backend: "auto" or the name of a backend; see `deeprelax_cuda.backends.select`.
        rounding: how y is rounded to bfloat16 parameters, "nearest" or "stochastic"; float16 ones cannot be rounded
            stochastically, wider ones are not rounded.
        master_weights: keep a float32 y for bfloat16 and float16 parameters, which then hold its rounding.
        closure_mode: "once": one call of `step` is one inner step, and a closure is evaluated once. "inner_loop": one call of
            ``step(closure)`` takes all inner steps of a period, and evaluates the closure before each, which should then take
            another minibatch each time.
        capturable: keep the counters, gamma and lr of every group as tensors on the device (float64; an lr that is a float32
            tensor there already is kept), so that `step` can be captured in a CUDA graph after one step outside of it: replays
            count on, end periods and follow what a scheduler writes into lr, bit for bit like steps without a graph. A
            `state_dict` has plain numbers. What is read off them, such as `at_outer_boundary`, waits for the device. With
            reset_inner_momentum each step passes over the momentum once more. Warnings about gamma are left to `describe`.
        foreach: True asks for the eager backend.
        fused: True refuses the eager backend.
        differentiable: must be False.

    Raises:
        ValueError, TypeError: an option outside its range, by name; in a process group of several ranks, no seed.

    Source: arXiv 1611.01838 (algorithm 1), arXiv 1704.04932 (the viscous equation and its averaging).
    """

    METHOD: ClassVar[str] = "EntropySGD"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 20,
        gamma: float = 1e4,
        scoping: float = 1e-3,
        gamma_min: float = 0.0,
        gamma_total: float | None = None,
        temperature: float = 1e-8,
        averaging: float | Literal["linear", "last"] = 0.75,
        momentum: float = 0.9,
        inner_momentum: float = 0.9,
        nesterov: bool = True,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        outer_weight_decay: float = 0.0,
        coupling_in_momentum: bool = True,
        reset_inner_momentum: bool = False,
        maximize: bool = False,
        seed: int | None = None,
        backend: str = "auto",
        rounding: Rounding = "nearest",
        master_weights: bool = False,
        closure_mode: Literal["once", "inner_loop"] = "once",
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    @classmethod
    def from_published_code(
        cls,
        params: ParamsT,
        *,
        L: int,
        lr: float | Tensor = 0.01,
        momentum: float = 0.0,
        damp: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        eps: float = 1e-4,
        g0: float = 1e-2,
        g1: float = 0.0,
        inner_lr: float = 0.1,
        averaging: float = 0.75,
        **options: Any,
    ) -> EntropySGD:
        """Entropy-SGD as in the authors' public Python code, from the options of that code and with its defaults::

            there              here
            L                  inner_steps = L
            lr, nesterov       lr = lr, nesterov = nesterov
            momentum           momentum = inner_momentum = momentum
            weight_decay       weight_decay = outer_weight_decay = weight_decay
            eps                temperature = eps**2    the std of an inner step's noise is eps*sqrt(2*inner_lr)
            g0                 gamma = 1/g0            0: inf, no coupling
            g1                 scoping = g1            the coupling is g0*(1 + g1)**n after n outer steps
            fixed              coupling_in_momentum = False, reset_inner_momentum = True

        The loop differs. There ``step(closure, model, criterion)`` takes a whole period: L + 1 minibatches, of which the first,
        at x, does not count. Here L calls of `step`, one a minibatch, are that period.

        The trajectory is that of the code as it was meant. As it was published, four things go wrong: the counter of scoping
        never advances, the outer momentum starts from a gradient of the loss, without Nesterov the inner momentum picks up
        coupling and noise, and only the first group moves. Two namesakes are other methods: the paper's printed algorithm 1
        (noise eps*sqrt(inner_lr), so T = eps**2/2, and 0.75 on the new sample), and the Lua code beside the Python code (no
        outer momentum, and decay in the inner loop alone, outside its momentum).

        Args:
            params: as for the constructor. A group's own options have the constructor's names, and its momenta and its decays,
                inner and outer, must be the same in pairs.
            L: inner steps a period, at least 1. The published default, 0, is plain SGD.
            lr: the outer step.
            momentum: of both loops.
            damp: must be 0 unless momentum is: the published code dampens the outer momentum too.
            weight_decay: of both loops.
            nesterov: for both momenta.
            eps: the root of the temperature.
            g0: the first stiffness of the coupling.
            g1: its growth an outer step.
            inner_lr: the step along the gradient; a constant of the published code.
            averaging: the weight of the OLD average, beta1 there; a constant of the published code.
            options: the constructor's other options, such as seed and backend.

        Raises:
            ValueError, TypeError: an option outside its range, or one that the table sets, by name.

        Source: github.com/ucla-vision/entropy-sgd, python/optim.py; arXiv 1611.01838.
        """
        set_by = {
            "inner_steps": "L",
            "inner_momentum": "momentum",
            "dampening": "damp",
            "outer_weight_decay": "weight_decay",
            "temperature": "eps",
            "gamma": "g0",
            "scoping": "g1",
            "gamma_total": "g0 and g1",
            "coupling_in_momentum": "the published code",
            "reset_inner_momentum": "the published code",
        }
        for name in options:
            if name in set_by:
                raise ValueError(f"{name}: expected no such option, as from_published_code sets it from {set_by[name]}")
        if L == 0:
            raise ValueError("L: 0 inner steps are plain SGD in the published code; use torch.optim.SGD")
        check_count("L", L)
        if check_number("damp", damp, "[0, 1]") != 0.0 and momentum != 0.0:
            raise ValueError(f"damp: expected 0 where momentum is not: the outer momentum has no dampening here; got {damp!r}")
        eps, g0, g1 = (check_number(name, value, "[0, inf)") for name, value in (("eps", eps), ("g0", g0), ("g1", g1)))

        optimizer = cls(
            params,
            lr,
            inner_lr=inner_lr,
            inner_steps=L,
            gamma=1.0 / g0 if g0 else math.inf,
            scoping=g1,
            temperature=eps * eps,
            averaging=averaging,
            momentum=momentum,
            inner_momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            outer_weight_decay=weight_decay,
            coupling_in_momentum=False,
            reset_inner_momentum=True,
            **options,
        )
        for i, group in enumerate(optimizer.param_groups):
            for name in ("L", "damp", "eps", "g0", "g1"):
                if name in group:
                    raise ValueError(f"{name}: not an option of a group, in group {i}; groups have the constructor's options")
            for inner, outer in (("inner_momentum", "momentum"), ("weight_decay", "outer_weight_decay")):
                if group[inner] != group[outer]:
                    expected = f"expected the same as {inner}, as in the published code"
                    raise ValueError(f"{outer}: {expected}, got {group[outer]!r} and {group[inner]!r} in group {i}")
        return optimizer
