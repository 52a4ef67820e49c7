"""Long runs take no more memory the longer they are."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lance import LanceConfig, LanceSession
from tests.trainers import Classifier, fit, lance, seeded, small_net

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning_lance.errors.LanceWarning"),
]

ALLOWED = 24 << 20
"""Bytes that the process may grow by: what the allocator keeps."""


def live() -> tuple[int, int]:
    """Tensors that are reachable, and bytes of the process; 0 where the system does not say."""
    gc.collect()
    tensors = sum(1 for found in gc.get_objects() if issubclass(type(found), torch.Tensor))
    status = Path("/proc/self/statm")
    return tensors, int(status.read_text().split()[1]) * 4096 if status.is_file() else 0


@pytest.mark.parametrize("steps", [pytest.param(80, id="short"), pytest.param(1000, id="long", marks=pytest.mark.soak)])
def test_ragged_steps(steps: int) -> None:
    """Batches of every size and images of three, an empty batch now and then."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    session = LanceSession(net, LanceConfig(bits=4))
    session.start()
    sizes = (6, 8, 12)
    session.calibrate([lambda n=n: net(torch.randn(16, 3, n, n)) for n in sizes])
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    before = (0, 0)
    for step in range(steps):
        batch = 0 if step % 50 == 49 else 1 + (7 * step) % 40
        size = sizes[step % len(sizes)]
        optimizer.zero_grad()
        with session.step():
            loss = net(torch.randn(batch, 3, size, size)).square().sum()
        loss.backward()
        optimizer.step()
        del loss
        if step == min(steps // 2, 200):
            before = live()
    after = live()
    session.stop()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + ALLOWED
    assert all(parameter.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("fits", [pytest.param(6, id="short"), pytest.param(200, id="long", marks=pytest.mark.soak)])
def test_fits(fits: int) -> None:
    """One model, a new callback and Trainer each time."""
    module = seeded(lambda: Classifier(small_net()))
    before = (0, 0)
    for number in range(fits):
        fit(module, [lance()], max_epochs=1)
        if number == min(fits // 2, 20):
            before = live()
    after = live()
    assert after[0] <= before[0] + 5
    assert after[1] <= before[1] + ALLOWED
