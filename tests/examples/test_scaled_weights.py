"""TRGP and CODE-CL do what their papers say: who is trusted, what may move, what a conceptor is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("avalanche")

from avalanche.training import Naive

from examples.baselines.code_cl import CodeCLPlugin, both, conceptor, either
from examples.baselines.scaled_weights import ScaledWeight, ScaledWeightsPlugin
from examples.baselines.trgp import TRGPPlugin
from examples.models.multi_head import MultiHead
from examples.streams.experiences import benchmark
from lightning_lance.continual import FeatureMoments, LayerMemory
from lightning_lance.ops.features import FeatureSide

WIDTH = 3 * 6 * 6


def stream(tasks: int = 3) -> Any:
    """Tasks that share two strong directions and have one each of their own."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2, WIDTH, generator=generator)
    parts = []
    for _ in range(tasks):
        mixing = torch.cat([shared, torch.randn(2, WIDTH, generator=generator)])
        images = torch.randn(24, 4, generator=generator) @ mixing
        labels = (images @ torch.randn(WIDTH, generator=generator) > 0).long()
        labels[:2] = torch.tensor([0, 1])
        parts.append((images.view(24, 3, 6, 6), labels))
    return benchmark(parts, parts)


def network() -> MultiHead:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU())
    return MultiHead(trunk, 12, 2)


def trained(plugin: ScaledWeightsPlugin, tasks: int = 3, epochs: int = 3, kind: Any = torch.optim.SGD) -> Any:
    model = network()
    strategy = Naive(
        model=model,
        optimizer=kind(model.parameters(), lr=0.05),
        train_mb_size=8,
        train_epochs=epochs,
        eval_mb_size=24,
        plugins=[plugin],
        evaluator=None,
    )
    for experience in stream(tasks).train_stream:
        strategy.train(experience)
    return strategy


def moments(rows: Tensor) -> FeatureMoments:
    found = FeatureMoments(FeatureSide(1, rows.shape[1]), None, "layer")
    found.update(rows)
    return found


@pytest.mark.parametrize(("trust", "expected"), [(0.3, [1, 2]), (0.55, [1, 2]), (0.65, [1]), (0.8, [])])
def test_tasks_are_trusted_by_the_share_of_the_gradient_that_they_hold(trust: float, expected: list[int]) -> None:
    plugin = TRGPPlugin(trust=trust)
    memory = plugin.memories["layer"] = LayerMemory(8, compact=False)
    memory.reserve()
    memory.start()
    memory.protect(torch.diag(torch.tensor([6.0, 5, 4, 3, 0, 0, 0, 0])), 1.0)
    plugin.columns["layer"] = {task: [task] for task in range(4)}
    shares = torch.tensor([0.1, 0.7, 0.6, 0.3])
    gradient = torch.zeros(5, 8)
    gradient[:4] = shares[:, None] * memory.protected[0].T
    gradient[4, 7] = (1.0 - shares.square().sum()).sqrt()
    chosen = plugin.choose("layer", gradient, moments(torch.randn(5, 8)))
    assert [int(torch.argmax((basis.T @ memory.protected[0]).abs())) for basis in chosen] == expected


def test_a_scale_of_zero_is_the_weight_itself_and_others_rescale_it_along_the_basis() -> None:
    torch.manual_seed(1)
    layer, side = nn.Conv2d(3, 4, 2), FeatureSide(1, 3, (2, 2))
    basis = torch.linalg.qr(torch.randn(12, 3)).Q
    form = ScaledWeight(side, [basis])
    assert form(layer.weight).equal(layer.weight)
    scale = torch.randn(3, 3)
    with torch.no_grad():
        form.scales[0].copy_(scale)
    rows = layer.weight.detach().flatten(1).double()
    # TRGP, eq. 4: the projection of W on the subspace is exchanged for the scaled one, W S (I + Q) Sᵀ.
    inside = basis.double()
    wanted = rows - rows @ inside @ inside.T + rows @ inside @ (torch.eye(3) + scale).double() @ inside.T
    torch.testing.assert_close(form(layer.weight).flatten(1).double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [TRGPPlugin, CodeCLPlugin])
def test_a_task_learns_scales_and_earlier_ones_keep_their_outputs(make: Any) -> None:
    options: dict[str, Any] = {"samples": 24}
    plugin = make(**options, **({"threshold": 0.999} if make is TRGPPlugin else {"aperture": 100.0, "overlap": 0.1}))
    strategy = trained(plugin, tasks=1)
    first = stream().train_stream[0]
    images = torch.stack([first.dataset[i][0] for i in range(24)])
    tasks = torch.zeros(24, dtype=torch.long)
    before = strategy.model(images, tasks).detach()
    start = {name: p.detach().clone() for name, p in strategy.model.named_parameters()}
    for experience in list(stream().train_stream)[1:]:
        strategy.train(experience)
    strategy.model.eval()
    assert float((strategy.model(images, tasks).detach() - before).norm()) < 0.02 * float(before.norm())
    moved = {name: p for name, p in strategy.model.named_parameters() if name in start and not p.equal(start[name])}
    assert {"trunk.0.weight", "trunk.3.weight"} & set(moved)
    assert all(not name.startswith("classifier.classifiers.0.") and not name.endswith("trunk.0.bias") for name in moved)
    scales = [scale for layers in plugin.scales.values() for pairs in layers.values() for _, scale in pairs]
    assert scales
    assert max(float(scale.abs().max()) for scale in scales) > 1e-4
    assert set(dict(strategy.model.named_parameters())) == {
        *("trunk.0.weight", "trunk.0.bias", "trunk.3.weight", "trunk.3.bias"),
        *(f"classifier.classifiers.{k}.classifier.{p}" for k in range(3) for p in ("weight", "bias")),
        *(name for name, _ in strategy.model.named_parameters() if "active_units" in name),
    }


@pytest.mark.parametrize("make", [TRGPPlugin, CodeCLPlugin])
def test_a_task_is_evaluated_with_its_scales_and_the_weights_come_back(make: Any) -> None:
    plugin = make(samples=24) if make is TRGPPlugin else make(samples=24, aperture=100.0, overlap=0.1)
    strategy = trained(plugin)
    weights = {name: p.detach().clone() for name, p in strategy.model.named_parameters()}
    seen: dict[int, Tensor] = {}
    original = strategy.forward

    def forward() -> Any:
        seen[strategy.experience.current_experience] = strategy.model.trunk[0].weight.detach().clone()
        return original()

    strategy.forward = forward
    strategy.eval(stream().test_stream)
    for name, p in strategy.model.named_parameters():
        assert p.equal(weights[name])
    plain = weights["trunk.0.weight"]
    assert seen[0].equal(plain)
    stored = plugin.scales[2]["trunk.0"]
    assert stored
    assert not seen[2].equal(plain)
    rows = wanted = plain.flatten(1).double()
    for basis, scale in stored:
        wanted = wanted + rows @ basis.double() @ scale.double() @ basis.double().T
    torch.testing.assert_close(seen[2].flatten(1).double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["AdamW", "Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD"]
)
def test_scales_are_trained_by_an_optimizer_of_the_same_kind(kind: str) -> None:
    if kind == "Adagrad" and not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("Avalanche drops the state that torch 2.6 makes in the constructor")
    plugin = TRGPPlugin(samples=24)
    trained(plugin, epochs=1, kind=getattr(torch.optim, kind))
    scales = [scale for layers in plugin.scales.values() for pairs in layers.values() for _, scale in pairs]
    assert any(float(scale.abs().max()) > 0.0 for scale in scales)


def test_conceptors_obey_their_algebra() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = [torch.randn(7, rank, generator=generator, dtype=torch.float64) for rank in (3, 7, 5)]
    moments = [root @ root.T for root in roots]
    found = [conceptor(second, 2.0) for second in moments]
    for second, made in zip(moments, found, strict=True):
        values, vectors = torch.linalg.eigh(second)
        wanted = vectors @ torch.diag(values / (values + 0.25)) @ vectors.T
        torch.testing.assert_close(made, wanted, atol=1e-8, rtol=0)
    torch.testing.assert_close(either(found[0], found[2]), conceptor(moments[0] + moments[2], 2.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(both(found[0], found[1]), both(found[1], found[0]), atol=1e-6, rtol=0)
    # De Morgan, for conceptors whose inverses exist.
    eye = torch.eye(7, dtype=torch.float64)
    full = [conceptor(second + 0.1 * eye, 2.0) for second in moments]
    by_or = eye - either(eye - full[0], eye - full[2])
    torch.testing.assert_close(both(full[0], full[2]), by_or, atol=1e-4, rtol=0)
    assert float(torch.linalg.eigvalsh(both(found[1], found[1])).max()) < 1.0


def test_a_gradient_is_damped_by_what_earlier_tasks_use_and_overlap_decides_what_is_freed() -> None:
    plugin = CodeCLPlugin(aperture=10.0, directions=2)
    rows = torch.randn(200, 6) * torch.tensor([3.0, 2.0, 0.05, 0.0, 0.0, 0.0])
    plugin.consolidate("layer", moments(rows), 0)
    held = plugin.project("layer", torch.eye(6)).diagonal()
    assert held[0] < 0.01
    assert held[1] < 0.01
    assert 0.5 < held[2] < 1.0
    assert held[3:].allclose(torch.ones(3), atol=1e-4)
    [basis] = plugin.choose("layer", torch.eye(6), moments(rows))
    assert basis.shape == (6, 2)
    assert float(basis[2:].norm()) < 0.05
    elsewhere = torch.randn(200, 6) * torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert plugin.choose("layer", torch.eye(6), moments(elsewhere)) == []


def test_a_layer_of_several_groups_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ValueError, match="Allowed: 1 group"):
        TRGPPlugin().layers(model)
