"""rank="compact" leaves layers alone whose projection would make little of what is kept smaller."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance import LanceConfig, LanceSession
from lightning_lance.compression.truncation import KEPT_ANYWAY
from tests.swapped import COMPACT_MODES

BATCH, OBSERVED = 12, 2
SHARE = re.compile(r"^the inputs that it could make smaller are \d+% of what is kept$")

pytestmark = pytest.mark.usefixtures("one_thread")


def block(frozen: bool) -> nn.Sequential:
    """Convolutions, each with a norm and an activation behind it; frozen norms in eval mode keep nothing."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(3):
        norm = nn.BatchNorm2d(16)
        layers += [nn.Conv2d(16 if index else 3, 16, 3, padding=1), norm, nn.ReLU()]
        if frozen:
            norm.requires_grad_(False).eval()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def mixed() -> nn.Sequential:
    """A norm whose output a convolution reads, and wide convolutions without norms, whose inputs are most of it all."""
    torch.manual_seed(0)
    wide = [layer for _ in range(8) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), *wide)


def halves() -> nn.Sequential:
    """Convolutions behind norms, and as many that are not."""
    return nn.Sequential(*block(frozen=False)[:9], *mixed()[3:9])


def batches(count: int) -> list[Tensor]:
    return [torch.randn(BATCH, 3, 12, 12, generator=torch.Generator().manual_seed(index)) for index in range(count)]


def session_of(net: nn.Module, **options: Any) -> LanceSession:
    usual = {"rank": "compact", "bits": 4, "calibration_batches": OBSERVED}
    session = LanceSession(net, LanceConfig(**{**usual, **options}))
    session.start()
    return session


def train(session: LanceSession, inputs: list[Tensor]) -> list[Tensor]:
    found = []
    for x in inputs:
        session.model.zero_grad()
        with session.step():
            loss = session.model(x).square().mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in session.model.parameters() if p.grad is not None]))
        with torch.no_grad():
            for parameter in session.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    return found


def kept(session: LanceSession) -> int:
    assert session.report is not None
    assert session.report.compressed is not None
    return session.report.compressed.total


def test_in_training_mode_nothing_is_projected_and_what_is_kept_is_that_of_rounding() -> None:
    found = {}
    for rank in ("compact", None, COMPACT_MODES):
        session = session_of(block(frozen=False), rank=rank)
        gradients = train(session, batches(OBSERVED + 3))
        found[str(rank)] = session, gradients
    spared, rounded, asked = (found[str(rank)][0] for rank in ("compact", None, COMPACT_MODES))
    assert not spared.layers
    assert {item.name for item in spared.left} == {"0", "3", "6", "11"}
    assert all(item.reason == KEPT_ANYWAY or SHARE.match(item.reason) for item in spared.left)
    assert kept(spared) == kept(rounded) < kept(asked)  # what is asked for mode by mode is done, and keeps more
    assert set(asked.layers) == {"0", "3", "6", "11"}
    # From the second step on nothing waits for a subspace, and the bits are those of the options.
    assert not torch.equal(found["compact"][1][0], found["None"][1][0])
    for ours, theirs in zip(found["compact"][1][1:], found["None"][1][1:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.2


def test_where_norms_keep_nothing_all_are_projected() -> None:
    session = session_of(block(frozen=True))
    train(session, batches(OBSERVED + 1))
    assert set(session.layers) == {"0", "3", "6", "11"}
    assert session.calibrated
    whole = session_of(block(frozen=True), rank=None)
    train(whole, batches(OBSERVED + 1))
    assert kept(session) < kept(whole) / 2


def test_an_input_that_is_computed_from_what_is_kept_is_left_alone() -> None:
    session = session_of(mixed())
    train(session, batches(OBSERVED + 1))
    assert {item.name: item.reason for item in session.left} == {"2": KEPT_ANYWAY}
    assert set(session.layers) == {"0", *map(str, range(4, 20, 2))}
    asked = session_of(mixed(), rank=COMPACT_MODES)
    train(asked, batches(OBSERVED + 1))
    assert "2" in asked.layers
    assert kept(session) < kept(asked)


def test_tokens_are_inputs_with_a_mode_to_truncate_and_rows_are_not() -> None:
    """Autograd saves the input of a linear layer as rows, whatever its shape."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU())]
    for shape, projected in (((BATCH, 24, 32), True), ((24 * BATCH, 32), False)):
        session = session_of(nn.Sequential(*layers))
        for step in range(OBSERVED + 1):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            with session.step():
                loss = session.model(x).mean()
            loss.backward()
        assert bool(session.layers) == projected
        session.stop()


@pytest.mark.parametrize("make", [mixed, lambda: block(frozen=False)])
def test_batches_that_are_handed_over_decide_likewise(make: Any) -> None:
    seen, given = session_of(make()), session_of(make())
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    train(seen, batches(OBSERVED + 1))
    given.calibrate([lambda x=x: given.model(x) for x in batches(OBSERVED)])
    assert seen.layers.keys() == given.layers.keys()
    assert {item.name for item in seen.left} == {item.name for item in given.left}
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"layers": ["6", "12"]}, {"layers": 5}, {"rank": {"6": "compact", "12": "compact"}}], ids=str
)
def test_of_layers_that_are_named_those_alone_that_would_save_nothing_are_left(options: dict[str, Any]) -> None:
    session = session_of(halves(), **options)
    train(session, batches(OBSERVED + 1))
    assert "12" in session.layers
    assert [item.reason for item in session.left if item.name == "6"] == [KEPT_ANYWAY]


def test_a_budget_projects_whatever_it_takes() -> None:
    """Where inputs are less than the share that would be worth it by itself, too."""
    free = session_of(halves())
    train(free, batches(OBSERVED + 1))
    assert not free.layers
    session = session_of(halves(), memory_budget=int(0.9 * kept(free)))
    train(session, batches(OBSERVED + 2))
    assert session.layers
    assert kept(session) <= 0.9 * kept(free)


@pytest.mark.parametrize("stop", [1, OBSERVED, OBSERVED + 2])
def test_resume_is_bit_equal(stop: int) -> None:
    inputs = batches(OBSERVED + 5)
    straight = session_of(mixed())
    expected = train(straight, inputs)
    first = session_of(mixed())
    train(first, inputs[:stop])
    file = io.BytesIO()
    torch.save((first.state_dict(), first.model.state_dict()), file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    second = session_of(mixed())
    second.load_state_dict(state)
    second.model.load_state_dict(values)
    found = train(second, inputs[stop:])
    assert all(map(torch.equal, found, expected[stop:]))
    assert second.layers.keys() == straight.layers.keys()
    assert [item.name for item in second.left] == [item.name for item in straight.left]
