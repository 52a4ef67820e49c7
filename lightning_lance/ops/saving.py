"""What the operator that runs now is known to keep, for those who look at what autograd saves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

Rule = Callable[[Tensor, Any], Any]
"""How to keep a tensor that an operator saves: ``rule(tensor, store)``; ``NotImplemented``: as any other tensor."""


class OurRule:
    """Base of the rules of our own operators, which plain training would not run."""

    __slots__ = ()


class Saving(threading.local):
    """The operator that runs in this thread.

    Attributes:
        rule: how to keep what it saves; ``None``: nothing is known of it.
        arguments: what it was called with.
        name: what to call it in a report.
        store: what looks at saved tensors in this thread; ``None``: nobody does.
    """

    rule: Rule | None = None
    arguments: tuple[Any, ...] = ()
    name: str = ""
    store: Any = None


saving = Saving()
