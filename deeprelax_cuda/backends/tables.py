"""Tensors, gradients and clocks as the native module takes them: addresses and plain numbers. The caller keeps the tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deeprelax_cuda.clock import Clock
from deeprelax_cuda.native import module as _native
from deeprelax_cuda.steps import Tensors


def make_table(tensors: Tensors) -> Any:
    """Return the native table of a call's tensors; None for no tensors."""
    if not tensors.params:
        return None
    return _native.Table(
        getattr(_native.Dtype, str(tensors.params[0].dtype).removeprefix("torch.")),
        [p.numel() for p in tensors.params],
        tensors.numbers,
        tensors.places,
        _addresses(tensors.params),
        _addresses(tensors.anchors),
        _addresses(tensors.averages),
        _addresses(tensors.momenta),
        _addresses(tensors.masters),
        _addresses(tensors.outer_momenta),
        _addresses(tensors.consensus),
    )


def gradient_addresses(grads: Sequence[Tensor]) -> bytes:
    """Return the addresses of the gradients as a table takes them."""
    return array("Q", map(Tensor.data_ptr, grads)).tobytes()


def native_clock(clock: Clock) -> Any:
    """Return the clock as the native module takes it."""
    parts = (clock.step, clock.position, clock.outer_steps, clock.gamma, clock.lr, clock.period_steps, clock.numbers)
    addresses = [0 if t is None else t.data_ptr() for t in parts]
    return _native.Clock(addresses, clock.lr.dtype == torch.float32, clock.counts, tuple(clock.rule), tuple(clock.law))


def _addresses(role: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in role]
