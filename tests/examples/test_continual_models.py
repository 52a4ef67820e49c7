"""The networks of the continual benchmarks: shapes, sizes, heads that Avalanche grows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("avalanche")

from avalanche.training import Naive

from examples.models.gpm_alexnet import GPMAlexNet
from examples.models.multi_head import MultiHead
from examples.models.small import conv_trunk, mlp_trunk
from examples.streams.experiences import benchmark


def test_gpm_alexnet_has_the_published_layers() -> None:
    model = GPMAlexNet()
    layers = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (64, 3, 4, 4),
        (128, 64, 3, 3),
        (256, 128, 2, 2),
        (2048, 1024),
        (2048, 2048),
    ]
    assert all(layer.bias is None for layer in layers)
    norms = [m for m in model if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 5
    assert not list(model.buffers())
    assert [m.p for m in model if isinstance(m, nn.Dropout)] == [0.2, 0.2, 0.5, 0.5, 0.5]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.features)


def test_gpm_alexnet_normalises_with_the_batch_in_evaluation() -> None:
    model = GPMAlexNet(width=0.125).eval()
    images = torch.randn(8, 3, 32, 32)
    assert not model(images)[:4].allclose(model(images[:4]))
    alone = GPMAlexNet(width=0.125, groups=4).eval()
    torch.testing.assert_close(alone(images)[:4], alone(images[:4]))


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_trunks_of_other_inputs(channels: int, size: int) -> None:
    images = torch.randn(2, channels, size, size)
    assert GPMAlexNet(channels, size, 0.125)(images).shape == (2, 256)
    assert conv_trunk(channels, size=size, features=20)(images).shape == (2, 20)
    assert mlp_trunk(channels * size * size, 30)(images).shape == (2, 30)


def test_heads_are_added_per_task_and_each_sample_goes_to_its_own() -> None:
    parts = [(torch.randn(8, 1, 28, 28), torch.arange(8) % classes) for classes in (2, 4, 3)]
    scenario = benchmark(parts, parts)
    model = MultiHead(mlp_trunk(), 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    strategy = Naive(model=model, optimizer=optimizer, train_mb_size=4, eval_mb_size=8, evaluator=None)
    for experience in scenario.train_stream:
        strategy.train(experience)
    strategy.eval(scenario.test_stream)
    heads = model.classifier.classifiers
    assert [heads[str(t)].classifier.out_features for t in range(3)] == [2, 4, 3]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    model.eval()
    images, tasks = torch.randn(3, 1, 28, 28), torch.tensor([2, 0, 1])
    mixed = model(images, tasks)
    for image, task, row in zip(images, tasks, mixed, strict=True):
        wanted = heads[str(int(task))](model.trunk(image[None]))[0]
        torch.testing.assert_close(row[: len(wanted)], wanted)
        assert (row[len(wanted) :] == 0).all()
