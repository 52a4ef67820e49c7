"""What the operator that runs now is known to keep, for those who look at what autograd saves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

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
        pending: the input of a normalisation, kept whole until the operator behind it is known.
        looking: saved tensors are read, and it is not a backward pass that reads them.
    """

    rule: Rule | None = None
    arguments: tuple[Any, ...] = ()
    name: str = ""
    store: Any = None
    pending: Any = None
    looking: bool = False


saving = Saving()
