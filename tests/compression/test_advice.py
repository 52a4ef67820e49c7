"""Advice: each change that a report names is made, and what it saves is measured; what does not apply is not named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lance import LanceConfig, LanceSession, Report
from lightning_lance.tensors.units import parse_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 24


def network(frozen: bool = False, norms: bool = True) -> nn.Sequential:
    norm = (lambda: nn.BatchNorm2d(16)) if norms else nn.Identity
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), norm(), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    for module in net if frozen else ():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return net


def report_of(net: nn.Module, batch: int = BATCH, **options: Any) -> Report:
    torch.manual_seed(0)
    session = LanceSession(net, LanceConfig(calibration_batches=1, **options))
    session.start()
    x = nn.functional.interpolate(torch.randn(batch, 3, 4, 4), size=24, mode="bilinear")
    for _ in range(2):
        with session.step():
            loss = net(x).square().mean()
        loss.backward()
    session.stop()
    assert session.report is not None
    return session.report


def promised(report: Report) -> dict[str, int]:
    """Change -> bytes that it saves, as a report says."""
    found = {}
    for line in report.notes[1:]:
        size, _, text = line.strip().partition(" less: ")
        found[text] = parse_bytes(size.replace(" ", ""))
    assert found == dict(sorted(found.items(), key=lambda item: -item[1]))
    return found


def one(found: dict[str, int], start: str) -> int:
    [saved] = [size for text, size in found.items() if text.startswith(start)]
    return saved


def kept(report: Report) -> int:
    assert report.compressed is not None
    return report.compressed.total


@pytest.mark.parametrize(
    ("before", "after", "start"),
    [({}, {"bits": 2}, "bits=2,"), ({"bits": 8}, {"bits": 4}, "bits=4,"), ({"bits": None}, {}, "bits='auto'")],
)
def test_fewer_bits(before: dict[str, Any], after: dict[str, Any], start: str) -> None:
    # With norms, inputs of convolutions are computed again from theirs, and 2 bits gain nothing.
    norms = after.get("bits") != 2
    report = report_of(network(norms=norms), **before)
    saved = kept(report) - kept(report_of(network(norms=norms), **after))
    assert one(promised(report), start) == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("bits", ["auto", None])
def test_half_the_batch(bits: Any) -> None:
    report = report_of(network(), bits=bits)
    saved = kept(report) - kept(report_of(network(), BATCH // 2, bits=bits))
    assert one(promised(report), "half the batch, accumulate_grad_batches=2 (batch norms see half)") == pytest.approx(
        saved, rel=0.05
    )


def test_norms_with_frozen_weights() -> None:
    """A norm before a sigmoid: what it keeps serves nobody else."""
    nets = [nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16).requires_grad_(False), nn.Sigmoid()) for _ in "ab"]
    report = report_of(nets[0])
    saved = kept(report) - kept(report_of(nets[1], freeze_norms=True))
    assert one(promised(report), "freeze_norms=True, 1 batch norm with") == pytest.approx(saved, rel=0.05)


def test_compact_in_fine_tuning() -> None:
    nets = [network(norms=False) for _ in range(2)]
    for net in nets:
        net[0].requires_grad_(False)
    report = report_of(nets[0])
    saved = kept(report) - kept(report_of(nets[1], rank="compact"))
    # Spatial modes, which may be truncated too, are not in the promise.
    assert 0.5 * saved < one(promised(report), 'rank="compact"') <= saved


@pytest.mark.parametrize(
    ("net", "options", "never"),
    [
        (network(), {}, "freeze_norms|compact"),
        (network(frozen=True), {"freeze_norms": True}, "freeze_norms|batch norms see"),
        (network(norms=False), {"bits": 2}, "bits|norm"),
        (network(frozen=True), {"rank": "compact"}, "compact"),
        (network(), {"batch": 1}, "half"),
    ],
)
def test_what_does_not_apply_is_not_named(net: nn.Module, options: dict[str, Any], never: str) -> None:
    batch = options.pop("batch", BATCH)
    report = report_of(net, batch, **options)
    assert not re.search(never, "\n".join(report.notes))
    assert len(report.notes) <= 3


def test_lines_fit_a_terminal() -> None:
    for net, options in ((network(), {}), (network(frozen=True), {}), (network(), {"bits": None})):
        report = report_of(net, **options)
        assert report.notes[0] == "to keep less:"
        assert max(map(len, report.notes)) <= 80, report.notes
        assert report.render().endswith("\n".join(report.notes))
