"""The golden file put to a backend: what it holds of normals and of whole steps, and what differs, in words."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda import backends, golden
from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import Scalars, Tensors, compute_type

#: The roles of `Tensors` by the golden file's names of them.
_ROLES = {
    "x": "anchors",
    "m": "averages",
    "p": "averages",
    "v": "momenta",
    "master": "masters",
    "w": "outer_momenta",
    "consensus": "consensus",
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Result(NamedTuple):
    """How many entries a backend was asked for, and a line for each that it did not give bit for bit."""

    entries: int
    failures: list[str]


def run(name: str, device: torch.device | str) -> Result:
    """Put all normals, pairs and updates of the golden file to the backend ``name`` on ``device``."""
    known, device = golden.load(), torch.device(device)
    normals = [*known["normals"], *known["pairs"]]
    answers = [check_normals(entry, name, device) for entry in normals]
    answers += [check_update(entry, known["inputs"][entry["inputs"]], name, device) for entry in known["updates"]]
    return Result(len(answers), [answer for answer in answers if answer])


def check_normals(entry: Mapping[str, Any], name: str, device: torch.device) -> str | None:
    """Return what a backend's normals differ in from an entry of ``normals`` or ``pairs``, None where all bits are right."""
    want = torch.tensor([float.fromhex(text) for text in entry["normals"]], dtype=torch.float32)
    at = {key: entry[key] for key in ("seed", "step", "stream", "offset")}
    difference = _difference(backends.load(name).gaussian(len(want), **at, device=device), want)
    return difference and f"normals of {', '.join(f'{key} {value}' for key, value in at.items())}: {difference}"


def check_update(entry: Mapping[str, Any], inputs: Mapping[str, str], name: str, device: torch.device) -> str | None:
    """Return what a backend's step differs in from an entry of ``updates``, None where all bits of all tensors are right.

    ``inputs`` is the entry's set of tensors; what the step must not write is compared with it.
    """
    dtype = getattr(torch, entry["dtype"])
    wide = compute_type(dtype)
    dtypes = {key: dtype if key in ("y", "g") else wide for key in entry["tensors"]}
    at = {key: _tensor(inputs[key], dtypes[key]).to(device) for key in entry["tensors"]}
    lists: dict[str, Any] = {_ROLES[key]: [tensor] for key, tensor in at.items() if key in _ROLES}
    tensors = Tensors([at["y"]], numbers=[entry["number"]], places=[Place(*entry["place"])], **lists)
    scalars = Scalars(entry["family"], entry["inner"], entry["outer"], **entry["scalars"])
    inv_scale, found_inf = entry.get("inv_scale"), entry.get("found_inf")
    backends.make_plan(name, tensors).run(
        [at["g"]] if scalars.inner else [],
        scalars,
        None if inv_scale is None else torch.tensor(float(inv_scale), dtype=wide, device=device),
        None if found_inf is None else torch.tensor(float(found_inf), dtype=torch.float32, device=device),
    )
    for key, tensor in at.items():
        if difference := _difference(tensor, _tensor(entry["out"].get(key, inputs[key]), dtypes[key])):
            return f'update "{entry["name"]}" of {entry["inputs"]}, {key}: {difference}'
    return None


def _tensor(text: str, dtype: torch.dtype) -> Tensor:
    """Read a tensor of the golden file."""
    words = (bytes.fromhex(word) for word in text.split())
    content = bytearray().join(word if sys.byteorder == "big" else word[::-1] for word in words)
    return torch.frombuffer(content, dtype=dtype)


def _difference(got: Tensor, want: Tensor) -> str | None:
    """Return the first difference of the bits of two tensors in words, None where there is none; a NaN is a NaN."""
    got = got.cpu()
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"expected {tuple(want.shape)} {want.dtype}, got {tuple(got.shape)} {got.dtype}"
    bits = _BITS[want.element_size()]
    wrong = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    if not wrong.any():
        return None
    first = int(wrong.nonzero()[0])
    digits, mask = 2 * want.element_size(), 2 ** (8 * want.element_size()) - 1
    expected, found = (f"{int(t.view(bits)[first]) & mask:0{digits}x}" for t in (want, got))
    return f"element {first}: expected {expected}, got {found}"
