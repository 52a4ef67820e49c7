"""Fused attention: queries, keys and values are kept, and the result is what the kernel makes of them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceConfig, LanceSession, measure_saved_bytes
from lightning_lance.compression import again
from lightning_lance.compression.store import Bits
from tests.stock import EXACT, kept, make_store, run, same_bits

FOUR, EIGHT = Bits(4, 4), Bits(8, 8)
B, H, L, E = 4, 3, 40, 16


class Attend(nn.Module):
    """One block of attention, with projections that read one input or have a matrix of their own each."""

    def __init__(self, width: int = H * E, heads: int = H, fused: bool = True, **options: Any) -> None:
        super().__init__()
        self.heads, self.fused, self.options = heads, fused, options
        self.inward = nn.ModuleList(nn.Linear(width, 3 * width if fused else width) for _ in range(1 if fused else 3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = (3, self.heads, -1) if self.fused else (self.heads, -1)
        parts = [layer(x).unflatten(-1, split) for layer in self.inward]
        q, k, v = parts[0].permute(2, 0, 3, 1, 4).unbind(0) if self.fused else (part.transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2))


def peaked(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for layer in model.inward[:2] if len(model.inward) > 1 else ():  # type: ignore[union-attr,index,arg-type]
            layer.weight *= factor
    return model


def flash(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, **options)  # type: ignore[no-any-return]


def node_of(call: Callable[[], Tensor], bits: Bits = FOUR) -> Any:
    with make_store(bits):
        return call().grad_fn


@settings(deadline=None, max_examples=40)
@given(
    heads=st.integers(1, 4),
    length=st.integers(1, 40),
    keys=st.integers(1, 40),
    features=st.sampled_from([8, 16, 24, 33]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    bits=st.sampled_from([FOUR, EIGHT, Bits(2, 4)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_backward_pass_is_that_of_the_rounded_tensors(
    heads: int,
    length: int,
    keys: int,
    features: int,
    causal: bool,
    scale: float | None,
    bits: Bits,
    dtype: torch.dtype,
) -> None:
    """An oracle: attention of what was kept, by itself, differentiated by hand in float64."""
    torch.manual_seed(length)
    q, k, v = (
        torch.randn(B, size, heads, features, dtype=dtype).transpose(1, 2).requires_grad_()
        for size in (length, keys, keys)
    )
    with make_store(bits):
        result = F.scaled_dot_product_attention(q * 1, k * 1, v * 1, is_causal=causal, scale=scale)
    assert same_bits(result, flash(q, k, v, is_causal=causal, scale=scale)[0])
    node: Any = result.grad_fn
    assert node.name() == again._ATTENTION
    rounded = [part.detach().clone() for part in (node._saved_query, node._saved_key, node._saved_value)]
    grad = torch.randn_like(result)
    found = torch.autograd.grad(result, (q, k, v), grad)
    if keys > again.AFFORDABLE * heads * features or min(B * heads * length, *(p.numel() for p in rounded)) < 256:
        return  # the result has bits of its own, and what is tiny stays whole
    expected = _differentiated(*(part.double() for part in rounded), grad.double(), causal, scale)
    for left, right in zip(found, expected, strict=True):
        size = max(1e-3, float(right.detach().norm()))  # of a single key the gradient of the query is zero
        assert float((left.double() - right).norm()) < (0.05 if dtype is torch.bfloat16 else 1e-4) * size


def _differentiated(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, scale: float | None) -> list[Tensor]:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    logits = q @ k.mT * factor
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    shares = logits.softmax(-1)
    by_share = grad @ v.mT
    by_logit = shares * (by_share - (by_share * shares).sum(-1, keepdim=True)) * factor
    return [by_logit @ k, by_logit.mT @ q, shares.mT @ grad]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bits", [FOUR, EIGHT, Bits(2, 4)])
def test_queries_keys_and_values_are_all_that_is_kept(fused: bool, bits: Bits) -> None:
    """Neither the result, which the layer behind saves too, nor the log-sum-exps beside them."""
    model, x = Attend(fused=fused), torch.randn(4, L, H * E)
    plain, ours = kept(model, x, bits)
    assert plain >= 5 * x.nbytes  # the input, three parts, and the result
    # Of groups of 128 a range has 4 or 8 bytes, and so have numbers that are kept for a weight alone.
    assert ours <= (3 + (bits.weight or 0) / 8) * x.numel() * (1 + 8 / 64)


def test_the_layer_behind_multiplies_with_the_result_of_what_is_kept() -> None:
    torch.manual_seed(0)
    model, x = Attend(), torch.randn(4, L, H * E)
    with make_store(FOUR, model.parameters()):
        y = model(x)
    node: Any = y.grad_fn
    while again._ATTENTION not in node.name():
        node = next(following for following, _ in node.next_functions if "Accumulate" not in following.name())
    result, _ = flash(node._saved_query, node._saved_key, node._saved_value)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, model.out.weight, grad)
    torch.testing.assert_close(found, grad.flatten(0, 1).T @ result.transpose(1, 2).flatten(2).flatten(0, 1))


@pytest.mark.parametrize("factor", [1, 4, 8])
def test_peaked_attention_is_nearer_than_with_exact_sums(factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = peaked(Attend(fused=False), factor), torch.randn(8, L, H * E)
    grad = torch.randn_like(model(x))
    expected = run(model, x, grad)[1]
    found = run(model, x, grad, make_store(FOUR))[1]
    with monkeypatch.context() as patch:
        patch.setattr(again, "AFFORDABLE", 0)
        other = run(model, x, grad, make_store(FOUR))[1]
    assert (found - expected).norm() < (other - expected).norm()
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_nothing_is_rounded_without_bits() -> None:
    model, x = Attend(is_causal=True), torch.randn(4, L, H * E)
    for left, right in zip(run(model, x, None), run(model, x, None, make_store(EXACT)), strict=True):
        assert same_bits(left, right)


MASK = torch.randn(L, L).relu()
PADDING = (torch.arange(L) < torch.tensor([L, L - 9, L // 2, 5]).unsqueeze(1)).view(B, 1, 1, L)
FAR = torch.full((L, L), -1e9).triu(1)
SLOPES = -(torch.arange(L).view(-1, 1) - torch.arange(L)).abs() * torch.tensor([0.5, 1.0, 4.0]).view(1, H, 1, 1)
LEFT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "trained mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK.clone().requires_grad_()),
    "dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3),
    "three axes": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0])[None],
    "values of other size": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :8]),
    "many tokens": lambda q, k, v: F.scaled_dot_product_attention(q, *(p.repeat(1, 1, 8, 1) for p in (k, v))),
    "not finite": lambda q, k, v: F.scaled_dot_product_attention(q, k, torch.where(v > 3, torch.inf, v)),
}
SAME: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK),
    "mask of each head": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK.expand(B, H, L, L)),
    "boolean mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK < 1),
    "mask of each sample": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK.expand(B, 1, L, L) * 1),
    "padding": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=PADDING),
    "far": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=FAR),
    "far of each head": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=FAR.expand(B, H, L, L)),
    "slopes": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=SLOPES),
    "plain": F.scaled_dot_product_attention,
    "by keyword": lambda q, k, v: F.scaled_dot_product_attention(key=k, value=v, query=q),
    "one tensor for all": lambda q, k, v: F.scaled_dot_product_attention(q, q, q),
    "key is value": lambda q, k, v: F.scaled_dot_product_attention(q, k, k),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    "other length": lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :7] * 1, k, v),
    "frozen keys": lambda q, k, v: F.scaled_dot_product_attention(q, k.detach(), v),
    "frozen queries": lambda q, k, v: F.scaled_dot_product_attention(q.detach(), k, v),
}


@pytest.mark.parametrize("name", [*LEFT, *SAME])
def test_gradients_next_to_plain_training(name: str) -> None:
    torch.manual_seed(0)
    call = (LEFT | SAME)[name]
    x, grad = torch.randn(3, B, H, L, E), None

    def attend(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return call(*x.unbind(0)) * torch.linspace(-1, 1, E)[: 8 if name == "values of other size" else E]

    expected, found = run(attend, x, grad), run(attend, x, grad, make_store(FOUR))
    assert same_bits(expected[0], found[0])
    left, right = (pair[1].nan_to_num(0, 0, 0).double() for pair in (expected, found))
    assert float((left - right).norm()) < 0.08 * float(left.norm())


@pytest.mark.parametrize("name", list(SAME))
def test_the_result_is_left_out(name: str) -> None:
    """Every way to call the kernel: beside masks, a byte is kept for each element of queries, keys and values."""
    q, k, v = (torch.randn(B, H, L, E) for _ in range(3))
    if name == "grouped" and torch.__version__ < "2.8":
        pytest.skip("other kernels serve grouped queries")

    def attend(x: Tensor) -> Tensor:
        return SAME[name](*((x + part).requires_grad_() for part in (q, k, v)))

    plain, ours = kept(attend, torch.zeros(B, H, L, E), FOUR)
    masks = {"mask of each sample": B * L * L, "slopes": H * L * L}.get(
        name, L * L if "mask" in name or "far" in name else 0
    )
    assert ours <= 1.1 * 3 * q.numel() + 4 * masks + 640 * (name == "padding")
    assert plain >= q.numel() * 4


def test_graphs_that_are_walked_twice_or_in_part() -> None:
    torch.manual_seed(0)
    model, x = Attend(), torch.randn(4, L, H * E, requires_grad=True)
    with make_store(FOUR, model.parameters()):
        y = model(x)
    grad, weights = torch.randn_like(y), list(model.parameters())
    whole = torch.autograd.grad(y, [x, *weights], grad, retain_graph=True)
    alone = torch.autograd.grad(y, model.out.weight, grad, retain_graph=True)
    twice = torch.autograd.grad(y, [x, *weights], grad, retain_graph=True)
    inward = torch.autograd.grad(y, [x], grad)
    assert all(map(same_bits, whole, twice))
    assert same_bits(alone[0], whole[3])
    assert same_bits(inward[0], whole[0])


@pytest.mark.parametrize("frozen", ["inward", "out", "neither"])
def test_nothing_is_left_after_a_backward_pass(frozen: str) -> None:
    """What was computed again is gone with what it was computed from, although the loss is held."""
    model, x = Attend(), torch.randn(4, L, H * E)
    if frozen != "neither":
        getattr(model, frozen).requires_grad_(False)
    seen: list[Any] = []
    create = again.Again.__init__

    def watched(self: Any, *arguments: Any) -> None:
        create(self, *arguments)
        seen.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(again.Again, "__init__", watched)
        with make_store(FOUR, model.parameters()):
            loss = model(x).square().mean()
    assert len(seen) == (frozen != "inward")
    loss.backward()
    gc.collect()
    assert all(reference() is None for reference in seen)


def test_who_reads_a_detached_result_last_holds_no_more_than_it() -> None:
    """The attention's own backward pass is over, and takes nothing any more."""
    q, k, v = (torch.randn(B, H, L, E, requires_grad=True) for _ in range(3))
    heads = nn.ModuleList(nn.Linear(E, 8) for _ in range(2))
    seen: list[again.Again] = []
    create = again.Again.__init__

    def watched(self: Any, *arguments: Any) -> None:
        create(self, *arguments)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(again.Again, "__init__", watched)
        with make_store(FOUR, heads.parameters()):
            result = F.scaled_dot_product_attention(q * 1, k * 1, v * 1)
            losses = [head(result.detach()).sum() for head in heads]
    result.sum().backward()
    del result
    losses[0].backward()
    (made,) = seen
    assert made._found == []
    losses[1].backward()


def test_a_result_that_is_written_on_afterwards() -> None:
    """What the layer behind saves is another tensor then, and is kept for itself."""
    torch.manual_seed(0)
    layer = nn.Linear(H * E, 8)

    def attend(x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (H, E)).transpose(1, 2) for part in (x, 2 * x, x + 1))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + 0
        return layer(F.dropout(found.relu_(), 0.5))  # type: ignore[no-any-return]

    attend.parameters = layer.parameters  # type: ignore[attr-defined]
    x = torch.randn(4, L, H * E)
    expected, found = run(attend, x, None), run(attend, x, None, make_store(FOUR, layer.parameters()))
    assert same_bits(expected[0], found[0])
    assert float((expected[1] - found[1]).norm()) < 0.05 * float(expected[1].norm())


def test_dropout_behind_the_attention() -> None:
    """No recipe of two steps: the result of the dropout is kept in its own bits."""
    torch.manual_seed(0)
    layer, x = nn.Linear(E, 8), torch.randn(3, B, H, L, E)
    model = nn.Module()
    model.layer = layer  # type: ignore[assignment]
    model.forward = lambda x: layer(F.dropout(F.scaled_dot_product_attention(*x.unbind(0)), 0.5))  # type: ignore[method-assign]
    expected, found = run(model, x, None), run(model, x, None, make_store(FOUR))
    for left, right in zip(expected[1:], found[1:], strict=True):
        assert float((left - right).norm()) < 0.08 * float(left.norm())


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_of_checkpointed_segments(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Attend(), torch.randn(4, L, H * E)

    def segment(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    found = []
    for call, store in ((model, nullcontext()), (segment, make_store(FOUR, model.parameters()))):
        leaf = x.clone().requires_grad_()
        with store:
            loss = call(leaf).square().sum()
        loss.backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    assert float((found[0] - found[1]).norm()) < 0.06 * float(found[0].norm())


def test_under_autocast() -> None:
    torch.manual_seed(0)
    model, x = Attend(), torch.randn(4, L, H * E)
    plain, ours = kept(lambda x: _autocast(model, x), x, FOUR)
    expected = run(model, x, None)[1]
    found = run(lambda x: _autocast(model, x), x, None, make_store(FOUR, model.parameters()))[1]
    assert ours < plain
    assert float((expected - found).norm()) < 0.1 * float(expected.norm())


def _autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_first", [True, False])
def test_modules_of_torch(batch_first: bool) -> None:
    """`nn.MultiheadAttention` calls the kernel out of anybody's sight."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 3, 96, dropout=0.0, batch_first=batch_first).train()
    x = torch.randn(4, L, 48)
    grad = torch.randn_like(x)
    expected, found = run(layer, x, grad), run(layer, x, grad, make_store(FOUR, layer.parameters()))
    assert same_bits(expected[0], found[0])
    for left, right in zip(expected[1:], found[1:], strict=True):
        assert float((left - right).norm()) <= 0.15 * float(left.norm()) + 1e-3 * float(grad.norm())
    attend = nn.MultiheadAttention(48, 3, batch_first=batch_first)
    plain, ours = kept(lambda x: attend(x, x, x, need_weights=False)[0], x, FOUR)
    # Three parts in 8 bits, and in 4 the input and the result, which the module copies.
    assert ours <= 1.25 * (3 + 1) * x.numel()
    assert plain >= 6 * x.nbytes


def test_keys_of_a_module_that_do_not_train_are_no_masks() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(48, 3, batch_first=True, kdim=32, vdim=32)
    layer.k_proj_weight.requires_grad_(False)
    layer.in_proj_bias.requires_grad_(False)
    memory = torch.randn(B, L, 32)
    _, ours = kept(lambda x: layer(x, memory, memory, need_weights=False)[0], torch.randn(B, L, 48), FOUR)
    assert ours <= 1.25 * (3 * B * L * 48 + B * L * 48 + B * L * 32)


@pytest.mark.parametrize("kind", ["attn_mask", "key_padding_mask", "both"])
def test_masks_of_modules_stay_whole(kind: str) -> None:
    """Beside -1e9 a level would be far from zero where the mask is zero, and is taken to the power of e."""
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(48, 3, batch_first=True), torch.randn(B, L, 48)
    padding = torch.zeros(B, L).masked_fill(PADDING.view(B, L).logical_not(), -1e9)
    masks = {"attn_mask": FAR, "key_padding_mask": padding} if kind == "both" else {}
    masks = masks or {kind: FAR if kind == "attn_mask" else padding}
    expected, found = (
        run(lambda x: layer(x, x, x, need_weights=False, **masks)[0], x, None, store)
        for store in (None, make_store(FOUR, layer.parameters()))
    )
    for left, right in zip(expected[1:], found[1:], strict=True):
        assert float((left - right).norm()) < 0.2 * float(left.norm())


def test_the_report_counts_plain_training_as_it_is() -> None:
    model, x = Attend(), torch.randn(16, L, H * E)
    expected = measure_saved_bytes(lambda: model(x).square().mean(), model).total
    session = LanceSession(model, LanceConfig(bits=4))
    session.start()
    with session.step():
        loss = model(x).square().mean()
    loss.backward()
    report = session.report
    session.stop()
    assert report is not None
    assert report.compressed is not None
    assert report.plain.total == expected
    assert report.compressed.total < expected / 5


def test_a_step_of_several_threads() -> None:
    """Each backward thread reads results of its own."""
    torch.manual_seed(0)
    models = [Attend() for _ in range(4)]
    x = torch.randn(4, L, H * E)
    alone = [run(model, x, None, make_store(FOUR))[1:] for model in models]
    found: list[Any] = [None] * 4

    def work(place: int) -> None:
        found[place] = run(models[place], x, None, make_store(FOUR))[1:]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for left, right in zip(alone, found, strict=True):
        assert all(map(same_bits, left, right))


def test_the_order_in_which_the_kernel_saves_is_found_out() -> None:
    assert sorted(again._order(False)) == [0, 1, 2]
    assert sorted(again._order(True)) == [0, 1, 2, 3]
    q, k, v = (torch.full((1, 1, 32, 16), value).requires_grad_() for value in (1.0, 2.0, 3.0))
    node = node_of(lambda: F.scaled_dot_product_attention(q * 1, k * 1, v * 1))
    for value, saved in ((1.0, node._saved_query), (2.0, node._saved_key), (3.0, node._saved_value)):
        assert float((saved - value).abs().max()) < 0.1
    assert float((node._saved_output - 3).abs().max()) < 0.1  # of equal keys the mean of the values
