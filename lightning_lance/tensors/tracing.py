"""Whether operators run as they are written, or a tracer stands between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_core: Any = torch._C


def traced() -> bool:
    """Whether operators make stand-ins for their results, for a compiler or an exporter."""
    return torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor


def recorded() -> bool:
    """Whether a tracer writes down every operator, as ``make_fx`` and ``torch.func.linearize`` do.

    What depends on the values of a tensor cannot be written down.
    """
    return _core._get_dispatch_mode(_core._TorchDispatchModeKey.PROXY) is not None
