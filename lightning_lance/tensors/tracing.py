"""Whether operators run as they are written, or a tracer stands between."""

from __future__ import annotations

import torch
from torch import Tensor


def traced() -> bool:
    """Whether operators make stand-ins for their results, for a compiler or an exporter."""
    return torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor


def eager_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU, in full precision, and not traced.

    Several operations have a faster way there than the one that suits every device: memory is close and arithmetic
    dear, sums are made in a fixed order, and what is small need not be large to fill the machine.
    """
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) and not traced()
