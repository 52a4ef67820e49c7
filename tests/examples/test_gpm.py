"""GPM and SGP against the singular value decompositions that the papers write down."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("avalanche")

from avalanche.training import Naive

from examples.baselines.gpm import GPMPlugin, GradientProjectionMemory, SGPPlugin
from examples.models.multi_head import MultiHead
from examples.streams.experiences import benchmark

THRESHOLDS = (0.9, 0.93, 0.96)


class Oracle:
    """One layer of GPM and SGP, sample matrix by sample matrix, in NumPy and float64."""

    def __init__(self, scale: float | None) -> None:
        self.scale = scale
        self.bases: np.ndarray[Any, Any] | None = None
        self.importance: np.ndarray[Any, Any] | None = None

    def update(self, samples: np.ndarray[Any, Any], threshold: float) -> None:
        """`samples` is K × n, a column per feature vector."""
        old = self.bases if self.bases is not None else np.zeros((samples.shape[0], 0))
        inside = old @ (old.T @ samples)
        left, values, _ = np.linalg.svd(samples - inside, full_matrices=False)
        total = (samples**2).sum()
        count, held = 0, (inside**2).sum()
        while held <= threshold * total:
            held += values[count] ** 2
            count += 1
        directions, sizes, _ = np.linalg.svd(inside, full_matrices=False)
        surrogate = np.sqrt(((old.T @ directions) ** 2 * sizes**2).sum(1))
        strengths = np.concatenate([surrogate, values[:count]])
        self.bases = np.concatenate([old, left[:, :count]], 1)
        if self.scale is not None:
            importance = (self.scale + 1) * strengths / (self.scale * strengths + strengths.max())
            if self.importance is not None:
                importance[: old.shape[1]] += self.importance
            self.importance = np.minimum(importance, 1.0)

    def project(self, gradient: Tensor) -> Tensor:
        assert self.bases is not None
        weights = np.ones(self.bases.shape[1]) if self.importance is None else self.importance
        rows = gradient.flatten(1).double().numpy()
        return torch.from_numpy(rows - (rows @ (self.bases * weights)) @ self.bases.T).view_as(gradient)


def batches(seed: int) -> list[Tensor]:
    """Three experiences whose images lie near different low-dimensional sets."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(3):
        mixing = torch.randn(5, 3 * 8 * 8, generator=generator) * torch.tensor([4.0, 3, 2, 1, 0.5])[:, None]
        images = torch.randn(20, 5, generator=generator) @ mixing
        found.append((images + 0.3 * torch.randn(20, 3 * 8 * 8, generator=generator)).view(20, 3, 8, 8))
    return found


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


@pytest.mark.parametrize("scale", [None, 1.0, 10.0])
def test_bases_importances_and_projection_equal_the_papers(scale: float | None) -> None:
    model = network()
    memory = GradientProjectionMemory(0.9, 0.03, scale, heads=())
    conv, linear = Oracle(scale), Oracle(scale)
    for images, threshold in zip(batches(0), THRESHOLDS, strict=True):
        before = copy.deepcopy(model.state_dict())
        memory.consolidate(model, lambda images=images: model(images))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert model.training
        patches = F.unfold(images, 3, stride=2, padding=1).transpose(0, 1).flatten(1)
        conv.update(patches.double().numpy(), threshold)
        with torch.no_grad():
            linear.update(model[:-1](images).T.double().numpy(), threshold)
        for layer, name, oracle in ((model[0], "0", conv), (model[4], "4", linear)):
            found = memory.memories[name].protected[0].double().numpy()
            assert found.shape == oracle.bases.shape
            np.testing.assert_allclose(found @ found.T, oracle.bases @ oracle.bases.T, atol=2e-4)
            if scale is not None:
                np.testing.assert_allclose(memory.importances[name][0].numpy(), oracle.importance, atol=2e-3)
            layer.weight.grad = torch.randn_like(layer.weight)
            wanted = oracle.project(layer.weight.grad)
            memory.project(model)
            torch.testing.assert_close(layer.weight.grad.double(), wanted, atol=5e-3, rtol=0)
    assert memory.memories["0"].protected.shape[2] < 27


def test_small_scale_leaves_room_and_a_large_one_is_gpm() -> None:
    model, images = network(), batches(1)[0]
    norms = []
    for scale in (0.0, 10.0, 1e9, None):
        memory = GradientProjectionMemory(0.97, 0.0, scale, heads=())
        memory.consolidate(model, lambda: model(images))
        model[4].weight.grad = torch.ones_like(model[4].weight)
        memory.project(model)
        norms.append(model[4].weight.grad.norm().item())
    assert norms[0] > norms[1] > norms[2]
    assert norms[2] == pytest.approx(norms[3], rel=1e-3)


def stream() -> Any:
    generator = torch.Generator().manual_seed(0)
    parts = [(images, torch.randint(2, (20,), generator=generator)) for images in batches(2)]
    return benchmark(parts, parts)


@pytest.mark.parametrize("plugin", [GPMPlugin, SGPPlugin])
def test_trains_a_stream_and_moves_weights_only_where_it_may(plugin: type[GPMPlugin]) -> None:
    model = MultiHead(nn.Sequential(*network(), nn.ReLU()), 10)
    method = plugin(threshold=0.9, samples=20)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_mb_size=5,
        train_epochs=2,
        eval_mb_size=20,
        plugins=[method],
        evaluator=None,
    )
    images = stream().train_stream[0].dataset
    first = torch.stack([images[i][0] for i in range(20)])
    for task, experience in enumerate(stream().train_stream):
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        bases = {name: memory.protected[0].clone() for name, memory in method.memory.memories.items()}
        strategy.train(experience)
        assert set(method.memory.memories) == {"trunk.0", "trunk.4"}
        after = dict(model.named_parameters())
        if task == 0:
            assert not torch.equal(after["trunk.1.weight"], before["trunk.1.weight"])
            continue
        assert torch.equal(after["trunk.1.weight"], before["trunk.1.weight"])
        assert torch.equal(after["trunk.4.bias"], before["trunk.4.bias"])
        for name, basis in bases.items():
            moved = (after[f"{name}.weight"] - before[f"{name}.weight"]).flatten(1)
            share = (moved @ basis).norm() / moved.norm()
            assert moved.norm() > 1e-3
            assert share < 1e-5 if plugin is GPMPlugin else 1e-5 < share < 1
        head = f"classifier.classifiers.{task}.classifier.weight"
        assert not torch.equal(after[head], before.get(head, torch.zeros(()))), "the head of the task trains"
    assert model(first, torch.zeros(20, dtype=torch.long)).isfinite().all()


def test_samples_are_drawn_from_its_own_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        model = MultiHead(nn.Sequential(nn.Flatten(), nn.Linear(192, 8, bias=False)), 8)
        method = GPMPlugin(samples=4, seed=seed)
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            train_mb_size=5,
            plugins=[method],
            evaluator=None,
        )
        strategy.train(stream().train_stream[0])
        found.append((method.memory.memories["trunk.1"].protected, model.trunk[1].weight.detach().clone()))
    assert found[0][0].equal(found[1][0])
    assert found[0][1].equal(found[2][1]), "drawing samples must not touch training"
    assert found[0][0].shape != found[2][0].shape or not found[0][0].allclose(found[2][0])
