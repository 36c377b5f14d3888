from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

from deeprelax_cuda.steps import Scalars

class Dtype(Enum):
    float32 = ...
    float64 = ...
    bfloat16 = ...
    float16 = ...

class Table:
    def __init__(
        self,
        dtype: Dtype,
        numels: Sequence[int],
        numbers: Sequence[int],
        places: Sequence[tuple[int, int, int]],
        params: Sequence[int],
        anchors: Sequence[int],
        averages: Sequence[int],
        momenta: Sequence[int],
        masters: Sequence[int],
        outer_momenta: Sequence[int],
        consensus: Sequence[int],
    ) -> None: ...
    def run_cpu(
        self, grads: bytes, scalars: Scalars, inv_scale: int, found_inf: int, clock: Clock | None, threads: int
    ) -> None: ...
    def run_cuda(
        self, grads: bytes, scalars: Scalars, inv_scale: int, found_inf: int, clock: Clock | None, device: int, stream: int
    ) -> None: ...

class Clock:
    def __init__(
        self,
        addresses: Sequence[int],
        lr_is_float: bool,
        counts: bool,
        rule: tuple[int, float, float, float, float, float],
        law: tuple[str, str, str, float],
    ) -> None: ...

class Watch:
    def __init__(
        self,
        exchange: object,
        address_of: int,
        small: int,
        groups: Sequence[list[Tensor]],
        state: Mapping[Tensor, Mapping[str, Any]],
        written: Sequence[Tensor],
    ) -> None: ...
    def look(
        self, groups: Sequence[list[Tensor]], state: Mapping[Tensor, Mapping[str, Any]]
    ) -> tuple[list[Tensor | None], bool, bytes] | None: ...

def gaussian(out: int, numel: int, seed: int, step: int, stream: int, offset: int, threads: int) -> None: ...

# These two, and Table.run_cuda, are in builds with CUDA only.
def cuda_gaussian(
    out: int, numel: int, seed: int, step: int, stream: int, offset: int, device: int, cuda_stream: int
) -> None: ...
def cuda_unavailable(device: int) -> str: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> bool: ...
def build_info() -> dict[str, str | bool]: ...
