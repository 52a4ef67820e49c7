"""Our operators step out of the sight of our function mode, and of no other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from lightning_lance import LanceConfig, LanceSession
from lightning_lance.layers.compressed import unwatched
from lightning_lance.ops.watching import WatchingMode


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class CountingOurs(Counting, WatchingMode):
    pass


def test_the_mode_is_back_after_the_method_and_after_an_error() -> None:
    @unwatched
    def inner(fail: bool) -> Any:
        if fail:
            raise KeyError
        return _get_current_function_mode()

    with CountingOurs() as mode:
        assert inner(False) is None
        with pytest.raises(KeyError):
            inner(True)
        assert _get_current_function_mode() is mode
        with Counting() as other:
            assert inner(False) is other
        assert _get_current_function_mode() is mode
    assert _get_current_function_mode() is None


def test_what_a_swapped_layer_projects_is_unseen_by_ours_and_seen_by_others() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.randn(32, 3, 8, 8)
    session = LanceSession(model, LanceConfig(rank={"batch": 4, "spatial": 3}))
    session.start()
    session.calibrate([lambda: model(x)])
    with CountingOurs() as ours:
        model(x)
    names = {function.__name__ for function in ours.seen}
    assert {"flatten", "relu"} <= names
    assert not names & {"conv2d", "linear", "matmul", "index_add_"}
    with Counting() as others:
        model(x)
    assert {function.__name__ for function in others.seen} >= {"conv2d", "linear", "matmul"}
    session.stop()
