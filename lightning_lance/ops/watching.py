"""The mode that looks at functional calls, and how our own operators step out of its sight.

Python is asked about every torch function under such a mode, each view and each size included, which costs a small
network more than the operators of its layers do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import overrides
from torch.overrides import TorchFunctionMode

_modes: Any = overrides

P = ParamSpec("P")
R = TypeVar("R")


class WatchingMode(TorchFunctionMode):
    """Base of the mode; what it would replace, our own operators never call."""


def unwatched(method: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the mode is off while the method runs, where it is the innermost one."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not isinstance(_modes._get_current_function_mode(), WatchingMode):
            return method(*args, **kwargs)
        mode = _modes._pop_mode()
        try:
            return method(*args, **kwargs)
        finally:
            _modes._push_mode(mode)

    return run
