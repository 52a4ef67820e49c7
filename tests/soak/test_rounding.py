"""What rounding leaves inside of protected directions, where nothing is stored for what a weight is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance import LanceConfig
from lightning_lance.continual import ContinualConfig, ContinualSession
from lightning_lance.tensors.linalg import orthonormalize

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize(
    "steps", [pytest.param(200, id="short"), pytest.param(10000, id="long", marks=pytest.mark.soak)]
)
def test_single_precision(kind: str, steps: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    options = ContinualConfig(heads=["4"], threshold=0.9, columns=0.0, warn_above=1.0)
    session = ContinualSession(LanceConfig(rank=None, bits=None), options)
    mixing = [torch.randn(20, 128) / 4 for _ in range(2)]

    def batch(experience: int) -> tuple[Tensor, Tensor]:
        latent = torch.randn(32, 20)
        return latent @ mixing[experience], (latent[:, 0] > 0).long() + (latent[:, 1] > 0).long()

    before: dict[str, Tensor] = {}
    bases: dict[str, Tensor] = {}
    for experience, count in ((0, 100), (1, steps)):
        optimizer = OPTIMIZERS[kind](net.parameters())
        x, _ = batch(experience)
        session.begin_experience(net, [lambda x=x: net(x)], [optimizer], own=str(experience))
        if experience == 1:
            before = {name: net.get_submodule(name).weight.detach().double() for name in session.memories}
            bases = {name: orthonormalize(memory.protected[0].double()) for name, memory in session.memories.items()}
        for _ in range(count):
            x, y = batch(experience)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        session.end_experience(net, [lambda x=x: net(x)])
    for name, old in before.items():
        change = net.get_submodule(name).weight.detach().double() - old
        inside = float((change @ bases[name]).norm() / old.norm())
        print(f"{kind}, {steps} steps, layer {name}: {inside:.1e} of the weight inside of what is protected")  # noqa: T201
        assert float(change.norm()) > 0.05 * float(old.norm())
        assert inside < (2e-6 if steps < 1000 else 2e-5)
