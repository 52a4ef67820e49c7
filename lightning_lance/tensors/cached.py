"""Tensors that depend on a few plain arguments only, made once and shared by all calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import torch

from lightning_lance.tensors.tracing import traced

P = ParamSpec("P")
R = TypeVar("R")


def constant(make: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a function that makes constant tensors from hashable arguments; the last 64 results are kept.

    Calls with equal arguments share one result: do not write into it. Under a tracer a result is a stand-in that must
    not be kept for real calls, and one that was kept would not fit; then it is made anew.
    """

    @functools.wraps(make)
    def fresh(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False):  # a result of inference mode could not be saved for backward
            return make(*args, **kwargs)

    kept: Callable[..., R] = functools.lru_cache(maxsize=64)(fresh)

    @functools.wraps(make)
    def find(*args: Hashable, **kwargs: Hashable) -> R:
        return fresh(*args, **kwargs) if traced() else kept(*args, **kwargs)  # type: ignore[arg-type]

    return find  # type: ignore[return-value]
