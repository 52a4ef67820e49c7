"""The per-step baselines against plain torch and against decompositions written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.baselines.asi import Asi, install_asi, iterate
from examples.baselines.hosvd import Hosvd, hosvd_bases, install_hosvd
from examples.baselines.per_step import PerStepConv2d, install
from lightning_lance import measure_saved_bytes

LAYERS = {
    "conv": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (8, 6, 9, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, padding="same", groups=2, padding_mode="reflect"), (5, 6, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False), (4, 6, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(6, 5, 1), (8, 6, 6, 7)),
    "linear": (lambda: nn.Linear(6, 5), (9, 6)),
    "tokens": (lambda: nn.Linear(6, 5, bias=False), (4, 7, 6)),
}


def correlated(shape: tuple[int, ...]) -> Tensor:
    """Energy that falls along every axis, so that a rank rule has something to cut."""
    x = torch.randn(shape, dtype=torch.float64)
    for axis, size in enumerate(shape):
        mix = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
        decay = 0.6 ** torch.arange(size, dtype=torch.float64)
        x = torch.movedim(torch.movedim(x, axis, -1) @ (mix * decay) @ mix.T, -1, axis)
    return x


def gradients(layer: nn.Module, x: Tensor, out: Tensor | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype).view_as(y).sin() if out is None else out
    return list(torch.autograd.grad(y, [x, *layer.parameters()], weights))


def by_hand(x: Tensor, energy: float) -> Tensor:
    """The input projected on its leading left singular vectors, mode by mode, from the SVD of each unfolding."""
    projected = x
    for axis in range(x.dim()):
        unfolding = x.movedim(axis, 0).flatten(1)
        u, s, _ = torch.linalg.svd(unfolding, full_matrices=False)
        held = torch.cumsum(s**2, 0) / (s**2).sum()
        rank = int((held <= energy).sum()) + 1
        projector = u[:, :rank] @ u[:, :rank].T
        projected = torch.movedim(torch.movedim(projected, axis, -1) @ projector, -1, axis)
    return projected


@pytest.mark.parametrize("install_baseline", [install_hosvd, install_asi])
@pytest.mark.parametrize("kind", LAYERS)
def test_energy_one_is_plain_torch(kind: str, install_baseline: object) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    expected = gradients(layer, x)
    install_baseline([layer], 1.0)  # type: ignore[operator]
    for _ in range(2):
        for found, stock in zip(gradients(layer, x), expected, strict=True):
            torch.testing.assert_close(found, stock, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("energy", [0.6, 0.95])
@pytest.mark.parametrize("kind", LAYERS)
def test_hosvd_is_the_gradient_of_the_projected_input(kind: str, energy: float) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().double(), correlated(shape)
    stock = copy.deepcopy(layer)
    install_hosvd([layer], energy)
    exact, projected = gradients(stock, x), gradients(stock, by_hand(x, energy))
    assert not torch.allclose(exact[1], projected[1], rtol=1e-3)
    found = gradients(layer, x)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], projected[1], rtol=1e-8, atol=1e-8)
    if len(found) > 2:
        torch.testing.assert_close(found[2], exact[2], rtol=1e-10, atol=1e-10)


def test_output_is_exact_and_no_grad_takes_the_stock_path() -> None:
    layer, x = nn.Conv2d(6, 5, 3), torch.randn(8, 6, 9, 9)
    expected = layer(x)
    install([layer], lambda: Hosvd(0.5))
    assert isinstance(layer, PerStepConv2d)
    assert torch.equal(layer(x), expected)
    del layer.formula_bytes
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert not hasattr(layer, "formula_bytes")


def test_subspace_iteration_is_the_product_with_the_gram_matrix() -> None:
    x = torch.randn(5, 20, 6, 4, dtype=torch.float64)
    for axis, size in enumerate(x.shape):
        basis = torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64)).Q
        unfolding = x.movedim(axis, 0).flatten(1)
        expected = torch.linalg.qr(unfolding @ unfolding.T @ basis).Q
        torch.testing.assert_close(iterate(x, basis, axis), expected, rtol=1e-10, atol=1e-10)


def test_asi_follows_the_leading_subspace() -> None:
    first, second = correlated((8, 6, 9, 7)), correlated((8, 6, 9, 7))
    asi = Asi(0.9)
    asi(first, 1)
    ranks = [None if basis is None else basis.shape[1] for basis in asi.bases]
    assert ranks == [None if basis is None else basis.shape[1] for basis in hosvd_bases(first, 0.9)]

    def distance() -> float:
        total = 0.0
        for axis, basis in enumerate(asi.bases):
            if basis is not None:
                leading = torch.linalg.svd(second.movedim(axis, 0).flatten(1))[0][:, : basis.shape[1]]
                total += float(torch.linalg.matrix_norm(basis - leading @ (leading.T @ basis)))
        return total

    before = distance()
    asi(second, 1)
    once = distance()
    for _ in range(60):
        asi(second, 1)
    assert once < before
    assert distance() < 1e-6 < once


def test_asi_starts_anew_at_another_shape() -> None:
    asi = Asi(0.8)
    asi(correlated((8, 6, 5)), 2)
    last = asi(correlated((3, 6, 5)), 2)
    assert last.rotation is None or last.rotation.shape[1] == 3


@pytest.mark.parametrize("kind", LAYERS)
def test_formula_counts_what_autograd_keeps(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().double(), correlated(shape)
    install_hosvd([layer], 0.9)
    assert measure_saved_bytes(lambda: layer(x), layer).total == layer.formula_bytes < x.nbytes


def test_other_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="BatchNorm2d is neither"):
        install_hosvd([nn.BatchNorm2d(3)])


def test_gradient_descends() -> None:
    """A few steps on a small network: the loss falls with both baselines."""
    y = torch.arange(16) % 2
    x = torch.randn(2, 3, 8, 8)[y] + 0.3 * torch.randn(16, 3, 8, 8)
    for install_baseline in (install_hosvd, install_asi):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        install_baseline([model[0], model[3]], 0.9)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []
        for _ in range(30):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]
