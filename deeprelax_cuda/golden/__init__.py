"""The golden file of the numeric contract: inputs and the bits that every backend must return for them.

``load()`` gives a dict:

* ``version``: of the contract; whoever changes a bit changes this number.
* ``philox``: known answers of Philox4x32-10: ``counter``, ``key`` and ``words``.
* ``words``: of an element ``index`` under ``seed``, ``step``, ``stream``: the four ``words`` of its counter.
* ``normals``: the normals of eight elements from ``offset`` on.
* ``pairs``: two ``words`` and their two ``normals``, which are the elements ``offset`` and ``offset + 1``; ``why`` names what
  they catch: a corner, or a coefficient that is one float32 unit in the last place too high ("up") or too low ("down").
* ``inputs``: named sets of 17-element tensors.
* ``updates``: whole steps: the ``inputs`` set and the ``tensors`` taken from it, ``dtype`` of ``y`` and ``g``, ``family``,
  ``inner`` and ``outer``, ``scalars``, tensor ``number``, ``place`` (offset, run, pitch), ``inv_scale`` (to be rounded to the
  compute type) and ``found_inf`` where there are any, and ``out``, all tensors that a step may write, afterwards.

Words are hexadecimal strings, normals hexadecimal floats (`float.fromhex`), tensors one string of hexadecimal bit patterns, an
element each; a NaN is a NaN whatever its bits. Scalars are decimals that give back the binary64 number, already rounded once to
the compute type. The file is written by tools/make_golden.py from the independent implementation of the contract in the tests.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def load() -> dict[str, Any]:
    """Return the golden file of contract version 1, parsed."""
    text = resources.files(__name__).joinpath("contract_v1.json").read_text(encoding="utf-8")
    golden: dict[str, Any] = json.loads(text)
    return golden
