"""The table of a launch: a row for each tensor, in device memory, that the blocks look up.

Packet p of a tensor is its elements start + p*N to start + (p + 1)*N - 1: what a thread works on at a time, N elements (8 of
the types of 2 bytes, else 4), so that accesses are of 16 bytes for every type. A block has whole packets of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import Tensors, compute_type

#: Each row is one int64 for each of these, and padded to `ROW` of them. Roles are addresses, 0 for one that plays no part.
COLUMNS = (
    *("y", "x", "m", "v", "w", "c", "master"),
    "aligned",  # whether 16 divides the addresses of packets, of all roles but the gradient
    "numel",
    "start",  # of packet 0, in (-N, 0]
    "first_block",  # of those that work on this tensor
    "number",  # of the noise stream
    *("offset", "run", "pitch"),  # the tensor's place
)
ROW = 16


def packet_of(itemsize: int) -> int:
    """Return N for a stored type of ``itemsize`` bytes."""
    return 8 if itemsize == 2 else 4


def rows_of(tensors: Tensors, block: int) -> tuple[list[int], list[int]]:
    """Return the table of a call's tensors, one row after the other, and the number of blocks of each.

    Args:
        tensors: those of the call.
        block: the elements of a block.
    """
    if not tensors.params:
        return [], []
    itemsize = tensors.params[0].element_size()
    state_size = compute_type(tensors.params[0].dtype).itemsize
    state = {
        "x": tensors.anchors,
        "m": tensors.averages,
        "v": tensors.momenta,
        "w": tensors.outer_momenta,
        "c": tensors.consensus,
        "master": tensors.masters,
    }
    rows: list[int] = []
    counts: list[int] = []
    for i, (param, number, place) in enumerate(zip(tensors.params, tensors.numbers, tensors.places, strict=True)):
        numel = param.numel()
        addresses = {"y": param.data_ptr(), **{name: role[i].data_ptr() for name, role in state.items() if role}}
        sized = [(address, itemsize if name == "y" else state_size) for name, address in addresses.items()]
        start, aligned = _first_packet(sized, place, numel, packet_of(itemsize))
        row = {
            **addresses,
            "aligned": aligned,
            "numel": numel,
            "start": start,
            "first_block": sum(counts[-1:]) + (rows[-ROW + COLUMNS.index("first_block")] if rows else 0),
            "number": number,
            **place._asdict(),
        }
        rows += [int(row.get(name, 0)) for name in COLUMNS] + [0] * (ROW - len(COLUMNS))
        counts.append(-(-(numel - start) // block) if numel else 0)
    return rows, counts


def _first_packet(addresses: Sequence[tuple[int, int]], place: Place, numel: int, packet: int) -> tuple[int, bool]:
    """Return where packet 0 starts, and whether all ``addresses`` are divisible by 16 there; they come with element sizes.

    That packets are of whole noise counters comes before that they are aligned: what a counter for each element costs is more
    than what narrow accesses cost.
    """

    def aligned(start: int) -> bool:
        return all((address + start * size) % 16 == 0 for address, size in addresses)

    def straight(start: int) -> bool:
        return numel > place.run or (place.offset + start) % 4 == 0

    start = max(range(0, -packet, -1), key=lambda start: (straight(start), aligned(start)))  # the first of the best
    return start, aligned(start)
