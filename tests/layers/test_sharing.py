"""Layers that read one input keep one core of it."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance import LanceConfig, LanceSession, measure_saved_bytes
from lightning_lance.layers.sharing import SharedCores
from tests.oracles import parameter_gradients
from tests.swapped import COMPACT_MODES

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, TOKENS, WIDTH = 16, 12, 24


class Attention(nn.Module):
    """Separate projections of one input, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Branches(nn.Module):
    """A residual block whose shortcut reads the input of its first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.second(self.first(x).relu()) + self.shortcut(x)


def session_of(net: nn.Module, x: Tensor, **options: Any) -> LanceSession:
    session = LanceSession(net, LanceConfig(**{"rank": COMPACT_MODES, "bits": None, **options}))
    session.start()
    session.calibrate([lambda: net(x)])
    return session


def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


def images() -> Tensor:
    return torch.randn(BATCH, 3, 8, 8)


def test_one_core_for_three_projections() -> None:
    net, x = Attention(), tokens()
    session = session_of(net, x)
    subspace = net.q._lance.subspace
    assert subspace is net.k._lance.subspace
    assert subspace is net.v._lance.subspace
    assert net.out._lance.subspace is not subspace
    shared = measure_saved_bytes(lambda: net(x), net)
    for layer in (net.q, net.k, net.v):
        layer._lance.shared = None
    apart = measure_saved_bytes(lambda: net(x), net)
    core = torch.Size(subspace.core_shape(BATCH, WIDTH, (TOKENS,))).numel()
    assert apart.total - shared.total == 2 * (4 * core + 4 * BATCH)  # cores and sample orders
    session.stop()


@pytest.mark.parametrize("batch", ["unbiased", "projected"])
def test_gradients_are_those_of_one_sample_order(batch: Any) -> None:
    """Each layer's gradient is what it would compute alone in the order that the first of them drew."""
    net, x = Attention().double(), tokens().double()
    session_of(net, x, rank={"batch": 4, "channel": 7, "spatial": 5}, batch=batch)
    order = net.q._lance.order.state
    drawn = order.clone()
    shared = parameter_gradients(net, x)
    for layer in (net.q, net.k, net.v):
        layer._lance.shared = None
    for name in "qkv":
        order.copy_(drawn)
        for other in "qkv":
            getattr(net, other).weight.requires_grad_(other == name)  # only this one draws
        alone = parameter_gradients(net, x)
        torch.testing.assert_close(shared[f"{name}.weight"], alone[f"{name}.weight"], rtol=1e-12, atol=1e-12)


def test_convolutions_that_read_one_input_share_it() -> None:
    net, x = Branches(), images()
    session_of(net, x)
    assert net.first._lance.subspace is net.shortcut._lance.subspace
    held = measure_saved_bytes(lambda: net(x), net)
    subspace = net.first._lance.subspace
    shape = subspace.core_shape(BATCH, 8, (8, 8))
    assert [holder.module for holder in held.holders if holder.shape == shape].count("shortcut") == 0
    assert [holder.module for holder in held.holders if holder.shape == shape].count("first") == 1
    assert held.by_module().get("shortcut", 0) == 0


def test_an_input_that_changed_in_place_gets_its_own_core() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor, write: bool = True) -> Tensor:
            first = self.a(x)
            if write:
                x.mul_(3.0)
            return first + self.b(x)

    net, x = Writes().double(), torch.randn(BATCH, WIDTH).double()
    with torch.no_grad():
        session = LanceSession(net, LanceConfig(rank={"batch": 4}, bits=None))
        session.start()
        session.calibrate([lambda: net(x.clone(), False)])
    assert net.a._lance.shared is not None
    order = net.a._lance.order.state
    drawn = order.clone()
    found = parameter_gradients(net, x.clone())
    order.copy_(drawn)
    net.a._lance.shared = net.b._lance.shared = None
    expected = parameter_gradients(net, x.clone())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-12)


def test_nothing_is_kept_alive() -> None:
    net, x = Attention(), tokens()
    session_of(net, x)
    seen: list[Any] = []
    handle = net.q.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    loss = net(x).sum()
    handle.remove()
    assert seen[0]() is None
    assert net.q._lance.shared._seen == {}
    loss.backward()


def test_an_interloper_does_not_evict() -> None:
    """Layers in between with subspaces of their own leave the core of the first input in place."""

    class Deep(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.between = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.second(self.between(self.first(x))) + self.shortcut(x)

    net, x = Deep(), images()
    session_of(net, x, rank={"batch": 4})  # no factors: every subspace is equal
    assert measure_saved_bytes(lambda: net(x), net).by_module().get("shortcut", 0) == 0


def test_a_new_tensor_in_the_same_place_is_not_mistaken_for_the_old_one() -> None:
    cores, subspace, other = SharedCores(), object(), object()
    one = torch.randn(4, 4)
    cores.remember(one, subspace, 1, "factors", "core")  # type: ignore[arg-type]
    assert cores.recall(one, subspace, 1) == ("factors", "core")  # type: ignore[arg-type]
    assert cores.recall(one, subspace, -1) is None  # type: ignore[arg-type]
    assert cores.recall(one, other, 1) is None  # type: ignore[arg-type]
    assert cores.recall(one.view(4, 4), subspace, 1) is None  # type: ignore[arg-type]
    cores.remember(one, other, 1, "other factors", "another")  # type: ignore[arg-type]
    assert cores.recall(one, other, 1) == ("other factors", "another")  # type: ignore[arg-type]
    one.add_(1)
    assert cores.recall(one, subspace, 1) is None  # type: ignore[arg-type]
    cores.remember(one, subspace, 1, "factors", "new")  # type: ignore[arg-type]
    assert cores.recall(one, other, 1) is None  # type: ignore[arg-type]
    assert cores.recall(one, subspace, 1) == ("factors", "new")  # type: ignore[arg-type]
    del one
    assert cores._seen == {}


def test_copies_and_pickles_of_a_model_in_training_are_stock_models() -> None:
    net, x = Attention(), tokens()
    session_of(net, x)
    net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other.q) is nn.Linear
        assert not hasattr(other.q, "_lance")
        assert other.state_dict().keys() == net.state_dict().keys()
        assert torch.equal(other(x), net(x))


def test_sharing_survives_a_state() -> None:
    net, x = Attention(), tokens()
    session = session_of(net, x)
    state = session.state_dict()
    one = parameter_gradients(net, x)
    other = copy.deepcopy(net)
    continued = LanceSession(other, LanceConfig(rank=COMPACT_MODES, bits=None))
    continued.start()
    continued.load_state_dict(state)
    assert other.q._lance.subspace is other.k._lance.subspace
    two = parameter_gradients(other, x)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_report_counts_a_shared_core_once(bits: int | None) -> None:
    net, x = Attention(), tokens()
    session = session_of(net, x, bits=bits)
    with session.step():
        output = net(x)
    del output
    assert session.report is not None
    measured = {layer.name: layer.measured_bytes for layer in session.report.layers}
    assert measured["q"]
    assert (measured["k"], measured["v"]) == (0, 0)
    session.stop()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("make", [Attention, Branches])
def test_a_step_never_keeps_more_bytes_than_plain_training(make: type[nn.Module], batch_size: int) -> None:
    net = make()
    x = tokens()[:batch_size] if make is Attention else images()[:batch_size]
    session = session_of(net, x, bits="auto")
    with session.step():
        output = net(x)
    del output
    report = session.report
    assert report is not None
    assert report.plain is not None
    assert report.compressed is not None
    assert 0 < report.compressed.total <= report.plain.total
    session.stop()


def test_a_core_that_would_not_be_smaller_is_not_made() -> None:
    net, x = nn.Conv1d(1, 4, 3), torch.randn(1, 1, 64)  # a spatial factor twice as large as the input
    session = session_of(net, x, rank={"spatial": 2})
    assert not net._lance.subspace.shrinks(1, 1, (64,))
    assert measure_saved_bytes(lambda: net(x), net).total == x.nbytes
    plain = copy.deepcopy(net)
    one, two = parameter_gradients(net, x), parameter_gradients(plain, x)
    assert all(torch.equal(one[name], two[name]) for name in one)
    session.stop()
