"""Small integers packed into bytes, in memory order, and tables of what they stand for.

As in :mod:`lightning_lance.ops.mask`, several bytes are seen as one integer; here they are shifted onto each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Codes in a byte -> integer of as many bytes, and the shifts that bring their low bits together in its lowest byte.
# The byte order of the machine decides which code comes first; unpacking tables are made by packing.
_WORDS = {4: (torch.int32, (6, 12, 18)), 2: (torch.int16, (4,))}


def codes_per_byte(count: int) -> int:
    """How many codes one byte can hold if there are ``count`` different ones: 4, 2 or 1.

    Args:
        count: at most 256.
    """
    return 4 if count <= 4 else 2 if count <= 16 else 1


def pack_codes(codes: Tensor, per_byte: int) -> Tensor:
    """Pack codes.

    Args:
        codes: uint8, one axis, contiguous, each below ``2 ** (8 / per_byte)``.
        per_byte: 4, 2 or 1.

    Returns:
        uint8 of shape ``(ceil(n / per_byte),)``.
    """
    if per_byte == 1:
        return codes
    missing = -codes.numel() % per_byte
    if missing:
        codes = F.pad(codes, (0, missing))
    dtype, shifts = _WORDS[per_byte]
    words = codes.view(dtype)
    folded = words
    for shift in shifts:
        folded = folded | (words >> shift)
    return folded.to(torch.uint8)


def unpack_codes(packed: Tensor, per_byte: int, values: Tensor) -> Tensor:
    """What packed codes stand for, one row of a table for every byte.

    Args:
        packed: what :func:`pack_codes` returned.
        per_byte: as given to it.
        values: ``(number of codes,)``, the value of each.

    Returns:
        New tensor of one axis, of the dtype of ``values``; longer than the codes were where those left a byte unfilled.
    """
    if per_byte > 1:
        values = values.index_select(0, _rows(per_byte, values.numel(), packed.device)).view(256, per_byte)
    return values.index_select(0, packed.int()).view(-1)


def _rows(per_byte: int, count: int, device: torch.device) -> Tensor:
    """The codes in each of the 256 bytes, as one vector; found by packing every combination."""
    width = 8 // per_byte
    shifts = torch.arange(0, 8, width, device=device)
    combinations = (torch.arange(256, device=device).unsqueeze(-1) >> shifts) & (2**width - 1)
    rows = torch.empty_like(combinations)
    rows[pack_codes(combinations.flatten().to(torch.uint8), per_byte).long()] = combinations
    return rows.flatten().clamp_(max=count - 1)  # codes beyond do not occur
