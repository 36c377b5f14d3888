"""Cases of the numeric contract, and the way from a case to the bits that a backend and the oracle make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.backends import cpu, triton
from deeprelax_cuda.noise import Place, as_place
from deeprelax_cuda.steps import NARROW, Scalars, Tensors, compute_type, round_scalar

SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 65535, 65536, 65537)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16, torch.float16: np.float16}

# Backends and, for the C++ one, its instruction sets: whatever this machine can run. Triton's kernels run in its interpreter.
CPU_SETS = cpu.instruction_sets()
TRITON = [] if triton.unavailable(CPU, torch.float32) else ["triton"]
BACKENDS = ["eager", *(f"cpu-{name}" for name in CPU_SETS), *TRITON]

#: The roles of `Tensors` in the names of the oracle; "average" is m or p.
ROLES = {
    "anchors": "x",
    "averages": "average",
    "momenta": "v",
    "masters": "master",
    "outer_momenta": "w",
    "consensus": "consensus",
}


@dataclass(frozen=True)
class Case:
    """Scalars before rounding, and what else a call may have."""

    name: str
    scalars: dict[str, Any] = field(default_factory=dict)
    masters: bool = False
    inv_scale: float | None = None
    found_inf: float | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def rounded(self, dtype: torch.dtype) -> Scalars:
        """Return the scalars as a backend gets them."""
        return Scalars(
            **{k: round_scalar(k, v, dtype) if type(v) is float else v for k, v in {**COMMON, **self.scalars}.items()}  # type: ignore[arg-type]
        )


COMMON = {"seed": 0x9E3779B97F4A7C15, "step": 41}
_A = {"eta": 0.11, "k": 0.37, "s": 0.051, "a": 0.26}
_B = {"family": "gradient_average", "c": 0.23, "s": 0.043, "a": 0.31}
_OUTER = {"outer": True, "lr": 0.41, "mu_o": 0.77, "nesterov_o": True}

CASES = [
    Case("langevin", _A),
    Case("noise-free", {**_A, "s": 0.0}),
    Case("no-coupling", {**_A, "k": 0.0}),
    Case("no-average", {**_A, "a": 0.0}),
    Case("last-iterate", {**_A, "a": 1.0}),
    Case("negative-lr", {**_A, "eta": -0.2}),
    Case("heavy-ball", {**_A, "mu": 0.83, "damp1": 0.6}),
    Case("nesterov", {**_A, "mu": 0.83, "nesterov": True, "wd": 0.013}),
    Case("gradient-momentum", {**_A, "mu": 0.83, "coupling_in_momentum": False}),
    Case("maximize", {**_A, "maximize": True, "wd": 0.013}),
    Case("scaled", {**_A, "maximize": True}, inv_scale=0.3),
    Case("fused-outer", {**_A, **_OUTER, "mu": 0.83}),
    Case("fused-outer-all", {**_A, **_OUTER, "wd_o": 0.017, "kr": 0.19, "a": 1.0, "mu": 0.83, "nesterov": True}),
    Case("fused-outer-no-average", {**_A, **_OUTER, "a": 0.0, "mu_o": 0.0}),
    Case("outer", {**_A, **_OUTER, "inner": False, "nesterov_o": False, "wd_o": 0.017}),
    Case("outer-replicas", {**_A, **_OUTER, "inner": False, "kr": 0.19, "mu_o": 0.0}),
    Case("gradient-average", _B),
    Case("gradient-average-first", {**_B, "a": 1.0, "wd": 0.013, "maximize": True}),
    Case("heat", {**_B, "c": 0.0}),
    Case("heat-anchor-call", {**_B, "c": 0.0, "a": 0.0}),
    Case("gradient-average-drift", {**_B, "a": 0.0, "s": 0.0}, inv_scale=0.3),
    Case("gradient-average-fused", {**_B, **_OUTER, "wd_o": 0.017, "kr": 0.19}),
    Case("gradient-average-outer", {**_B, **_OUTER, "inner": False}),
    Case("gradient-average-outer-quiet", {**_B, **_OUTER, "inner": False, "s": 0.0}),
    Case("masters", {**_A, **_OUTER, "mu": 0.83, "wd": 0.013}, masters=True, dtypes=NARROW),
    Case("masters-b", {**_B, "wd": 0.013}, masters=True, dtypes=NARROW),
    Case("stochastic", {**_A, "rounding": "stochastic"}),
    Case("stochastic-fused", {**_A, **_OUTER, "rounding": "stochastic"}, dtypes=(torch.bfloat16,)),
    Case("stochastic-outer", {**_B, **_OUTER, "inner": False, "rounding": "stochastic"}, dtypes=(torch.bfloat16,)),
    Case("stochastic-noise-free", {**_A, "s": 0.0, "rounding": "stochastic"}, dtypes=(torch.bfloat16,)),
    Case("skipped", {**_A, **_OUTER, "mu": 0.83}, found_inf=2.0),
    Case("skipped-nan", {**_B, **_OUTER}, found_inf=float("nan")),
    Case("not-skipped", {**_A, **_OUTER, "mu": 0.83}, found_inf=0.0),
]
CASES = [
    case
    if "rounding" not in case.scalars or torch.float16 not in case.dtypes
    else Case(case.name, case.scalars, dtypes=DTYPES[:3])
    for case in CASES
]
BY_NAME = {case.name: case for case in CASES}


def arrays_of(numel: int, dtype: torch.dtype, seed: int, case: Case) -> dict[str, np.ndarray]:
    """Return random tensors of one parameter, by the oracle's names; no gradient is zero, and magnitudes vary widely."""
    rng = np.random.default_rng(seed)
    wide = NUMPY[compute_type(dtype)]

    def values() -> np.ndarray:
        sign = rng.choice([-1.0, 1.0], numel)
        return (sign * (0.05 + rng.random(numel)) * 2.0 ** rng.integers(-6, 3, numel)).astype(wide)

    def stored(value: np.ndarray) -> np.ndarray:
        return oracle.round_bfloat16(value) if dtype == torch.bfloat16 else value.astype(NUMPY[dtype])

    master = values()
    average = "m" if case.scalars.get("family", "langevin") == "langevin" else "p"
    arrays = {"y": stored(master), "g": stored(values()), "x": values(), average: values(), "v": values(), "w": values()}
    arrays["consensus"] = values()
    if case.masters:
        arrays["master"] = master
    return arrays


@lru_cache(maxsize=64)
def inputs_of(numel: int, dtype: torch.dtype, seed: int, average: str, masters: bool) -> dict[str, np.ndarray]:
    family = {"m": "langevin", "p": "gradient_average"}[average]
    return arrays_of(numel, dtype, seed, Case("", {"family": family}, masters=masters))


def inputs_for(case: Case, dtype: torch.dtype, sizes: list[int]) -> list[dict[str, np.ndarray]]:
    average = "m" if case.scalars.get("family", "langevin") == "langevin" else "p"
    """Return inputs of some sizes, the same arrays each time."""
    return [inputs_of(n, dtype, n, average, case.masters) for n in sizes]


def expected(arrays: dict[str, np.ndarray], case: Case, dtype: torch.dtype, number: int, place: Place) -> dict[str, np.ndarray]:
    """Return all tensors as the contract leaves them."""
    scalars = asdict(case.rounded(dtype))
    return oracle.update(
        arrays, **scalars, number=number, place=tuple(place), inv_scale=case.inv_scale, found_inf=case.found_inf
    )


def to_torch(array: np.ndarray) -> Tensor:
    """Return a numpy array as a tensor; uint16 are the bits of bfloat16."""
    tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


class Guarded:
    """A tensor at an odd offset in a larger buffer, whose other elements must stay as they are."""

    FILL = 42.0

    def __init__(self, values: Tensor, offset: int, device: torch.device = CPU) -> None:
        self._offset, self._numel = offset, values.numel()
        buffer = torch.full((offset + values.numel() + 7,), self.FILL, dtype=values.dtype)
        buffer[offset : offset + self._numel].copy_(values)
        self._buffer = buffer.to(device)
        self.tensor = self._buffer[offset : offset + self._numel]

    def intact(self) -> bool:
        """Whether nothing outside the tensor was written."""
        buffer = self._buffer.cpu()
        outside = torch.cat([buffer[: self._offset], buffer[self._offset + self._numel :]])
        return bool((outside == self.FILL).all())


@contextmanager
def backend(label: str):
    """Give the registry's name of a backend, its instruction set being in use meanwhile."""
    name, _, instruction_set = label.partition("-")
    if instruction_set:
        assert cpu._native.use_instruction_set(instruction_set)
    try:
        yield name
    finally:
        if CPU_SETS:
            cpu._native.use_instruction_set(CPU_SETS[0])


def run(
    label: str,
    case: Case,
    dtype: torch.dtype,
    inputs: Sequence[dict[str, np.ndarray]],
    numbers: Sequence[int],
    places: Sequence[Place],
    offset: Callable[[int, int, str], int] = lambda i, j, key: (5 * i + 3 * j) % 13,
    device: torch.device = CPU,
) -> tuple[list[dict[str, Tensor]], list[Guarded]]:
    """Take one step of one backend on all inputs; return the tensors by the oracle's names, and their guarded buffers.

    ``offset`` gives the place in its buffer of role number ``j``, by the oracle's name ``key``, of input ``i``. On another
    device than the CPU no kernels are started but the backend's.
    """
    guards = [
        {key: Guarded(to_torch(a), offset(i, j, key), device) for j, (key, a) in enumerate(arrays.items())}
        for i, arrays in enumerate(inputs)
    ]
    tensors = tensors_of(case, [{key: guard.tensor for key, guard in g.items()} for g in guards], numbers, places)
    scalars = case.rounded(dtype)
    grads = [g["g"].tensor for g in guards] if scalars.inner else []

    scale, found = (None if t is None else t.to(device) for t in scales(dtype, case.inv_scale, case.found_inf))
    with backend(label) as name:
        backends.make_plan(name, tensors).run(grads, scalars, scale, found)
    outputs = [{key: guard.tensor for key, guard in g.items()} for g in guards]
    return outputs, [guard for g in guards for guard in g.values()]


def tensors_of(case: Case, inputs: Sequence[dict[str, Tensor]], numbers: Sequence[int], places: Sequence[Place]) -> Tensors:
    """Return the lists of a call from tensors by the oracle's names."""
    average = "m" if case.scalars.get("family", "langevin") == "langevin" else "p"
    names = {role: average if key == "average" else key for role, key in ROLES.items()}
    lists = {role: [t[key] for t in inputs] for role, key in names.items() if inputs and key in inputs[0]}
    return Tensors(params=[t["y"] for t in inputs], numbers=numbers, places=places, **lists)


def plan_inputs(name: str, dtype: torch.dtype, sizes: list[int]) -> tuple[list[dict[str, Tensor]], Tensors]:
    """Return the tensors of a call by the oracle's names, and as a plan takes them."""
    case = BY_NAME[name]
    roles = [{key: to_torch(a) for key, a in arrays.items()} for arrays in inputs_for(case, dtype, sizes)]
    return roles, tensors_of(case, roles, range(len(sizes)), [whole(n) for n in sizes])


def scales(dtype: torch.dtype, inv_scale: float | None, found_inf: float | None) -> tuple[Tensor | None, Tensor | None]:
    """Return both as a plan takes them: the one of the compute type, the other float32."""
    scale = None if inv_scale is None else torch.tensor(inv_scale, dtype=compute_type(dtype))
    return scale, None if found_inf is None else torch.tensor(float(found_inf))


def whole(numel: int) -> Place:
    """Return the place of a tensor that is not sharded."""
    return as_place("place", 0, numel)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, a NaN being a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def where(a: Tensor, b: Tensor) -> str:
    """Say where two tensors differ."""
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    return f"at {differ.nonzero().flatten()[:8].tolist()} and others, {int(differ.sum())} in all"


def assert_equal(got: Sequence[dict[str, Tensor]], want: Sequence[dict[str, Tensor]], when: object) -> None:
    """Compare all tensors, by the oracle's names, of all inputs."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        for key in b:
            assert same(a[key], b[key]), f"{key} of tensor {i} after {when}, {where(a[key], b[key])}"
