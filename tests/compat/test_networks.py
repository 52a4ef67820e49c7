"""Every network of the table, in the default setup."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_lance import measure_saved_bytes
from lightning_lance.compression.isolation import isolated
from tests.compat.networks import CLASSES, NETWORKS
from tests.compat.rows import BATCH, Task, check_row, cosines, data, lance, step_of, write

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]

ROWS = [pytest.param(name, marks=[pytest.mark.slow] if case.slow else []) for name, case in NETWORKS.items()]

LESS = 6
"""So many times less is kept by default than by plain training, at least."""


@pytest.mark.parametrize("name", ROWS)
def test_network(name: str) -> None:
    """Two epochs of three steps; close gradients; and never more bytes than plain at a batch of 2 either."""
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    case = NETWORKS[name]
    net = case.build()
    batch = case.input(BATCH), torch.arange(BATCH) % CLASSES
    found = cosines(net, batch)
    report = check_row(Task(net), data(case), callback=lance())
    assert report.ratio is not None
    assert (report.ratio >= LESS) == (not case.less), report.ratio
    assert found["cosine_auto"] >= min(case.cosine, found["cosine_bf16"])
    two = case.input(2), torch.zeros(2, dtype=torch.int64)
    small = step_of(net, two, "auto")[1]
    with isolated(net):
        plain = measure_saved_bytes(lambda: F.cross_entropy(net.train()(two[0]), two[1]), net)
    assert small.plain is not None
    assert small.compressed is not None
    assert small.compressed.total <= small.plain.total
    # What is computed from weights alone stays as it is, and is in neither of the two.
    derived = plain.total - small.plain.total
    assert 0 < derived < 4 * sum(p.numel() for p in net.parameters()) if case.computes_weights else derived == 0
    sizes = {"plain_2": small.plain.total, "compressed_2": small.compressed.total}
    write("network", name, report, case.less, input="x".join(map(str, case.shape)), **sizes, **found)
