"""Random networks against plain training: exact bit for bit, default within its cosine, kept never above plain."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance import LanceConfig, LanceSession
from tests.live_bytes import LiveBytes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::lightning_lance.errors.LanceWarning"),
]

SIZE = 16
LEAST_COSINE, MEAN_COSINE = 0.97, 0.995
"""Of the default setting's gradient with the exact one."""

LEAST_RATIO, TIMES_LESS = 5.0, 7.0
"""Bytes of plain training to those of the default setting: of any network, and of all together."""


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
        layers += [nn.Flatten(), nn.Linear(channels * SIZE**2, 3)]
    else:
        layers += [nn.Flatten(2), nn.Linear(SIZE**2, 5)]
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


def alive(model: nn.Module, x: Tensor, context: Any = None) -> int:
    """Bytes of tensors that a forward pass leaves alive beside its result, whoever holds them."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with LiveBytes(leaf, *model.parameters(), *model.buffers()) as live:
        with context or contextlib.nullcontext():
            y = model(leaf * 1.0)
        return live.alive() - y.untyped_storage().nbytes()


class Found(NamedTuple):
    cosine: float
    plain: int
    kept: int


def check(number: int) -> Found:
    """What 4 bits do to one network; the exact setting is asserted to change no bit."""
    drawn = random.Random(number)
    torch.manual_seed(number)
    model = network(drawn)
    plain = copy.deepcopy(model)
    layout = torch.channels_last if drawn.random() < 0.3 else torch.contiguous_format
    smooth = F.interpolate(torch.randn(30, 4, 4, 4), size=(SIZE, SIZE), mode="bilinear")
    data = (smooth + 0.3 * torch.randn(30, 4, SIZE, SIZE)).to(memory_format=layout)
    norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    batches = [n for n in (30, drawn.randint(1, 29), 0) if n > 1 or not norms]
    wanted = [gradients(plain, data[:n]) for n in batches]
    cosine = 1.0
    for bits in (None, 4):
        ours = copy.deepcopy(model)
        session = LanceSession(ours, LanceConfig(None if bits is None else "auto", bits))
        session.start()
        for n, (y, exact, of_input) in zip(batches, wanted, strict=True):
            x = data[:n]
            found = gradients(ours, x, session.step())
            assert torch.equal(found[0], y), (number, bits, n)
            if bits is None:
                assert torch.equal(found[1], exact), (number, n, model)
                assert torch.equal(found[2], of_input), (number, n, model)
            assert found[1].isfinite().all()
            if n == 30 and exact.norm() > 0:
                cosine = float(F.cosine_similarity(found[1].double(), exact.double(), dim=0))
        kept = alive(ours, data, session.step()), alive(plain, data)
        assert kept[0] <= kept[1], (number, bits, kept, model)
        report = session.report
        assert report is not None
        assert report.plain is not None
        assert report.compressed is not None
        assert report.compressed.total <= report.plain.total, (number, bits)
        session.stop()
        assert [type(module) for module in ours.modules()] == [type(module) for module in plain.modules()]
        for (name, one), other in zip(ours.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other), (number, name)
    assert cosine > LEAST_COSINE, (number, cosine, model)
    return Found(cosine, kept[1], kept[0])


@pytest.mark.parametrize(
    "networks", [pytest.param(15, id="short"), pytest.param(300, id="long", marks=pytest.mark.soak)]
)
def test_random_networks(networks: int) -> None:
    found = [check(number) for number in range(networks)]
    cosines, ratios = [one.cosine for one in found], [one.plain / one.kept for one in found]
    print(  # noqa: T201
        f"{networks} networks, cosine of the gradient {sum(cosines) / networks:.4f} in the mean, {min(cosines):.4f} at "
        f"least; {sum(one.plain for one in found) / sum(one.kept for one in found):.2f} times fewer bytes, "
        f"{min(ratios):.2f} at least"
    )
    assert sum(cosines) / networks > MEAN_COSINE
    assert sum(one.plain for one in found) > TIMES_LESS * sum(one.kept for one in found)
    assert min(ratios) > LEAST_RATIO
