"""A step through the passes in C has the gradients of one through kernels of torch and NumPy."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import LanceConfig, LanceSession
from lightning_lance.tensors import native
from tests.oracles import relative_error

pytestmark = pytest.mark.skipif(native._native is None, reason="nothing was compiled")


def convolutions(side: int) -> nn.Module:
    """Norms with an activation of each kind behind them, on maps that groups fit into and on others."""
    activations = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.SiLU(), nn.LeakyReLU(), nn.ReLU(inplace=True)]
    layers: list[nn.Module] = []
    for index, activation in enumerate(activations):
        layers += [nn.Conv2d(12 if index else 3, 12, 3, padding=1), nn.BatchNorm2d(12), activation]
    return nn.Sequential(*layers, nn.Dropout(0.3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * (side // 2) ** 2, 4))


def tokens(_: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 4, 96, 0.1, "gelu", batch_first=True)
    return nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48), layer, nn.Linear(48, 4))


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "maps of 16 x 16": (convolutions, (8, 3, 16, 16)),
    "maps of 7 x 7": (convolutions, (8, 3, 7, 7)),
    "tokens": (tokens, (8, 20, 48)),
}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_without(case: str, last: bool, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = CASES[case]
    if last and len(shape) < 4:
        pytest.skip("there is no such format for these axes")
    batch = torch.randn(shape)
    if last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    called: list[str] = []
    for name in ("pack_rows", "expand_rows", "pack_flags", "expand_flags"):
        stock = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, _name=name, _stock=stock, **k: called.append(_name) or _stock(*a, **k)
        )

    def step() -> tuple[Tensor, int]:
        torch.manual_seed(0)
        model = make(shape[-1])
        if last:
            model = model.to(memory_format=torch.channels_last)
        session = LanceSession(model, LanceConfig(bits=4))
        session.start()
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext(), session.step():
            loss = model(batch).square().mean()
        loss.backward()
        session.stop()
        assert session.report is not None
        assert session.report.compressed is not None
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        return gradient, session.report.compressed.total

    ours, kept = step()
    assert {"pack_rows", "expand_rows", "expand_flags"} <= set(called)
    monkeypatch.setattr(native, "_native", None)
    called.clear()
    without, kept_without = step()
    assert "expand_rows" not in called
    assert kept == kept_without
    assert relative_error(ours, without) < (0.05 if half else 0.01)
