"""What is measured on a GPU: the lists of tensors, and the contenders that take the same step on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import deeprelax_cuda as dr
from deeprelax_cuda import backends
from deeprelax_cuda.bench.formulas import (
    ETA,
    MU,
    PLAIN,
    A,
    K,
    Roles,
    S,
    Step,
    Terms,
    compiled,
    foreach,
    in_place_eager,
    naive_eager,
    one_by_one,
)
from deeprelax_cuda.bench.shapes import Shape, elements, gpt2_small, resnet50
from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import Scalars, Tensors, compute_type, round_scalar

#: Our steps, and the optimizer's whole ones, by the backends that take them.
FUSED = {"cuda": "fused cuda", "triton": "fused triton"}
OPTIMIZERS = {"cuda": "EntropySGD.step()", "triton": "EntropySGD.step(), triton"}
OURS, TRITON, OPTIMIZER, CONTRACT = FUSED["cuda"], FUSED["triton"], OPTIMIZERS["cuda"], "contract in eager torch"
COMPILED = {"torch.compile": False, "torch.compile, ATen noise": True}
COPY = "copy_ of as many bytes"
SGD = {"SGD, foreach": {"foreach": True}, "SGD, fused": {"fused": True}}
#: Those who take another step: what the copy is for, and what users have today.
OTHERS = (COPY, *SGD)
#: By bytes of the stored type, what triton_kernels/sizes.py might say instead: elements of a block, and its warps. The first
#: have as many elements a thread as now, the others twice as many, four times as many, or half.
SIZES = {
    4: [(256, 2), (1024, 8), (1024, 4), (2048, 8), (2048, 4)],
    2: [(512, 2), (2048, 8), (2048, 4), (4096, 4), (1024, 8)],
}


@dataclass(frozen=True)
class Workload:
    """A list of tensors and the step that is taken on them.

    ``rivals``: whether all contenders are measured, or only ours and the fastest eager ones. ``compile_too``: whether
    torch.compile is among them; of a list of many tensors it would make a program for minutes. ``optimizers``: whether whole
    optimizers are measured, whose host time is what many tensors cost. ``sizes``: whether the rivals are ours, Triton's kernels
    at other sizes of blocks.
    """

    name: str
    shapes: Sequence[Shape]
    dtype: torch.dtype = torch.float32
    terms: Terms = PLAIN
    rivals: bool = True
    compile_too: bool = False
    optimizers: bool = False
    sizes: bool = False

    @property
    def elements(self) -> int:
        """The elements of all its tensors."""
        return int(elements(self.shapes))

    def describe_shape(self) -> str | list[int]:
        """Return the shape of a single tensor, or how many tensors there are of how many elements."""
        if len(self.shapes) == 1:
            return list(self.shapes[0])
        return f"{len(self.shapes)} tensors, {self.elements} elements"


def bytes_per_element(name: str, dtype: torch.dtype, terms: Terms) -> int:
    """Return the fewest bytes that a contender must move for an element; 24 for the float32 step, 8 more for its momentum."""
    stored, state = dtype.itemsize, compute_type(dtype).itemsize
    if name in SGD:
        return 3 * stored + (2 * stored if terms.momentum else 0)
    return 3 * stored + 3 * state + (2 * state if terms.momentum else 0)


def is_ours(name: str) -> bool:
    """Whether a contender is a step or an optimizer of this package's fused backends, at any size of blocks."""
    return name.startswith(("fused ", OPTIMIZER))


def workloads() -> list[Workload]:
    """Return all that is measured, the most wanted first: what there is no time for is left out."""
    quiet, momentum, bfloat16 = Terms(noise=False), Terms(momentum=True), torch.bfloat16
    many: list[Shape] = [(64,)] * 10_000
    few: list[Shape] = [(4,)] * 1_000
    rows = [
        single(2**28, rivals=False),
        single(2**26, compile_too=True),
        single(2**28, dtype=bfloat16, rivals=False),
        Workload("ResNet-50", resnet50(), optimizers=True),
        Workload("GPT-2 small", gpt2_small(), optimizers=True),
        Workload("10,000 x 64", many, optimizers=True),
        Workload("1,000 x 4", few, optimizers=True),
        single(2**25, compile_too=True),
        single(2**25, terms=quiet, compile_too=True),
        single(2**25, terms=momentum, compile_too=True),
        single(2**25, dtype=bfloat16, compile_too=True),
        replace(single(2**26, sizes=True), name="2^26, sizes"),
        replace(single(2**26, sizes=True, dtype=bfloat16), name="2^26, sizes"),
        single(2**25 + 1, rivals=False),
        Workload("GPT-2 small", gpt2_small(), dtype=bfloat16),
    ]
    rows += [single(2**28, terms=terms, rivals=False) for terms in (quiet, momentum)]
    rows += [single(2**power, terms=terms, rivals=False) for power in (20, 22, 24) for terms in (Terms(), quiet)]
    rows.append(single(2**26, terms=quiet, rivals=False))
    return rows


def single(numel: int, **options: object) -> Workload:
    """Return a workload of one tensor."""
    power = numel.bit_length() - 1
    extra = numel - 2**power
    return Workload(f"2^{power}{f'+{extra}' if extra else ''}", [(numel,)], **options)  # type: ignore[arg-type]


def make_roles(workload: Workload, device: torch.device, seed: int) -> Roles:
    """Return random tensors for a workload; gradients keep away from zero."""
    generator = torch.Generator(device).manual_seed(seed)
    state = compute_type(workload.dtype)

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        flat = torch.randn(workload.elements, generator=generator, device=device, dtype=state).to(dtype)
        parts = torch.split(flat, [math.prod(shape) for shape in workload.shapes])
        return [part.view(shape).clone() for part, shape in zip(parts, workload.shapes, strict=True)]

    y, g = tensors(workload.dtype), tensors(workload.dtype)
    for t in g:
        t.add_(0.01 * t.sign())
    return Roles(y, g, tensors(state), tensors(state), tensors(state) if workload.terms.momentum else [])


# ---- Contenders --------------------------------------------------------------------------------------------------------------
# A contender is made for each set of tensors that it will be called on, so that what it prepares is no part of a step.

Make = Callable[[Roles], Callable[[], object]]


def ours(backend: str, terms: Terms, size: tuple[int, int] | None = None) -> Make:
    """Return the step of a backend as the optimizers take it: everything prepared but the gradients' addresses.

    ``size``: the elements and the warps of Triton's blocks, in place of those of its table.
    """

    def make(roles: Roles) -> Callable[[], object]:
        numels = [t.numel() for t in roles.y]
        places = [Place(0, max(n, 1), max(n, 1)) for n in numels]
        tensors = Tensors(roles.y, roles.x, roles.m, roles.v, numbers=range(len(numels)), places=places)
        with of_size(size):
            plan, counter = backends.make_plan(backend, tensors), itertools.count()
        numbers = {"eta": ETA, "k": K, "a": A, "s": S if terms.noise else 0.0, "mu": MU if terms.momentum else 0.0}
        dtype = roles.y[0].dtype
        rounded = {name: round_scalar(name, value, dtype) for name, value in numbers.items()}
        scalars = Scalars(**rounded, nesterov=terms.momentum, seed=1)  # type: ignore[arg-type]
        return lambda: plan.run(roles.g, replace(scalars, step=next(counter)))

    return make


def of_size(size: tuple[int, int] | None) -> AbstractContextManager[object]:
    """Have plans of the triton backend that are made meanwhile be for blocks of another size."""
    if size is None:
        return nullcontext()
    from deeprelax_cuda.triton_kernels import sizes

    return mock.patch.object(sizes, "size_of", return_value=sizes.Size(*size))


def of_roles(step: Step) -> Make:
    """Return a step on lists as a contender."""
    return lambda roles: lambda: step(roles)


def params_of(roles: Roles) -> list[Tensor]:
    """Return the parameters with their gradients, for optimizers: aliases, so that the others' tensors stay without."""
    params = [y.detach() for y in roles.y]
    for p, g in zip(params, roles.g, strict=True):
        p.grad = g
    return params


def entropy_sgd(backend: str, terms: Terms) -> Make:
    """Return whole steps of the optimizer, of which none ends a period."""
    options: dict[str, Any] = {
        "temperature": S**2 / (2 * ETA) if terms.noise else 0.0,
        "inner_momentum": MU if terms.momentum else 0.0,
        "momentum": 0.0,
        "inner_steps": 2**30,
        "gamma": 1 / K,
        "scoping": 0.0,
        "backend": backend,
    }
    return lambda roles: dr.EntropySGD(params_of(roles), inner_lr=ETA, averaging=1 - A, seed=1, **options).step


def sgd(terms: Terms, options: Mapping[str, bool]) -> Make:
    """Return torch's SGD, which reads no anchor, averages nothing and has no noise.

    Its momentum is not Nesterov's, with which the foreach form writes into the gradients, which are everybody's here.
    """
    return lambda roles: torch.optim.SGD(params_of(roles), lr=ETA, momentum=MU if terms.momentum else 0.0, **options).step


def copy(workload: Workload, device: torch.device) -> Make:
    """Return a copy that moves as many bytes as our step."""
    half = workload.elements * bytes_per_element(OURS, workload.dtype, workload.terms) // 2
    source = torch.full((half,), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda roles: lambda: target.copy_(source)


def contenders(workload: Workload, device: torch.device, served: Mapping[str, str]) -> dict[str, Make]:
    """Return who is measured on a workload, by name.

    ``served``: for those of `FUSED` that are measured, who takes their steps: they themselves, or others where no GPU is.
    """
    terms = workload.terms
    makes = {FUSED[backend]: ours(server, terms) for backend, server in served.items()}
    makes[COPY] = copy(workload, device)
    if workload.sizes:
        other = SIZES[workload.dtype.itemsize] if "triton" in served else []
        return makes | {f"{TRITON}, {n} x {warps} warps": ours(served["triton"], terms, (n, warps)) for n, warps in other}
    makes |= {
        "in-place eager": of_roles(one_by_one(in_place_eager, terms)),
        "torch._foreach_*": of_roles(lambda roles: foreach(roles, terms)),
    }
    if workload.rivals:
        makes["naive eager"] = of_roles(one_by_one(naive_eager, terms))
        makes |= {name: sgd(terms, options) for name, options in SGD.items()}
    if workload.compile_too:
        kinds = COMPILED.items() if terms.noise else [("torch.compile", False)]
        makes |= {name: of_roles(one_by_one(compiled(aten_noise), terms)) for name, aten_noise in kinds}
        makes[CONTRACT] = ours("eager", terms)
    if workload.optimizers:
        makes |= {OPTIMIZERS[backend]: entropy_sgd(server, terms) for backend, server in served.items()}
    return makes
