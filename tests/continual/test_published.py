"""The published method in a stream: the first experience uncompressed, later ones up to the threshold."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lance import ConfigError, LanceConfig
from lightning_lance.continual import ContinualConfig, ContinualSession
from lightning_lance.continual.basis import UpTo, lead, reserve
from lightning_lance.continual.layers import reserved_layers
from tests.hosvd import assert_same_factor, hosvd, projected
from tests.oracles import orthonormal, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::lightning_lance.LanceWarning")
BATCH = 10


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 1.0])
def test_directions_up_to_the_threshold(threshold: float) -> None:
    x = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    gram, whole = x.T @ x, orthonormal(12, 12)
    protected, free = whole[:, :3], whole[:, 3:]
    total = float(gram.trace())
    held = float((x @ protected).square().sum())
    values = np.linalg.svd((x - x @ protected @ protected.T).numpy(), compute_uv=False) ** 2
    needed = [count for count in range(10) if held + values[:count].sum() > threshold * total]
    for found in (reserve(protected, gram, UpTo(threshold)), lead(free, gram, UpTo(threshold))):
        assert found.shape == (12, needed[0] if needed else 9)
        assert float((found.T @ protected).abs().max()) < 1e-13
        assert np.isclose(float((x @ found).square().sum()), values[: found.shape[1]].sum(), rtol=1e-9)


def test_no_direction_where_the_protected_ones_hold_enough() -> None:
    gram = torch.diag(torch.tensor([10.0, 1.0, 0.1]))
    assert reserve(torch.eye(3)[:, :1], gram, UpTo(0.9)).shape == (3, 0)
    assert lead(torch.eye(3)[:, 1:], gram, UpTo(0.9)).shape == (3, 0)
    assert reserve(torch.eye(3)[:, :0], gram, UpTo(0.9)).shape == (3, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.fc = nn.Linear(6 * 16, 20, bias=False)
        self.heads = nn.ModuleList([nn.Linear(20, 3), nn.Linear(20, 3)])
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.heads[self.task](F.relu(self.fc(x.flatten(1))))


def task(index: int, batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(index)
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    found = []
    for _ in range(batches):
        x = torch.randn(BATCH, 3, 6, 6, generator=generator, dtype=torch.float64) + 0.2
        x = torch.einsum("bchw,cd->bdhw", x * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)[:, None, None], mix)
        found.append((x, torch.randint(0, 3, (BATCH,), generator=generator)))
    return found


def session(**more: Any) -> ContinualSession:
    options = ContinualConfig(heads=["heads"], preset="published", **more)
    return ContinualSession(LanceConfig(preset="published", calibration_batches=3), options)


def passes(net: nn.Module, data: list[tuple[Tensor, Tensor]], flags: list[bool] | None = None) -> list[Any]:
    def run(x: Tensor) -> Tensor:
        if flags is not None:
            flags.append(net.training)
        return net(x)

    return [lambda x=x: run(x) for x, _ in data]


def train(stream: ContinualSession, net: Net, optimizer: Any, data: list[tuple[Tensor, Tensor]], steps: int) -> None:
    for index in range(steps):
        x, y = data[index % len(data)]
        optimizer.zero_grad()
        with stream.step():
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()


def test_a_stream_against_its_own_definition() -> None:
    torch.manual_seed(0)
    net = Net().double()
    stream, plain = session(threshold=0.8), copy.deepcopy(net)
    first = task(0)
    optimizer, other = (torch.optim.SGD(found.parameters(), 0.1) for found in (net, plain))
    stream.begin_experience(net, passes(net, first), [optimizer])
    assert stream.compression is not None
    assert not stream.compression.layers
    train(stream, net, optimizer, first, 6)
    for index in range(6):  # plainly
        other.zero_grad()
        F.cross_entropy(plain(first[index % 3][0]), first[index % 3][1]).backward()
        other.step()
    for one, two in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    stream.end_experience(net, passes(net, first))
    protected = {name: memory.protected[0].clone() for name, memory in stream.memories.items()}
    assert protected.keys() == {"conv", "fc"}

    second, flags = task(1), []
    net.task = plain.task = 1
    stream.begin_experience(net, passes(net, second, flags), [optimizer])
    assert flags == [False] * 3
    layers = stream.compression.layers
    assert set(layers) == {"conv", "fc"}  # no head
    inputs: dict[str, list[Tensor]] = {"conv": [], "fc": []}
    hooks = [
        plain.get_submodule(name).register_forward_pre_hook(lambda _, a, name=name: inputs[name].append(a[0].detach()))
        for name in inputs
    ]
    for x, _ in second:
        plain(x)
    for hook in hooks:
        hook.remove()
    bases = {
        name: hosvd(seen, (0.98, None) if name == "fc" else (0.98, None, 0.98, 0.98)) for name, seen in inputs.items()
    }
    reserved = {}
    for name, layer in layers.items():
        subspace = layer._lance.subspace
        assert subspace is not None
        assert subspace.channel is None
        [batch] = list(subspace.batch.factors()) or [torch.eye(BATCH, dtype=torch.float64)]
        assert_same_factor(batch, bases[name][0], 1e-8) if batch.shape[1] < BATCH else None
        rows = torch.cat([F.unfold(x, 3).mT.flatten(0, 1) if name == "conv" else x for x in inputs[name]])
        basis = protected[name]
        held, total = float((rows @ basis).square().sum()), float(rows.square().sum())
        _, values, vectors = torch.linalg.svd(rows - rows @ basis @ basis.T, full_matrices=False)
        count = int((held + values.square().cumsum(0) <= 0.803 * total).sum()) + 1  # .8 and the growth of .003
        reserved[name] = vectors[:count].T
        own = reserved_layers(net)[name].reservation.basis[0]
        assert own.shape == (basis.shape[0], count)
        assert count < basis.shape[0] - basis.shape[1]
        assert relative_error(own @ own.T, reserved[name] @ reserved[name].T) < 1e-8

    # Its first gradient, along these directions, from the projected input.
    before = {name: getattr(plain, name).weight.detach().clone() for name in inputs}
    x, y = second[0]
    outputs = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = args[0].detach(), output

        return hook

    for name in inputs:
        plain.get_submodule(name).register_forward_hook(note(name))
    F.cross_entropy(plain(x), y).backward()
    train(stream, net, optimizer, second, 1)
    for name, layer in reserved_layers(net).items():
        weight = before[name].clone().requires_grad_()
        source = projected(outputs[name][0], bases[name])
        again = F.linear(source, weight) if name == "fc" else F.conv2d(source, weight)
        grad = outputs[name][1].grad
        again.backward(grad)
        assert weight.grad is not None
        update = layer.reservation.update
        assert update is not None
        own = layer.reservation.basis[0]
        expected = weight.grad.flatten(1) @ own
        assert relative_error(update.grad.reshape(expected.shape), expected) < 1e-10, name
    train(stream, net, optimizer, second, 5)
    stream.end_experience(net, passes(net, second))
    for name in inputs:
        moved = (net.get_submodule(name).weight.detach() - before[name]).flatten(1)
        assert float(moved.norm()) > 1e-3
        span = reserved[name]
        assert float((moved - moved @ span @ span.T).norm()) < 1e-10 * float(before[name].norm())
        assert float((moved @ protected[name]).norm()) < 1e-10 * float(before[name].norm())


def test_resuming_within_an_experience_is_bit_for_bit() -> None:
    results = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        net, stream = Net().double(), session(threshold=0.8)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for index in range(2):
            net.task = index
            data = task(index)
            stream.begin_experience(net, passes(net, data), [optimizer])
            train(stream, net, optimizer, data, 3)
            if interrupted:
                state = copy.deepcopy(
                    [stream.state_dict(), stream.running_state(), net.state_dict(), optimizer.state_dict()]
                )
                net, stream = Net().double(), session(threshold=0.8)
                net.task = index
                optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
                net.load_state_dict(state[2])
                optimizer.load_state_dict(state[3])
                stream.load_state_dict(state[0])
                stream.resume_experience(net, state[1], [optimizer])
            train(stream, net, optimizer, data, 3)
            stream.end_experience(net, passes(net, data))
        results.append(net.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_options() -> None:
    found = ContinualConfig(preset="published", threshold=0.97, threshold_growth=0.003)
    assert (found.rule, found.reserved, found.damping, found.freeze_above) == ("threshold", "threshold", 0.0, 1.0)
    assert not found.compress_first
    assert ContinualConfig(preset="published").threshold_of(1) == pytest.approx(0.973)
    config = session().config
    assert (config.rank, config.bits, config.batch) == ({"batch": 0.98, "spatial": 0.98}, None, "learned")
    for option, value in {"rule": "scaled", "reserved": 4, "damping": 0.5, "freeze_above": 0.9}.items():
        with pytest.raises(ConfigError, match=rf"^{option}=.* contradicts preset='published'"):
            ContinualConfig(preset="published", **{option: value})
    with pytest.raises(ConfigError, match=r"compress_first='no' is not allowed"):
        ContinualConfig(compress_first="no")  # type: ignore[arg-type]
    assert ContinualSession(LanceConfig()).config.bits == "auto"
