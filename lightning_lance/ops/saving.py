"""What the operator that runs now is known to keep, for those who look at what autograd saves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Tensor, Any], Any]
"""How to keep a tensor that an operator saves: ``rule(tensor, store)``; ``NotImplemented``: as any other tensor."""


class FinishedRule:
    """Base of the rules that want to see the result of their operator."""

    __slots__ = ()

    def __call__(self, saved: Tensor, store: Any) -> Any:
        raise NotImplementedError

    def finish(self, result: Tensor, store: Any) -> None:
        """Called when the operator has run."""
        raise NotImplementedError


class Saving(threading.local):
    """The operator that runs in this thread.

    Attributes:
        rule: how to keep what it saves; ``None``: nothing is known of it.
        arguments: what it was called with.
        name: what to call it in a report.
        store: what looks at saved tensors in this thread; ``None``: nobody does.
        resting: a step runs that nobody looks at.
        pending: the input of a normalisation, kept whole until the operator behind it is known.
        looking: saved tensors are read, and it is not a backward pass that reads them.
        lent: what stands in the graph, for a backward pass that can read it as it is; ``None``: nobody asks.
        asked: the method by which that reads it.
    """

    rule: Rule | None = None
    arguments: tuple[Any, ...] = ()
    name: str = ""
    store: Any = None
    resting: bool = False
    pending: Any = None
    looking: bool = False
    lent: list[Any] | None = None
    asked: str = ""


saving = Saving()


def lent(ctx: Any, method: str) -> tuple[Any, tuple[Any, ...]]:
    """What stands in the graph for the first saved tensor of an operator, and the tensors.

    Args:
        ctx: of the operator.
        method: what reads it.

    Returns:
        ``None`` where it is a tensor, or a graph of the backward pass is asked for; else the first tensor has no
        elements.
    """
    if torch.is_grad_enabled():
        return None, ctx.saved_tensors
    found: list[Any] = []
    saving.lent, saving.asked = found, method
    try:
        tensors = ctx.saved_tensors
    finally:
        saving.lent = None
    return (found[0] if found else None), tensors
