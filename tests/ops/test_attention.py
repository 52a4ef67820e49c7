from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance import measure_saved_bytes
from lightning_lance.compression.functional import compact_functional
from lightning_lance.ops.attention import rounded_attention
from lightning_lance.tensors.rounding import dequantize, quantize
from tests.companions import same_bits

SHAPE = (2, 3, 20, 16)


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in (shapes or (SHAPE,) * 3)]


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "additive mask": {"attn_mask": torch.randn(20, 20)},
    "mask": {"attn_mask": torch.rand(20, 20) < 0.7},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exact_output_and_a_close_gradient(name: str, dtype: torch.dtype) -> None:
    options = {k: v.to(dtype) if k == "attn_mask" and v.dtype != torch.bool else v for k, v in OPTIONS[name].items()}
    tensors = inputs(dtype=dtype)
    grad = torch.randn(SHAPE).to(dtype)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    found = rounded_attention(*tensors, **options)
    assert same_bits(found.detach(), expected.detach())
    for left, right in zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        assert cosine(left, right) > 0.9995
        assert left.dtype == dtype


def test_it_is_the_gradient_of_attention_to_the_rounded_inputs() -> None:
    tensors, grad = inputs(), torch.randn(SHAPE)
    found = torch.autograd.grad(rounded_attention(*tensors), tensors, grad)
    rounded = [
        dequantize(quantize(t.detach().clone(), 8, torch.float32), 8, t.shape, t.stride(), t.dtype).requires_grad_()
        for t in tensors
    ]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*rounded), rounded, grad)
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_sizes_that_differ_and_grouped_queries() -> None:
    for shapes, options in [
        (((2, 4, 7, 16), (2, 4, 11, 16), (2, 4, 11, 24)), {}),
        (((2, 4, 7, 16), (2, 2, 7, 16), (2, 2, 7, 16)), {"enable_gqa": True}),
        (((5, 7, 16), (5, 9, 16), (5, 9, 16)), {}),
    ]:
        tensors = inputs(*shapes)
        expected, found = F.scaled_dot_product_attention(*tensors, **options), rounded_attention(*tensors, **options)
        assert same_bits(found.detach(), expected.detach())
        grad = torch.randn_like(expected)
        for left, right in zip(
            torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
        ):
            assert cosine(left, right) > 0.9995


def test_only_some_need_a_gradient() -> None:
    query, key, value = inputs()
    key.requires_grad_(False)
    found = torch.autograd.grad(rounded_attention(query, key, value).sum(), [query, value], allow_unused=True)
    assert all(grad is not None for grad in found)


def test_bytes() -> None:
    tensors = inputs()
    saved = measure_saved_bytes(lambda: rounded_attention(*[t + 0 for t in tensors]))
    count = sum(t.numel() for t in tensors)
    assert saved.total == count + count // 8
    assert (
        measure_saved_bytes(lambda: F.scaled_dot_product_attention(*[t + 0 for t in tensors])).total > 3.5 * saved.total
    )


def test_the_stock_operator_where_ours_cannot() -> None:
    tensors = inputs()
    mask = torch.randn(20, 20, requires_grad=True)
    assert "Rounded" not in type(rounded_attention(*tensors, attn_mask=mask).grad_fn).__name__
    assert "Rounded" not in type(rounded_attention(*tensors, dropout_p=0.1).grad_fn).__name__
    with torch.no_grad():
        assert rounded_attention(*tensors).grad_fn is None
    assert "Rounded" in type(rounded_attention(*tensors).grad_fn).__name__


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("arguments", [{"need_weights": False}, {"need_weights": True}, {"key_padding_mask": True}])
def test_multi_head_attention_module(batch_first: bool, arguments: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    if arguments.get("key_padding_mask"):
        batch, length = (6, 9) if batch_first else (9, 6)
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[:, -2:] = True
        arguments = {"key_padding_mask": padding, "need_weights": False}
    x = torch.randn(6, 9, 32, requires_grad=True)
    grad = torch.randn(6, 9, 32)
    wanted = [x, *module.parameters()]
    expected = module(x, x, x, **arguments)[0]
    with compact_functional(approximate=True):
        found = module(x, x, x, **arguments)[0]
        # Also while the mode is on.
        left = torch.autograd.grad(found, wanted, grad)
    assert same_bits(found.detach(), expected.detach())
    for ours, stock in zip(left, torch.autograd.grad(expected, wanted, grad), strict=True):
        assert cosine(ours, stock) > 0.9995
    if not arguments.get("need_weights", True):
        with compact_functional(approximate=True):
            ours_bytes = measure_saved_bytes(lambda: module(x, x, x, **arguments)[0], module).total
        assert ours_bytes < 0.7 * measure_saved_bytes(lambda: module(x, x, x, **arguments)[0], module).total


def test_a_transformer_layer_trains_as_usual() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, activation="gelu")
    x = torch.randn(4, 9, 32)
    grads = []
    for approximate in (None, True):
        layer.zero_grad()
        if approximate is None:
            layer(x).square().sum().backward()
        else:
            with compact_functional(approximate):
                layer(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]))
    assert cosine(*grads) > 0.998
