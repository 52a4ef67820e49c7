"""Small integers packed into bytes, in memory order, and tables of what they stand for.

As in :mod:`lightning_lance.tensors.bits`, several bytes are seen as one integer, and one multiplication gathers them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Codes in a byte -> integer of as many bytes, the factor that brings the codes together in its highest byte, and how
# far that is shifted down. The partial products below do not meet, those above fall off.
# The byte order of the machine decides which code comes first; unpacking tables are made by packing.
_WORDS = {4: (torch.int32, 1 << 24 | 1 << 18 | 1 << 12 | 1 << 6, 24), 2: (torch.int16, 1 << 8 | 1 << 4, 8)}


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
    dtype, gather, shift = _WORDS[per_byte]
    return codes.view(dtype).mul(gather).bitwise_right_shift_(shift).to(torch.uint8)


def unpack_codes(packed: Tensor, table: Tensor) -> Tensor:
    """What packed codes stand for, one row of a table for every byte.

    Args:
        packed: what :func:`pack_codes` returned.
        table: made by :func:`unpacking_table` for as many codes in a byte.

    Returns:
        New tensor of one axis, of the dtype of the table; longer than the codes were where those left a byte unfilled.
    """
    return table.index_select(0, packed.int()).view(-1)


def unpacking_table(values: Tensor, per_byte: int) -> Tensor:
    """What the codes in each byte stand for.

    Args:
        values: ``(number of codes,)``, the value of each.
        per_byte: codes in a byte: 4, 2 or 1.

    Returns:
        ``(256, per_byte)``, or the values themselves for one code in a byte.
    """
    if per_byte == 1:
        return values
    width = 8 // per_byte
    shifts = torch.arange(0, 8, width, device=values.device)
    combinations = (torch.arange(256, device=values.device).unsqueeze(-1) >> shifts) & (2**width - 1)
    rows = torch.empty_like(combinations)
    rows[pack_codes(combinations.flatten().to(torch.uint8), per_byte).long()] = combinations
    codes = rows.flatten().clamp_(max=values.numel() - 1)  # those beyond do not occur
    return values.index_select(0, codes).view(256, per_byte)
