"""Random networks in the default setting against plain training."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import LanceSession, PlanError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::lightning_lance.errors.LanceWarning"),
]

DRAWS = 12
LEAST_COSINE = 0.3
"""Of the mean of so many gradients with the exact one: each is without bias, and noisy by its draw of samples."""


class Twice(nn.Module):
    """One module called twice in a pass, and its output changed in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y = y + self.inner(x * 0.5)
        y += 0.1
        return y


class Viewed(nn.Module):
    """Reads its input through a view that is not contiguous."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flip(-1).mT)


def block(drawn: random.Random, channels: int, shared: list[nn.Module]) -> tuple[list[nn.Module], int]:
    """Layers that keep the spatial size, and the channels behind them."""
    kind = drawn.choice(["conv", "conv", "pointwise", "depthwise", "twice", "viewed", "shared", "norm"])
    wide = drawn.choice([4, 6, 8, 12])
    inplace = drawn.random() < 0.5
    act: nn.Module = drawn.choice([nn.ReLU(inplace), nn.GELU(), nn.SiLU(inplace), nn.Hardswish(inplace), nn.Identity()])
    if kind == "conv":
        kernel, dilation = drawn.choice([1, 3, 5]), drawn.choice([1, 2])
        mode = drawn.choice(["zeros", "reflect", "circular"])
        padding = dilation * (kernel // 2)
        conv: nn.Module = nn.Conv2d(
            channels, wide, kernel, padding=padding, dilation=dilation, padding_mode=mode, bias=drawn.random() < 0.5
        )
        return [conv, act], wide
    if kind == "pointwise":
        return [nn.Conv2d(channels, wide, 1), act], wide
    if kind == "depthwise":
        return [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), act], channels
    if kind == "twice":
        return [Twice(nn.Conv2d(channels, channels, 3, padding=1)), act], channels
    if kind == "viewed":
        return [Viewed(nn.Conv2d(channels, wide, 3, padding="same")), act], wide
    if kind == "norm":
        return [drawn.choice([nn.BatchNorm2d(channels), nn.GroupNorm(2, channels), nn.Dropout(0.0)]), act], channels
    fitting = [module for module in shared if module.in_channels == channels]
    if not fitting:
        shared.append(nn.Conv2d(channels, channels, 3, padding=1))
        fitting = shared[-1:]
    return [fitting[0], act], channels


def network(drawn: random.Random) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels, shared = 4, list[nn.Module]()
    for _ in range(drawn.randint(1, 5)):
        more, channels = block(drawn, channels, shared)
        layers += more
    end = drawn.choice(["pool", "flat", "tokens"])
    if end == "pool":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    elif end == "flat":
        layers += [nn.Flatten(), nn.Linear(channels * 64, 3)]
    else:
        layers += [nn.Flatten(2), nn.Linear(64, 5)]
    return nn.Sequential(*layers)


def gradients(model: nn.Module, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the whole parameter gradient, and the input's."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with context or contextlib.nullcontext():
        y = model(x * 1.0)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    assert x.grad is not None
    return y.detach(), torch.cat(found), x.grad


def check(number: int) -> float | None:
    """Cosine of one network's gradient with the plain one; ``None`` where nothing can be compressed."""
    drawn = random.Random(number)
    torch.manual_seed(number)
    model = network(drawn)
    plain = copy.deepcopy(model)
    layout = torch.channels_last if drawn.random() < 0.3 else torch.contiguous_format
    smooth = torch.nn.functional.interpolate(torch.randn(30, 4, 3, 3), size=(8, 8), mode="bilinear")
    data = (smooth + 0.3 * torch.randn(30, 4, 8, 8)).to(memory_format=layout)
    session = LanceSession(model)
    try:
        session.start()
    except PlanError:
        return None
    session.calibrate([lambda: model(data)])
    cosine = 1.0
    for batch in (30, drawn.randint(1, 29), 0):
        x = data[:batch]
        if batch < 2 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            continue
        y, grad, of_input = gradients(model, x, session.step())
        wanted, exact, _ = gradients(plain, x)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        assert grad.shape == exact.shape
        assert grad.isfinite().all()
        assert of_input.isfinite().all()
        if batch == 30 and exact.norm() > 0:
            more = [gradients(model, x, session.step())[1] for _ in range(DRAWS - 1)]
            grad = torch.stack([grad, *more]).mean(0)
            cosine = float(torch.nn.functional.cosine_similarity(grad, exact, dim=0))
            assert cosine > LEAST_COSINE, (number, model)
        if batch == 0:
            assert not grad.any()
    session.stop()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    return cosine


@pytest.mark.parametrize(
    "networks", [pytest.param(25, id="short"), pytest.param(300, id="long", marks=pytest.mark.soak)]
)
def test_random_networks(networks: int) -> None:
    found = [cosine for number in range(networks) if (cosine := check(number)) is not None]
    assert len(found) > networks // 2
    mean = sum(found) / len(found)
    print(f"{len(found)} networks, cosine of the gradient {mean:.4f} in the mean, {min(found):.4f} at least")  # noqa: T201
    assert mean > 0.75
