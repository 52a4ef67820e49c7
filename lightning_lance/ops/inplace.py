"""Operators that may write on their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply(function: Any, input: Tensor, inplace: bool, *arguments: Any) -> Tensor:
    """Apply an autograd function ``(input, inplace, *arguments)``.

    Compiled code gets a new tensor and a copy, which the compiler removes: for a function that writes on an input of
    the graph torch 2.14 compiles a wrong gradient.

    Args:
        function: subclass of :class:`torch.autograd.Function`; in place it marks its input dirty and returns it.
        input: any tensor.
        inplace: whether to write on it.
        arguments: the rest.
    """
    if inplace and torch.compiler.is_compiling():
        return input.copy_(function.apply(input, False, *arguments))
    return function.apply(input, inplace, *arguments)  # type: ignore[no-any-return]
