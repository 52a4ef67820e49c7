"""What tensors weigh whose elements are kept in 4 or 8 bits."""

from __future__ import annotations

GROUP = 64
"""Neighbours in memory that share a range."""


def rounded_bytes(elements: int, bits: int) -> int:
    """Bytes of the codes of all elements and of the range of every group.

    Args:
        elements: number of elements; the last group is filled up.
        bits: 4 or 8; the two numbers of a range have 2 bytes each with the former, 4 with the latter.
    """
    return -(-elements // GROUP) * (GROUP * bits // 8 + bits)


def core_bytes(elements: int, itemsize: int, bits: int | None) -> int:
    """Bytes of a core, rounded where that saves something.

    Args:
        elements: number of elements.
        itemsize: bytes of each.
        bits: bits asked for; ``None``: as it is.
    """
    whole = elements * itemsize
    return whole if bits is None else min(whole, rounded_bytes(elements, bits))
