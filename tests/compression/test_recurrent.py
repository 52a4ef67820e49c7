"""LSTMs: of each layer the input is kept, and gates and states are those that the kernel makes of it again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceConfig, LanceSession, measure_saved_bytes
from lightning_lance.compression import again
from lightning_lance.compression.store import Bits
from tests.stock import EXACT, assert_same, kept, make_store, run, same_bits

FOUR, EIGHT = Bits(4, 4), Bits(8, 8)


class Outputs(nn.Module):
    """An LSTM, and a layer behind its outputs."""

    def __init__(self, size: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(size, hidden, **options)
        self.head = nn.Linear(hidden * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 12),
    batch=st.integers(1, 24),
    size=st.integers(2, 40),
    hidden=st.integers(8, 40),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    bits=st.sampled_from([FOUR, EIGHT, Bits(2, 4)]),
)
def test_gradients_are_those_of_the_rounded_input(
    length: int, batch: int, size: int, hidden: int, bidirectional: bool, batch_first: bool, bias: bool, bits: Bits
) -> None:
    """An oracle: the same layer, trained plainly on what was kept. All of it runs the same kernels."""
    torch.manual_seed(length)
    layer = nn.LSTM(size, hidden, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    shape = (batch, length, size) if batch_first else (length, batch, size)
    x = torch.randn(shape)
    seen: list[Tensor] = []

    def call(x: Tensor) -> Tensor:
        states, (h, c) = layer(x)
        seen.append(states.detach())
        return torch.cat([states.flatten(), h.flatten(), c.flatten()])

    store = make_store(bits, layer.parameters())
    leaf = x.clone().requires_grad_()
    with store:
        result = call(leaf * 1)
    node: Any = result.grad_fn
    while again._LAYER not in node.name():
        node = next(following for following, _ in node.next_functions if following is not None)
    rounded = node._saved_input.transpose(0, 1) if batch_first else node._saved_input
    grad = torch.randn_like(result)
    found = torch.autograd.grad(result, [leaf, *layer.parameters()], grad)
    assert same_bits(result, call(x))
    other = rounded.detach().clone().requires_grad_()
    expected = torch.autograd.grad(call(other), [other, *layer.parameters()], grad)
    if min(x.numel(), batch * hidden) < 256:
        return  # what is tiny stays as it is, also beside what is not
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_inputs_of_layers_are_all_that_is_kept(layers: int, bidirectional: bool) -> None:
    model = Outputs(16, 32, num_layers=layers, bidirectional=bidirectional)
    x = torch.randn(50, 8, 16)
    plain, ours = kept(model, x, FOUR)
    states = 50 * 8 * 32 * (2 if bidirectional else 1)
    # In 4 bits inputs, which are results of the layer before, or those of both side by side; states at the ends whole.
    inputs = x.numel() + layers * states
    assert ours <= inputs * 5 / 8 + 2 * layers * 2 * 8 * 32 * 4
    assert plain > 12 * ours


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_next_to_plain_training(layers: int, bidirectional: bool) -> None:
    torch.manual_seed(0)
    model = Outputs(16, 32, num_layers=layers, bidirectional=bidirectional, batch_first=True)
    x = torch.randn(8, 30, 16)
    grad = torch.randn_like(model(x))
    expected = run(model, x, grad)
    for bits, allowed in ((FOUR, 0.2), (EIGHT, 0.015)):
        found = run(model, x, grad, make_store(bits, model.parameters()))
        assert same_bits(expected[0], found[0])
        for left, right in zip(expected[1:], found[1:], strict=True):
            assert float((left - right).norm()) < allowed * float(left.norm())
    assert_same(model, x)
    assert run(model, x, grad, make_store(EXACT))[1].equal(expected[1])


def test_dropout_between_layers_and_given_states() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(16, 32, num_layers=2, dropout=0.4)
    x, h, c = torch.randn(20, 8, 16), torch.randn(2, 8, 32), torch.randn(2, 8, 32)

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.h, self.c = layer, nn.Parameter(h), nn.Parameter(c)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, (self.h * 1, self.c * 1))[0]  # type: ignore[no-any-return]

    model = Given()
    expected, found = run(model, x, None), run(model, x, None, make_store(FOUR, model.parameters()))
    for left, right in zip(expected, found, strict=True):
        assert float((left - right).norm()) < 0.2 * float(left.norm())


def test_other_ways_through_recurrent_layers() -> None:
    """Packed sequences, projections, GRUs and cells run other kernels, whose tensors are rounded as any."""
    torch.manual_seed(0)
    x = torch.randn(20, 8, 16)
    models: list[Any] = [
        nn.GRU(16, 32),
        nn.RNN(16, 32),
        nn.LSTM(16, 32, proj_size=12),
        nn.LSTM(16, 32).double(),
    ]
    for model in models:
        model.forward = lambda x, model=model, run=model.forward: run(x)[0]
        kind = next(model.parameters()).dtype
        expected, found = (run(model, x.to(kind), None, store) for store in (None, make_store(FOUR)))
        for left, right in zip(expected, found, strict=True):
            assert float((left - right).norm()) < 0.15 * float(left.norm())
    layer = nn.LSTM(16, 32)
    lengths = torch.tensor([20, 18, 15, 12, 9, 5, 2, 1])

    def packed(x: Tensor) -> Tensor:
        return layer(pack_padded_sequence(x, lengths))[0].data  # type: ignore[no-any-return]

    expected, found = run(packed, x, None), run(packed, x, None, make_store(FOUR, layer.parameters()))
    assert float((expected[1] - found[1]).norm()) < 0.15 * float(expected[1].norm())


def test_graphs_that_are_walked_twice_or_in_part() -> None:
    torch.manual_seed(0)
    model, x = Outputs(16, 32, num_layers=2), torch.randn(20, 8, 16, requires_grad=True)
    with make_store(FOUR, model.parameters()):
        y = model(x)
    grad, weights = torch.randn_like(y), list(model.parameters())
    whole = torch.autograd.grad(y, [x, *weights], grad, retain_graph=True)
    head = torch.autograd.grad(y, model.head.weight, grad, retain_graph=True)
    twice = torch.autograd.grad(y, [x, *weights], grad)
    assert all(map(same_bits, whole, twice))
    assert same_bits(head[0], whole[-2])


def test_nothing_is_left_after_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    create = again.Again.__init__

    def watched(self: Any, *arguments: Any) -> None:
        create(self, *arguments)
        seen.append(weakref.ref(self))

    monkeypatch.setattr(again.Again, "__init__", watched)
    model, x = Outputs(16, 32, num_layers=2, bidirectional=True), torch.randn(20, 8, 16)
    with make_store(FOUR, model.parameters()):
        loss = model(x).square().mean()
    assert len(seen) == 4
    loss.backward()
    gc.collect()
    assert all(reference() is None for reference in seen)


def test_autocast_checkpoints_and_frozen_layers() -> None:
    torch.manual_seed(0)
    model, x = Outputs(16, 32), torch.randn(20, 8, 16)
    model.rnn.weight_hh_l0.requires_grad_(False)

    def halved(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()  # type: ignore[no-any-return]

    def segment(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]

    expected = run(model, x, None)[1]
    for call in (model, halved, segment):
        found = run(call, x, None, make_store(FOUR, model.parameters()))[1]
        assert float((expected - found).norm()) < 0.2 * float(expected.norm())


INPUTS: dict[str, Callable[[nn.Module], Tensor]] = {
    "tiny": lambda m: torch.linspace(-1, 1, 12 * 16).view(12, 16, 1),
    "a parameter": lambda m: m.x,
    "a buffer": lambda m: m.y,
    "of a parameter": lambda m: m.x * 2,
    "a view": lambda m: (m.x + m.y).view(30, 8, 16),
    "expanded": lambda m: (m.x[:1] + m.y[:1]).expand(30, 8, 16),
    "no gradient": lambda m: (m.x + m.y).detach(),
}


class Reads(nn.Module):
    """An LSTM that reads what belongs to the module itself."""

    def __init__(self, name: str, hidden: int, bidirectional: bool, layers: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(30, 8, 16))
        self.register_buffer("y", torch.randn(30, 8, 16))
        self.name = name
        size = 1 if name == "tiny" else 16
        self.rnn = nn.LSTM(size, hidden, num_layers=layers, bidirectional=bidirectional)
        self.head = nn.Linear(hidden * (1 + bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(INPUTS[self.name](self))[0]) + x  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", list(INPUTS))
@pytest.mark.parametrize("hidden", [4, 16, 64])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_inputs_of_every_kind(name: str, hidden: int, bidirectional: bool, layers: int) -> None:
    """Those that no rule sees, for they are tiny or weights, are not taken for results, nor results for them."""
    torch.manual_seed(0)
    model = Reads(name, hidden, bidirectional, layers)
    store = make_store(EIGHT, [*model.parameters(), *model.buffers()])
    found = []
    for around in (nullcontext(), store):
        model.zero_grad()
        with around:
            loss = model(torch.zeros(5)).square().mean()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for left, right in zip(*found, strict=True):
        assert float((left - right).norm()) <= 0.05 * float(left.norm()) + 1e-7
    plain, ours = kept(model, torch.zeros(5), FOUR)
    assert ours < plain / (2 if name != "tiny" and hidden == 4 else 3)


def test_layers_behind_each_other_and_states_handed_on() -> None:
    """Inputs and states that an LSTM of another call has made."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.LSTM(16, 16), nn.LSTM(16, 16, bidirectional=True), nn.LSTM(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            states, end = self.first(x)
            states, _ = self.second(states, tuple(part.repeat(2, 1, 1) for part in end))
            again, end = self.third(states, end)
            return self.third(states, end)[0] + again  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Chain(), torch.randn(20, 16, 16)
    expected, found = run(model, x, None), run(model, x, None, make_store(EIGHT, model.parameters()))
    for left, right in zip(expected, found, strict=True):
        assert float((left - right).norm()) <= 0.02 * float(left.norm())


@pytest.mark.parametrize("batch_first", [False, True])
def test_who_reads_a_result_after_a_step_of_the_optimizer(batch_first: bool) -> None:
    """An actor, whose backward pass and step come first, and a critic, which needs the result alone."""
    torch.manual_seed(0)
    found = []
    for bits in (None, EIGHT):
        torch.manual_seed(0)
        rnn, actor, critic = nn.LSTM(16, 32, batch_first=batch_first), nn.Linear(32, 4), nn.Linear(32, 1)
        parts = nn.ModuleList([rnn, actor, critic])
        optimizer = torch.optim.Adam([*rnn.parameters(), *actor.parameters()], 0.1)
        with nullcontext() if bits is None else make_store(bits, parts.parameters()):
            states = rnn(torch.randn(20, 8, 16))[0]
            one, other = (actor(states) - 1).square().mean(), (critic(states.detach()) - 1).square().mean()
        one.backward()
        optimizer.step()
        other.backward()
        found.append([p.grad for p in parts.parameters()])
    for left, right in zip(*found, strict=True):
        assert left is not None
        assert right is not None
        assert float((left - right).norm()) <= 0.02 * float(left.norm())


def test_a_backward_pass_under_another_autocast() -> None:
    torch.manual_seed(0)
    model, x = Outputs(16, 32), torch.randn(20, 8, 16)
    expected = run(model, x, None)[1:]
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        with make_store(EIGHT, model.parameters()), torch.autocast("cpu", enabled=False):
            loss = model(leaf).sum()
        found = torch.autograd.grad(loss, [leaf, *model.parameters()])
    for left, right in zip(expected, found, strict=True):
        assert float((left - right).norm()) <= 0.02 * float(left.norm())


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_whose_gates_share_memory(cell: Any) -> None:
    """Chunks of one stretch of memory, each with a version of its own, which change in place one after the other."""

    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell(16, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            state, found = None, []
            for part in x:
                state = self.cell(part, state)
                found.append(self.head(state[0] if isinstance(state, tuple) else state))
            return torch.stack(found)

    torch.manual_seed(0)
    model, x = Rolled(), torch.randn(20, 16, 16)
    expected, found = run(model, x, None), run(model, x, None, make_store(EIGHT, model.parameters()))
    for left, right in zip(expected, found, strict=True):
        assert float((left - right).norm()) <= 0.02 * float(left.norm())


def test_double_backward_inside_of_a_step() -> None:
    torch.manual_seed(0)
    model, x = Outputs(16, 32), torch.randn(3, 8, 16)

    def call(x: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            (slope,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        return slope * 100

    call.parameters = model.parameters  # type: ignore[attr-defined]
    expected, found = run(call, x, None), run(call, x, None, make_store(EIGHT, model.parameters()))
    assert float((expected[1] - found[1]).norm()) <= 0.05 * float(expected[1].norm())


def test_a_run_and_its_report() -> None:
    torch.manual_seed(0)
    model, x = Outputs(16, 64, num_layers=2), torch.randn(50, 16, 16)
    expected = measure_saved_bytes(lambda: model(x).square().mean(), model).total
    session = LanceSession(model, LanceConfig())
    session.start()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with session.step():
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    report = session.report
    session.stop()
    assert report is not None
    assert report.compressed is not None
    assert report.plain.total == expected
    assert report.compressed.total < expected / 10
    assert losses[-1] < losses[0]
