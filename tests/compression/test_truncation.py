"""rank="auto": truncates inputs that are most of what a step keeps, where that costs neither learning nor time."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance import LanceConfig, LanceSession
from lightning_lance.compression.surgery import is_swapped
from lightning_lance.compression.truncation import WATCH
from lightning_lance.subspaces.ranks import SAFE
from tests.oracles import relative_error

BATCH, SIDE = 8, 8
OBSERVED = 3


def network(norm: bool = False, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    norms: list[nn.Module] = [nn.BatchNorm2d(width)] if norm else []
    classifier = nn.Linear(width, 3)
    classifier.bias.requires_grad_(False)  # fine-tuning
    return nn.Sequential(
        nn.Conv2d(4, width, 1), *norms, nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier,
    )  # fmt: skip


def smooth(step: int, noise: float = 0.02) -> Tensor:
    """Maps that are nearly constant: one direction holds most of their energy."""
    generator = torch.Generator().manual_seed(step)
    level = torch.randn(BATCH, 4, 1, 1, generator=generator)
    return level + noise * torch.randn(BATCH, 4, SIDE, SIDE, generator=generator)


def rough(step: int) -> Tensor:
    return torch.randn(BATCH, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(step))


def session_of(model: nn.Module, **options: Any) -> LanceSession:
    session = LanceSession(model, LanceConfig(**{"bits": 4, "calibration_batches": OBSERVED, **options}))
    session.start()
    return session


def train(
    model: nn.Module, session: LanceSession, inputs: Callable[[int], Tensor], steps: range, rate: float = 0.01
) -> list[Tensor]:
    """Gradients of all parameters, step by step."""
    found = []
    for step in steps:
        x = inputs(step)
        model.zero_grad()
        with session.step():
            loss = model(x).square().mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return found


def test_smooth_maps_are_truncated_and_gradients_stay() -> None:
    model, twin = network(), network()
    ours, whole = session_of(model, bits=None), session_of(twin, bits=None, rank=None)
    found, plain = (train(net, s, smooth, range(8)) for net, s in ((model, ours), (twin, whole)))
    assert set(ours.layers) == {"0", "2"}
    for layer in ours.layers.values():
        subspace = layer._lance.subspace
        assert subspace is not None
        assert subspace.batch.rank == "full"
        assert subspace.channel is None
        assert subspace.core_shape(BATCH, 32, (SIDE, SIDE))[2:] == (1, 1)
    for one, other in zip(found[: 1 + OBSERVED], plain, strict=False):
        assert torch.equal(one, other)  # nothing is truncated before
    for one, other in zip(found[1 + OBSERVED :], plain[1 + OBSERVED :], strict=True):
        assert relative_error(one, other) < 0.02
    assert ours.report is not None
    assert whole.report is not None
    assert ours.report.compressed is not None
    assert whole.report.compressed is not None
    assert 4 * ours.report.compressed.total < whole.report.compressed.total
    ours.stop()
    assert not is_swapped(model)


@pytest.mark.parametrize(
    ("case", "model", "inputs"),
    [
        ("no few directions hold the energy", network, rough),
        ("a norm keeps as much", lambda: network(norm=True), smooth),
        ("all is trained", lambda: network().requires_grad_(True), smooth),
        ("nothing has positions", lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * SIDE**2, 3)), smooth),
    ],
)
def test_nothing_is_truncated_where(case: str, model: Any, inputs: Any) -> None:
    torch.manual_seed(0)
    net = model()
    twin = copy.deepcopy(net)
    ours, whole = session_of(net), session_of(twin, rank=None)
    found, plain = (train(each, s, inputs, range(8)) for each, s in ((net, ours), (twin, whole)))
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True)), case
    assert not is_swapped(net), case


def test_an_input_that_another_layer_keeps_is_left_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(4, 32, 1), nn.Conv2d(4, 32, 3)
            self.alone = nn.Conv2d(32, 32, 1)
            self.one.bias.requires_grad_(False)  # fine-tuning

        def forward(self, x: Tensor) -> Tensor:
            return self.alone(self.one(x)).mean((2, 3)) + self.other(x).mean((2, 3))

    torch.manual_seed(0)
    model = Two()
    session = session_of(model)
    train(model, session, smooth, range(8))
    assert set(session.layers) == {"alone"}


def test_options_of_layers_hold() -> None:
    session = session_of(model := network(), layers=["2"])
    train(model, session, smooth, range(8))
    assert set(session.layers) == {"2"}
    session = session_of(model := network(), rank={"0": "auto", "*": None})
    train(model, session, smooth, range(8))
    assert not session.layers  # the other input, whole, is most of what is kept
    session = session_of(model := network(), rank={"0": {"batch": 4}, "*": "auto"})
    train(model, session, smooth, range(12))
    assert session.layers["0"]._lance.ranks.batch == 4


def test_a_layer_that_drifts_is_looked_at_again(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(model := network(), bits=None)
    train(model, session, smooth, range(WATCH))
    assert set(session.layers) == {"0", "2"}
    before = session.layers["2"]._lance.subspace
    twin = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "lightning_lance"):
        train(model, session, rough, range(WATCH, WATCH + 1), rate=0.0)
    assert [record.message.count("0 (0.") for record in caplog.records] == [1]
    x = rough(WATCH + 1)
    (found,) = train(model, session, lambda _: x, range(1), rate=0.0)
    twin(x).square().mean().backward()
    exact = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    assert relative_error(found, exact) < 1e-5  # whole again at once
    train(model, session, rough, range(OBSERVED + 2))
    assert not session.layers  # and rough maps have no subspace

    session = session_of(model := network(), bits=None)
    train(model, session, smooth, range(WATCH))

    def tilted(step: int) -> Tensor:
        return smooth(step) * torch.linspace(-1, 1, SIDE)

    train(model, session, tilted, range(WATCH + OBSERVED + 3), rate=0.0)
    after = session.layers["0"]._lance.subspace
    assert after is not None
    assert before is not None
    assert after.core_shape(BATCH, 4, (SIDE, SIDE))[2:] == (1, 1)
    direction = torch.linspace(-1, 1, SIDE)
    factor = after.spatial[SIDE, SIDE][1]
    assert factor is not None
    assert torch.dot(factor[:, 0], direction / direction.norm()).abs() > 0.99


def test_what_stays_is_not_looked_at_again() -> None:
    session = session_of(model := network())
    train(model, session, smooth, range(2 * WATCH + 2))
    kept = [layer._lance.subspace for layer in session.layers.values()]
    assert len(kept) == 2
    train(model, session, smooth, range(WATCH + 2))
    assert all(a is layer._lance.subspace for a, layer in zip(kept, session.layers.values(), strict=True))


@pytest.mark.parametrize("stop", [0, 1, 2, OBSERVED, OBSERVED + 1, 8, WATCH, WATCH + 1, WATCH + 3, WATCH + 8])
def test_resume_is_bit_equal(stop: int) -> None:
    def inputs(step: int) -> Tensor:
        return smooth(step) if step < WATCH else smooth(step) * torch.linspace(-1, 1, SIDE)

    steps = WATCH + 12
    whole = session_of(model := network())
    expected = train(model, whole, inputs, range(steps))
    first = session_of(model := network())
    train(model, first, inputs, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "lance": first.state_dict()}, file)
    first.stop()
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(stored["model"])
    session = session_of(resumed)
    session.load_state_dict(stored["lance"])
    found = train(resumed, session, inputs, range(stop, steps))
    assert all(torch.equal(a, b) for a, b in zip(expected[stop:], found, strict=True))
    assert set(session.layers) == {"0", "2"}


def test_second_derivatives_and_transforms_are_served() -> None:
    session = session_of(model := network())
    for step in range(10):
        x = smooth(step).requires_grad_()
        with session.step():
            out = model(x).square().mean()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        slope.square().sum().backward()
    assert not session.layers

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    def by_jvp(x: Tensor) -> Tensor:
        return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1].mean()

    def by_vmap(x: Tensor) -> Tensor:
        return torch.func.vmap(model)(x[:, None]).mean()

    def by_grad(x: Tensor) -> Tensor:
        torch.func.grad(loss)({n: p.detach() for n, p in names.items()}, x)
        return model(x).mean()

    for run in (by_jvp, by_vmap, by_grad):
        session = session_of(model := network())
        names = dict(model.named_parameters())
        for step in range(10):
            with session.step(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = run(smooth(step)) + model(smooth(step)).mean()
            value.backward()
        assert not session.layers


def test_first_steps_may_be_unusable() -> None:
    session = session_of(model := network())
    train(model, session, lambda step: torch.full((BATCH, 4, SIDE, SIDE), float("nan")), range(6), rate=0.0)
    assert not session.layers
    session = session_of(model := network())
    train(model, session, lambda step: torch.zeros(BATCH, 4, SIDE, SIDE), range(6), rate=0.0)
    assert "0" not in session.layers


def test_layers_that_are_unfrozen_later_are_looked_at() -> None:
    model = network()
    for index in (0, 2):
        model[index].requires_grad_(False)
    session = session_of(model)
    train(model, session, smooth, range(8))
    assert not session.layers
    for index in (0, 2):
        model[index].requires_grad_(True)
    train(model, session, smooth, range(8))
    assert set(session.layers) == {"0", "2"}


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=3),
    st.floats(0.1, 4096),
    st.floats(0.01, 16),
    st.booleans(),
)
def test_what_pays_leaves_a_quarter_and_takes_no_longer(
    modes: list[tuple[int, int]], work: float, outputs: float, pointwise: bool
) -> None:
    sizes, ranks = [size for size, _ in modes], [min(rank, size) for size, rank in modes]
    elements, kept, projecting = 1, 1, 0.0
    for size in sizes:
        elements *= size
    left = list(sizes)
    for axis, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        count = 1
        for length in left:
            count *= length
        projecting += rank * count if rank < size else 0
        left[axis] = rank
    for rank in ranks:
        kept *= rank
    if SAFE.pays(sizes, ranks, work, outputs, pointwise):
        assert 4 * kept <= elements
        saved = (elements - kept) * (SAFE.rounding + work * pointwise)
        assert projecting * (1 + (outputs if pointwise else 1)) <= saved * (1 + 1e-9)
    elif 4 * kept <= elements:
        assert projecting * (1 + (outputs if pointwise else 1)) > (elements - kept) * SAFE.rounding * (1 - 1e-9)


def test_the_least_energy_while_training_is_below_that_of_the_choice() -> None:
    for modes in (1, 2, 3):
        assert 0.7 < SAFE.least(modes) < SAFE.energy**modes < 1
