"""The table of a launch: a row for each tensor, in device memory, that the blocks look up.

Packet p of a tensor is its elements start + p*N to start + (p + 1)*N - 1: what a thread works on at a time, N elements (8 of
the types of 2 bytes, else 4), so that accesses are of 16 bytes for every type. A block has whole packets of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import Tensors, compute_type

#: Each row is one int64 for each of these, and one more to make them `ROW`. Roles are addresses, 0 for one that plays no part.
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
    itemsize, state_size = tensors.params[0].element_size(), compute_type(tensors.params[0].dtype).itemsize
    nothing = [0] * len(tensors.params)
    lists = (
        *(tensors.params, tensors.anchors, tensors.averages, tensors.momenta),
        *(tensors.outer_momenta, tensors.consensus, tensors.masters),
    )
    roles = zip(*([t.data_ptr() for t in tensors] or nothing for tensors in lists), strict=True)
    numels = [param.numel() for param in tensors.params]
    rows: list[int] = []
    counts: list[int] = []
    first_block = 0
    for addresses, numel, number, place in zip(roles, numels, tensors.numbers, tensors.places, strict=True):
        start, aligned = 0, not (addresses[0] | addresses[1] | addresses[2] | addresses[3]) & 15  # as nearly all are
        if not aligned or any(addresses[4:]) or (place.offset & 3 and numel <= place.run):
            sized = [(address, state_size) for address in addresses[1:] if address]
            start, aligned = _first_packet([(addresses[0], itemsize), *sized], place, numel, packet_of(itemsize))
        rows += (*addresses, int(aligned), numel, start, first_block, number, *place, 0)
        counts.append(-(-(numel - start) // block) if numel else 0)
        first_block += counts[-1]
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
