"""The mode that looks at functional calls, which our own operators step out of the sight of.

Python is asked about every torch function under such a mode, each view and each size included, which costs a small
network more than the operators of its layers do.
"""

from __future__ import annotations

from torch.overrides import TorchFunctionMode


class WatchingMode(TorchFunctionMode):
    """Base of the mode; what it would replace, our own operators never call."""
