"""The store: every stretch of memory once, weights whole in any guise, and gradients next to plain training."""

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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_lance import LanceConfig, LanceSession, StateError
from lightning_lance.compression.store import Bits
from tests.oracles import relative_error
from tests.stock import EXACT, kept, make_store, run

FOUR, EIGHT = Bits(4, 4), Bits(8, 8)


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None]).double()


def both(model: nn.Module, call: Callable[[], Tensor], bits: Bits = FOUR, **options: Any) -> tuple[Tensor, Tensor]:
    """Gradients of plain training and of a step in a store, from the same random state and buffers."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    plain = gradients(model, call())
    model.load_state_dict(state)
    store = make_store(bits, [*model.parameters(), *model.buffers()])
    torch.manual_seed(0)
    with store:
        loss = call()
    return plain, gradients(model, loss)


def cosine(left: Tensor, right: Tensor) -> float:
    return float(F.cosine_similarity(left, right, dim=0))


def test_two_who_save_one_tensor_share_one_copy() -> None:
    x = torch.randn(16, 10, 64, requires_grad=True)
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def qkv(x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in layers], -1)

    plain, ours = _kept(qkv, x, layers)
    assert plain == x.nbytes
    assert ours <= x.numel() * 4.5 / 8


def _kept(function: Any, x: Tensor, model: nn.Module, bits: Bits = FOUR) -> tuple[int, int]:
    model.forward = function  # type: ignore[method-assign]
    return kept(model, x, bits)


@pytest.mark.parametrize("view", ["flatten", "transpose", "slices", "expand"])
def test_views_of_one_storage_share_one_copy(view: str) -> None:
    def call(x: Tensor) -> Tensor:
        if view == "flatten":
            return (x.flatten(1) * x.flatten(1)).sum() + (x * x).sum()
        if view == "transpose":
            return (x * x.transpose(0, 1).transpose(0, 1)).sum() + (x.mT * x.mT).sum()
        if view == "slices":
            q, k, v = x.chunk(3, -1)
            return (q * q).sum() + (k * k).sum() + (v * v).sum()
        return (x[:1].expand(32, -1, -1) * x).sum() + (x * x).sum()

    plain, ours = kept(call, torch.randn(32, 12, 96), FOUR)
    assert plain == 32 * 12 * 96 * 4
    assert ours <= plain / 7


def test_what_was_written_in_place_is_another_tensor() -> None:
    """Plain training refuses it; the gradient is that of the value at the time of the call."""
    x = torch.randn(64, 64, requires_grad=True)
    with make_store(EIGHT):
        y = x * 1
        first = y.square()
        y.mul_(-3)
        second = y.square()
    (found,) = torch.autograd.grad((first + second).sum(), x)
    assert float((found - (2 + 18) * x.detach()).abs().max()) < 1.0


class Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(48, 48), layer, nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.first(x)))))


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean(1, True)) / (self.weight.std(1, keepdim=True) + 1e-5)
        return F.linear(x, weight, self.bias)


class LoRA(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.a, self.b = nn.Parameter(torch.randn(8, width) / 7), nn.Parameter(torch.randn(width, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 0.5 * (self.b @ self.a), self.bias)


class Matmul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Joined(nn.Module):
    """Parts of a weight that are joined in every call."""

    def __init__(self, join: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.join, self.parts = join, nn.ParameterList(torch.randn(12, 48) / 7 for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.join(list(self.parts)).T


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(48, 48),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(48, 48)),
    "weight norm, by a hook": lambda: nn.utils.weight_norm(nn.Linear(48, 48)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(48, 48)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(48, 48)),
    "standardised": lambda: Standardised(48, 48),
    "LoRA": lambda: LoRA(48),
    "matmul": lambda: Matmul(48, 48),
    "cat": lambda: Joined(torch.cat),
    "stack": lambda: Joined(lambda parts: torch.stack(parts, 1).flatten(0, 1)),
    "cat of what was computed": lambda: Joined(lambda parts: torch.cat([2 * part.tanh() for part in parts])),
    "qr": lambda: Joined(lambda parts: torch.linalg.qr(torch.cat(parts))[1]),
    "einsum": lambda: Joined(lambda parts: torch.einsum("ak,bk,ck,dk->abcdk", *parts)[:3, :4, :2, :2].flatten(0, 3)),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_stay_whole_in_any_guise(name: str, autocast: bool, frozen: bool) -> None:
    """The input gradient of a layer depends on its weight alone, so that it is exact where that is whole."""
    torch.manual_seed(0)
    layer = WEIGHTS[name]()
    layer.requires_grad_(not frozen)
    x = torch.randn(64, 48, requires_grad=True)
    model = nn.Sequential(layer)
    model.eval()  # spectral norms stay as they are

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(x).float().sum()

    (plain,) = torch.autograd.grad(call(), x)
    store = make_store(FOUR, [*model.parameters(), *model.buffers()])
    with store:
        loss = call()
    (ours,) = torch.autograd.grad(loss, x)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bits", [EXACT, EIGHT, FOUR, Bits(2, 4)])
def test_gradients_next_to_plain_training(name: str, bits: Bits) -> None:
    torch.manual_seed(0)
    model = Plain(WEIGHTS[name]()).eval()
    x = torch.randn(64, 48)
    plain, ours = both(model, lambda: model(x).square().mean(), bits)
    if bits == EXACT:
        assert torch.equal(plain, ours)
    assert cosine(plain, ours) > {EIGHT: 0.9999, FOUR: 0.99, EXACT: 0.999999}.get(bits, 0.9)


def test_row_statistics_stay_whole() -> None:
    q = torch.randn(2, 3, 40, 16, requires_grad=True)
    x = torch.randn(20, 30, 64, requires_grad=True)
    for call, whole in (
        (lambda: F.scaled_dot_product_attention(q + 0, q + 1, q + 2).sum(), 2 * 3 * 40 * 4),
        (lambda: F.layer_norm(x + 0, (64,)).square().sum(), 2 * 20 * 30 * 4),
    ):
        store = make_store(FOUR)
        seen: list[Tensor] = []
        pack = store.pack

        def record(tensor: Tensor, pack: Any = pack, seen: Any = seen) -> Any:
            found = pack(tensor)
            if isinstance(found, Tensor) and found.is_floating_point():
                seen.append(found)
            return found

        store.pack = record  # type: ignore[method-assign]
        with store:
            loss = call()
        assert sum(tensor.nbytes for tensor in seen) >= whole
        del loss


def test_the_gate_of_a_product_stays_whole() -> None:
    x, gate = torch.randn(8, 64, 3, 3, requires_grad=True), torch.rand(8, 64, 1, 1, requires_grad=True)
    store = make_store(FOUR)
    with store:
        loss = ((x + 0) * (gate + 0)).sum()
    (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, gate.detach().expand_as(found))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inputs_of_checkpointed_segments_stay_whole(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 4))
    x = torch.randn(64, 48)

    def call() -> Tensor:
        y = checkpoint(model[:2], x.requires_grad_(), use_reentrant=reentrant)
        y = checkpoint(model[2:4], y, use_reentrant=reentrant)
        return model[4:](y).sum()  # its input is rounded, for the gradient of its own weight alone

    found = []
    for store in (None, make_store(FOUR, model.parameters())):
        model.zero_grad()
        with store or nullcontext():
            loss = call()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    plain, ours = found
    assert all(torch.equal(one, other) for one, other in zip(plain[:4], ours[:4], strict=True))
    assert not torch.equal(plain[4], ours[4])


def test_losses_are_exact_next_to_their_targets() -> None:
    target = torch.randn(64, 48)
    prediction = (target + 1e-3 * torch.randn(64, 48)).requires_grad_()
    for loss in (F.mse_loss, F.smooth_l1_loss, F.l1_loss, F.huber_loss):
        (plain,) = torch.autograd.grad(loss(prediction, target), prediction)
        with make_store(FOUR):
            ours = loss(prediction * 1, target)
        (found,) = torch.autograd.grad(ours, prediction)
        assert torch.equal(plain, found), loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e5, 1e30]),
    seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None)
def test_any_size_and_scale(dtype: torch.dtype, shape: tuple[int, ...], scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    if dtype == torch.float16:
        scale = min(max(scale, 1e-2), 1e2)
    x = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    with make_store(EIGHT):
        y = (x * 1).square()
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = 2 * x.detach()
    assert found.dtype == dtype
    size = float(expected.double().abs().max())
    assert float((found.double() - expected.double()).abs().max()) <= 0.02 * size


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "one of the last axis": lambda x: x[..., 2],
    "every third": lambda x: x[:, ::3],
    "the last ones": lambda x: x[:, 40:],
    "a part of the last axis": lambda x: x[..., :3],
    "transposed": lambda x: x.mT,
    "one of the first axis, transposed": lambda x: x[3].T,
    "expanded": lambda x: x[:1].expand(9, -1, -1),
    "one element expanded": lambda x: x.reshape(-1)[-1:].expand(40_000),
    "a column expanded": lambda x: x[:, :, 1:2].expand(-1, -1, 5),
    "a diagonal": lambda x: x.diagonal(dim1=0, dim2=1),
    "windows": lambda x: x.unfold(1, 5, 2),
}
READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": torch.square,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "silu in place": lambda x: F.silu(x.clone(memory_format=torch.preserve_format), inplace=True),
    "relu": torch.relu,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("view", VIEWS)
def test_any_view_is_kept_as_what_it_is(view: str, reader: str) -> None:
    """By itself, and as the input of a layer, which may be computed from it."""
    base = torch.randn(64, 60, 70, generator=torch.Generator().manual_seed(0))
    width = VIEWS[view](base).shape[-1]
    weight = nn.Parameter(torch.randn(3, width, generator=torch.Generator().manual_seed(1)))
    found = []
    for around in (make_store(Bits(8, 8), [weight]), nullcontext()):
        leaf = base.clone().requires_grad_()
        with around:
            output = F.linear(READERS[reader](VIEWS[view](leaf * 1)), weight)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        found.append(torch.autograd.grad(output, [leaf, weight], gradient))
    for ours, plain in zip(*found, strict=True):
        assert relative_error(ours, plain) < 0.05


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_what_no_range_holds_is_kept_whole(value: float) -> None:
    x = torch.randn(40, 40)
    x[3, 5] = value
    x.requires_grad_()
    with make_store(FOUR):
        y = (x * 1).square()
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(found.nan_to_num(7.0), (2 * x.detach()).nan_to_num(7.0))


def test_gradient_penalty() -> None:
    torch.manual_seed(0)
    for activation in (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus):
        model = nn.Sequential(nn.Linear(32, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 1))
        x = torch.randn(64, 32)

        def call(model: nn.Module = model, x: Tensor = x) -> Tensor:
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            return (slope.norm(dim=1) - 1).square().mean()

        exact, none = both(model, call, EXACT)
        assert torch.equal(exact, none)
        plain, ours = both(model, call, FOUR)
        assert cosine(plain, ours) > 0.98, activation
        plain, ours = both(model, call, EIGHT)
        assert cosine(plain, ours) > 0.999, activation


def test_a_parameter_among_activations_makes_no_weight_of_the_result() -> None:
    query, x = nn.Parameter(torch.randn(8, 64, 32)), torch.randn(8, 64, 32, requires_grad=True)
    calls = {
        "by keyword": lambda: F.scaled_dot_product_attention(query, key=x, value=x),
        "by place": lambda: F.scaled_dot_product_attention(query, x, x),
        "in a list": lambda: (query * 1).index_put((torch.arange(8),), x),
        "einsum": lambda: torch.einsum("abc,abc->abc", query, x),
    }
    for name, call in calls.items():
        plain, ours = kept(lambda _, call=call: call().square().sum(), x, FOUR)
        assert ours < plain / 3, name


def test_several_backward_passes_and_a_step_between() -> None:
    x = torch.randn(64, 64)
    layer = nn.Linear(64, 8)
    session = LanceSession(layer)
    session.start()
    with session.step():
        y = layer(x)
        loss = y.square().mean()
    y.sum().backward(retain_graph=True)
    torch.optim.SGD(layer.parameters(), 0.1).step()
    loss.backward()
    session.stop()


@pytest.mark.filterwarnings("ignore:a transform of torch.func")
def test_transforms_of_torch_func_run_plainly() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    parameters = dict(model.named_parameters())
    x = torch.randn(32, 64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    expected = torch.func.grad(loss)(parameters)
    stock = torch.autograd.graph.disable_saved_tensors_hooks
    store = make_store(FOUR, model.parameters())
    with store:
        before = (model(x) * 1).square().mean()
        found = torch.func.grad(loss)(parameters)
        jacobian = torch.func.vmap(torch.func.grad(lambda row: model(row).square().mean()))(x)
        after = model(x).square().mean()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert jacobian.shape == x.shape
    assert torch.autograd.graph.disable_saved_tensors_hooks is stock
    (before + after).backward()


class Doubled(nn.Linear):
    """Computes its weight from a parameter in every call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def _twice(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.stack([parameter, 2 * parameter]) for name, parameter in parameters.items()}


TRANSFORMS: dict[str, Callable[[Any, dict[str, Tensor], Tensor], Tensor]] = {
    "vmap": lambda f, p, x: torch.func.vmap(f, (None, 0))(p, x[:, None]),
    "vmap of weights": lambda f, p, x: torch.func.vmap(f, (0, None))(_twice(p), x),
    "jvp": lambda f, p, x: torch.func.jvp(lambda x: f(p, x), (x,), (x.cos(),))[1],
    "jacfwd": lambda f, p, x: torch.func.jacfwd(lambda row: f(p, row).square().sum())(x[0]),
    "jacrev": lambda f, p, x: torch.func.jacrev(lambda row: f(p, row).square().sum())(x[0]),
    "hessian": lambda f, p, x: torch.func.hessian(lambda row: f(p, row).square().sum())(x[0]),
}


@pytest.mark.filterwarnings("ignore:a transform of torch.func")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", ["linear", "computed", "convolution"])
def test_what_is_saved_inside_of_a_transform_is_whole(name: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = {"linear": nn.Linear, "computed": Doubled}.get(kind, lambda *_: nn.Conv1d(1, 1, 3, padding=1))
    model = nn.Sequential(
        nn.Linear(48, 48), nn.ReLU(), nn.LayerNorm(48), nn.Unflatten(-1, (1, 48)), layer(48, 48), nn.GELU()
    )
    x = torch.randn(32, 48)

    def outputs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    def gradients(context: Any) -> list[Tensor]:
        with context:
            loss = TRANSFORMS[name](outputs, dict(model.named_parameters()), x).sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))

    plain, ours = gradients(nullcontext()), gradients(make_store(FOUR, model.parameters()))
    assert any(bool(found.any()) for found in plain)
    assert all(torch.equal(one, other) for one, other in zip(plain, ours, strict=True))


@pytest.mark.filterwarnings("ignore:a transform of torch.func")
@pytest.mark.parametrize("how", ["linearize", "make_fx"])
def test_what_a_tracer_writes_down_is_whole(how: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(48)  # keeps its input until the next operator is known, which the tracer sees
    first = nn.Sequential(nn.Linear(48, 48), norm)
    second = nn.Sequential(nn.ReLU(), nn.Linear(48, 48), nn.GELU(), nn.LayerNorm(48), nn.Hardtanh(), nn.Linear(48, 4))
    x, direction = torch.randn(64, 48), torch.randn(64, 48)

    def traced(context: Any) -> tuple[Tensor, list[Tensor]]:
        norm.reset_running_stats()
        with context:
            hidden = first(x)
            if how == "linearize":
                found = torch.func.linearize(second, hidden.detach())[1](direction)
            else:
                found = make_fx(lambda h: torch.autograd.grad(second(h).sum(), h)[0])(hidden.detach().requires_grad_())(
                    direction
                )
            loss = second(hidden).square().mean()
        loss.backward()
        return found, [parameter.grad for parameter in first.parameters()]

    plain, _ = traced(nullcontext())
    store = make_store(FOUR, [*first.parameters(), *second.parameters()])
    for _ in range(2):
        ours, gradients = traced(store)
        assert torch.equal(plain, ours)
        assert all(gradient.isfinite().all() for gradient in gradients)
    with store:
        loss = second(x).square().mean()
    assert store._stretches  # it rounds again
    loss.backward()


def test_nothing_outlives_its_graph() -> None:
    store = make_store(FOUR)
    x = torch.randn(64, 64, requires_grad=True)
    references = []
    for _ in range(3):
        with store:
            y = torch.tanh(torch.sigmoid((x * 1).relu()).exp())
            references.append(weakref.ref(y))
        del y  # no backward pass frees it
        gc.collect()
    assert all(reference() is None for reference in references)
    assert not store._stretches


def test_two_threads_have_steps_of_their_own() -> None:
    models = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(2)]
    sessions = [LanceSession(model, LanceConfig(bits=4)) for model in models]
    barrier, errors = threading.Barrier(2), []

    def train(index: int) -> None:
        try:
            sessions[index].start()
            for _ in range(20):
                barrier.wait()
                with sessions[index].step():
                    loss = models[index](torch.randn(32, 64)).square().mean()
                    barrier.wait()
                loss.backward()
            sessions[index].stop()
        except BaseException as error:  # a thread's error is seen by nobody
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for session in sessions:
        assert session.report is not None
        assert session.report.ratio > 4


def test_a_step_inside_of_a_step_is_an_error() -> None:
    session = LanceSession(nn.Linear(8, 8), LanceConfig())
    with pytest.raises(StateError, match=r"start\(\)"), session.step():
        pass
    session.start()
    with session.step():
        with pytest.raises(StateError, match="inside of a step"):
            session.begin_step()
        other = LanceSession(nn.Linear(8, 8))
        other.start()
        with pytest.raises(StateError, match="inside of another"), other.step():
            pass
    session.stop()
    with pytest.raises(StateError, match="start"):
        session.begin_step()


def test_hooks_of_the_user_win_in_their_block() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    seen: list[Tensor] = []

    def call() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            return model(x).sum()

    x = torch.randn(32, 64)
    plain, ours = both(model, call, FOUR)
    assert torch.equal(plain, ours)
    assert seen


@pytest.mark.parametrize("bits", [EXACT, FOUR])
def test_kept_is_never_above_plain(bits: Bits) -> None:
    for shape in [(2, 4), (64, 64), (3, 300)]:
        for expanded in (False, True):
            x = torch.randn(1, shape[1]).expand(shape) if expanded else torch.randn(shape)
            model = nn.Sequential(nn.Linear(shape[1], 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU6())
            plain, ours = kept(model, x, bits)
            assert ours <= plain


def test_views_of_one_stretch_are_expanded_once_while_the_memory_of_one_lives() -> None:
    x, layer = torch.randn(4, 32, 48), nn.Linear(48, 144)
    store = make_store(FOUR, layer.parameters())
    with store:
        query, key, value = layer(x).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        node: Any = F.scaled_dot_product_attention(query, key, value).grad_fn
    one, other = node._saved_query, node._saved_key
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    torch.testing.assert_close(other, key, rtol=0, atol=0.5)
    kept_values = one.clone()
    del one, other
    gc.collect()
    assert torch.equal(node._saved_query, kept_values)


def test_what_a_norm_reads_is_the_same_each_time_it_is_read() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (torch.randn(4, 8, 16, 16) * torch.linspace(0.1, 9, 8).view(1, 8, 1, 1) + 3).contiguous(
            memory_format=layout
        )
        conv, norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        with make_store(FOUR, [*conv.parameters(), *norm.parameters(), *norm.buffers()]):
            node: Any = norm(conv(x)).grad_fn
        first = node._saved_input
        held = first.clone()
        assert torch.equal(node._saved_input, held)
        assert torch.equal(first, held)


@pytest.mark.parametrize("bits", [FOUR, EIGHT])
def test_chunks_that_share_memory_and_no_version_are_kept_for_themselves(bits: Bits) -> None:
    """What is written on one after the other has not changed when the first is saved."""

    def call(x: Tensor) -> Tensor:
        one, two, three = x.unsafe_chunk(3, -1)
        one, two, three = one.sigmoid_(), two.tanh_(), three.sigmoid_().unsqueeze(0)
        return (one * two * three * three).sum()

    for x in (torch.randn(40, 96), torch.randn(96, 40).mT):
        plain, ours = run(call, x, None)[1], run(call, x, None, make_store(bits))[1]
        assert float((plain - ours).norm()) < (0.1 if bits == FOUR else 0.01) * float(plain.norm())


def test_another_tensor_at_the_same_address_is_not_taken_for_the_first() -> None:
    """Flags of an output that is gone stay flags, whatever is saved later at its place in memory."""
    torch.manual_seed(0)
    store = make_store()
    for _ in range(200):
        x = torch.randn(16, 32).requires_grad_()
        with store:
            y = torch.relu(x * 1)
            address = y.untyped_storage()._cdata
            z = y + 0
            del y
            others = [torch.randn(16, 32) for _ in range(8)]
            products = [other.requires_grad_() * other for other in others]
        z.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, (x > 0).float()), address
        del products


@pytest.mark.parametrize("module", [False, True], ids=["function", "nn.MultiheadAttention"])
def test_peaked_attention(module: bool) -> None:
    """As in pretrained transformers: logits of tens, which the backward kernel takes to the power of e again."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(128, 4, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight[:256] *= 4
    x = torch.randn(8, 49, 128)

    def attend(x: Tensor) -> Tensor:
        if module:
            return layer(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        q, k, v = (part.unflatten(-1, (4, 32)).mT for part in (2 * x, 2 * x.flip(1), x))
        return F.scaled_dot_product_attention(q.mT.transpose(1, 2), k.mT.transpose(1, 2), v.mT.transpose(1, 2))

    grad = torch.randn_like(attend(x))
    expected, found = run(attend, x, grad), run(attend, x, grad, make_store(Bits(4, 4), layer.parameters()))
    assert (found[1] - expected[1]).norm() < 0.2 * expected[1].norm()
