"""Whether operators run as they are written, or a tracer stands between."""

from __future__ import annotations

import torch
from torch import Tensor


def traced() -> bool:
    """Whether operators make stand-ins for their results, for a compiler or an exporter."""
    return torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor
