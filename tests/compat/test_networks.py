"""Every network of the table, in the default setup."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_lance import LanceSession, measure_saved_bytes
from tests.compat.networks import NETWORKS
from tests.compat.rows import Task, check_row, data, write

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]

ROWS = [pytest.param(name, marks=[pytest.mark.slow] if case.slow else []) for name, case in NETWORKS.items()]


@pytest.mark.parametrize("name", ROWS)
def test_network(name: str) -> None:
    """Two epochs of three steps; and never more bytes than plain at a batch of 2 either."""
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    case = NETWORKS[name]
    net = case.build()
    report = check_row(Task(net), data(case))
    left = {item.name for item in report.left}
    for part in case.left:
        assert any(item == f"net.{part}" or (part == "the model itself" and item == "net") for item in left), left
    net.train()
    session, x = LanceSession(net), case.input(2)

    def run() -> torch.Tensor:
        with session.functional():
            return F.cross_entropy(net(x), torch.zeros(2, dtype=torch.int64))

    plain = measure_saved_bytes(lambda: F.cross_entropy(net(x), torch.zeros(2, dtype=torch.int64)), net).total
    session.start()
    session.calibrate([run])
    session.drop_redundant(run)
    small = measure_saved_bytes(run, net).total
    session.stop()
    assert small <= plain
    write("network", name, report, input="x".join(map(str, case.shape)), plain_2=plain, compressed_2=small)
