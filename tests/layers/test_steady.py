"""A steady step looks up what it did the last time, and runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lance
from lightning_lance import LanceConfig, LanceSession
from tests.swapped import COMPACT_MODES

ROOT = str(Path(lightning_lance.__file__).parent)

RANKS = [{"rank": COMPACT_MODES}, {"rank": 8}, {"rank": {"batch": 4, "feature": 12, "token": 5}}]


def moves(run: Callable[[], Any]) -> list[tuple[str, str]]:
    """Calls from one file of the package to another, and their returns; frames of torch in between do not count."""
    found = []

    def caller(frame: FrameType) -> str | None:
        above = frame.f_back
        while above is not None and not above.f_code.co_filename.startswith(ROOT):
            above = above.f_back
        return None if above is None else above.f_code.co_filename

    def look(frame: FrameType, event: str, _: Any) -> None:
        own = frame.f_code.co_filename
        if event in ("call", "return") and own.startswith(ROOT):
            other = caller(frame)
            if other not in (None, own):
                found.append((event, own))

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def steps(session: LanceSession, batches: list[Tensor]) -> None:
    for batch in batches:
        with session.step():
            loss = session.model(batch).square().mean()
        loss.backward()


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("options", RANKS, ids=str)
def test_a_forward_pass_moves_little_between_files(options: dict[str, Any], rows: bool) -> None:
    if rows and isinstance(options["rank"], dict):
        options = {"rank": {"batch": 4, "feature": 12}}
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 2))
    batch = torch.randn(32, 48) if rows else torch.randn(32, 20, 48)
    session = LanceSession(model, LanceConfig(calibration_batches=2, **options))
    session.start()
    steps(session, [batch] * 5)
    assert all(layer._lance.subspace is not None for layer in session.layers.values())
    input = batch.clone().requires_grad_()
    with session.step():
        assert 4 <= len(moves(lambda: model[0](input))) <= 18
    session.stop()


@pytest.mark.parametrize("options", RANKS, ids=str)
def test_gradients_are_those_without_a_plan(options: dict[str, Any]) -> None:
    """Whichever sizes of batch come after one another, and when the subspaces are found anew."""
    sizes = [(16, 10), (16, 10), (12, 10), (16, 10), (16, 7), (16, 10), (16, 10), (16, 10), (16, 10)]
    found = []
    for forget in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)).double()
        session = LanceSession(model, LanceConfig(calibration_batches=2, refresh=4, seed=3, **options))
        session.start()
        gradients, kept = [], []
        for size in sizes:
            for layer in session.layers.values():
                if forget:
                    layer._lance.plan = None
            steps(session, [torch.randn(*size, 24).double()])
            kept += [layer._lance.plan is not None for layer in session.layers.values()]
            gradients += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        assert any(kept)
        found.append(gradients)
        session.stop()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_half_precision_gets_factors_of_its_own() -> None:
    model = nn.Linear(24, 24)
    session = LanceSession(model, LanceConfig(rank={"batch": 4}, bits=None, calibration_batches=1))
    session.start()
    steps(session, [torch.randn(16, 5, 24)] * 2)
    first = model._lance.plan  # type: ignore[union-attr]
    with session.step(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(16, 5, 24, dtype=torch.bfloat16)).float().sum().backward()
    second = model._lance.plan  # type: ignore[union-attr]
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)
    assert second.factors.rotation.dtype == torch.bfloat16
    session.stop()
