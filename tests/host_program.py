"""The program behind test_cuda_on_host.py: takes the module that has a host in the place of the GPU, and a group of cases."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from itertools import islice

#: Where the groups are: functions of the same name that give the names of cases and what to call.
GROUPS = {
    "cases": "host_cases",
    "offsets": "host_cases",
    "lists": "host_lists",
    "huge": "host_huge",
    "clock": "host_clock",
    "drawn": "host_drawn",
}


def use(path: str) -> None:
    """Make a module the native one of the package, before anything of it is imported. Its CPU kernels are the portable ones."""
    spec = importlib.util.spec_from_file_location("deeprelax_cuda._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def group(name: str):
    return getattr(importlib.import_module(GROUPS[name]), name)()


def few() -> Iterator:
    """A little of everything."""
    for name, every in {"cases": 7, "offsets": 11, "lists": 7, "huge": 5, "clock": 13}.items():
        yield from islice((test for test in group(name) if "5000 tensors" not in test[0]), 0, None, every)
    from host_drawn import draw_calls

    yield "100 calls", lambda: draw_calls(100)


def unaligned() -> Iterator:
    """What must be reported."""
    import torch
    from host_module import read_packet

    memory = torch.zeros(64)
    yield "a packet at an address that sixteen does not divide", lambda: read_packet(memory.data_ptr() + 4)


def beyond() -> Iterator:
    """What must be reported."""
    import torch
    from host_module import Guarded, read_packet

    memory = Guarded(torch.zeros(62), 4)  # sixteen divides the address
    yield "a packet beyond the end", lambda: read_packet(memory.tensor.data_ptr() + 60 * 4)


def main(path: str, name: str) -> int:
    use(path)
    from host_module import HOST, watch

    from deeprelax_cuda.backends import cuda

    cuda.NO_DEVICE = HOST  # type: ignore[misc]  # tensors on no GPU are the host's
    failed = count = 0
    for label, test in {"few": few, "unaligned": unaligned, "beyond": beyond}.get(name, lambda: group(name))():
        print(label, flush=True)
        count += 1
        watch()
        try:
            test()
        except Exception:
            failed += 1
            print(f"FAILED {label}\n{traceback.format_exc(limit=-3)}", flush=True)
    print(f"{failed} of {count} cases failed" if failed else f"all of {count} cases passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
