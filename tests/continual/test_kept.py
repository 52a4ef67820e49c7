"""Layers whose weight may change outside of what is protected alone keep no more for backward than stock ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import LanceConfig, measure_saved_bytes
from lightning_lance.continual import ContinualConfig, ContinualSession
from lightning_lance.continual.layers import reserved_layers

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (16, 12, 12)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "zeros": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "reflect": lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(16, 16, 5, padding=2, padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
    "same, even": lambda: nn.Conv2d(16, 16, 4, padding="same"),
    "pointwise": lambda: nn.Conv2d(16, 16, 1),
    "tokens": lambda: nn.Linear(12, 12),
}


class Body(nn.Module):
    """A layer of its own input, called several times."""

    def __init__(self, layer: nn.Module, calls: int) -> None:
        super().__init__()
        self.first, self.layer, self.calls = nn.Conv2d(16, 16, 1), layer, calls
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.calls):
            x = self.layer(x)
        return self.head(x.mean((2, 3)))


def inputs(experience: int) -> Tensor:
    generator = torch.Generator().manual_seed(experience)
    return torch.randn(8, 3, generator=generator) @ torch.randn(3, 16 * 144, generator=generator)


def begun(layer: Callable[[], nn.Module], calls: int = 1) -> tuple[Body, ContinualSession]:
    """In the second experience of two that have columns of their own."""
    torch.manual_seed(0)
    net = Body(layer(), calls)
    session = ContinualSession(LanceConfig(rank=None, bits=None), ContinualConfig(heads=["head"], threshold=0.7))
    for experience in (0, 1):
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        passes = [lambda e=experience: net(inputs(e).view(8, *SHAPE))]
        session.begin_experience(net, passes, [optimizer], own=str(experience))
        if experience == 0:
            session.end_experience(net, passes)
    assert set(reserved_layers(net)) == {"first", "layer"}
    assert all(layer.reservation.form.steady for layer in reserved_layers(net).values())
    return net, session


def kept(net: nn.Module, autocast: bool = False) -> int:
    x = inputs(1).view(8, *SHAPE)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return net(x)  # type: ignore[no-any-return]

    return measure_saved_bytes(run, net).total


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_no_more_is_kept_than_by_stock_layers(name: str, calls: int) -> None:
    net, session = begun(LAYERS[name], calls)
    ours = kept(net)
    assert ours <= kept(Body(LAYERS[name](), calls))
    if name in ("reflect", "replicate", "circular", "same, even"):
        zeros, _ = begun(LAYERS["zeros"], calls)
        assert ours == kept(zeros)  # not what is padded
    session.abandon()


@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast_more_calls_keep_no_copies_of_the_weight(name: str) -> None:
    ours = [kept(begun(LAYERS[name], calls)[0], autocast=True) for calls in (1, 3)]
    plain = [kept(Body(LAYERS[name](), calls), autocast=True) for calls in (1, 3)]
    assert ours[1] - ours[0] <= plain[1] - plain[0]
