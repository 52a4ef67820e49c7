"""A training step, whole or in two halves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Steps:
    """What compresses training steps; the halves serve drivers with a hook before and one after the forward pass."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of one training step: its forward passes, and whatever else belongs to it."""
        self.begin_step()
        try:
            yield
        finally:
            self.end_step()

    def begin_step(self) -> None:
        """The first half of :meth:`step`."""
        raise NotImplementedError

    def end_step(self) -> None:
        """The second half of :meth:`step`. Does nothing outside of one."""
        raise NotImplementedError
