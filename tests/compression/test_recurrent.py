"""LSTMs: of each layer the input is kept, and gates and states are those that the kernel makes of it again."""

from __future__ import annotations

import gc
import weakref
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
    # In 4 bits inputs, which are results of the layer before; states at the beginning and the end whole.
    inputs = x.numel() + (layers if bidirectional else layers - 1) * states
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
