"""Plan, swap, restore on real modules of torch and timm: nothing else changes, and everything comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_lance import LanceConfig, LanceSession, PlanError, StateError, calibrate, is_swapped, plan, restore, swap
from lightning_lance.compression.surgery import compressed_layers
from lightning_lance.layers import registry
from tests.swapped import ready

COMPACT = LanceConfig(rank="compact")


class Block(nn.Module):
    """A module of every kind that has a variant, one used twice, one without a variant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.2)
        self.gate = nn.Bilinear(8, 8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.conv(x))))
        x = self.act(x).mean((2, 3))
        return self.head(self.drop(self.gate(x, x)))


def facts(model: nn.Module) -> dict[str, Any]:
    """Everything that surgery must not change."""
    return {
        "classes": [type(module) for module in model.modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "keys": list(model.state_dict()),
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            (list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks))
            for module in model.modules()
        ],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "text": repr(model),
    }


def assert_equal_facts(one: dict[str, Any], other: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for key in one:
        if key in but:
            continue
        if key == "values":
            assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
        else:
            assert one[key] == other[key], key


# --- plan -------------------------------------------------------------------------------------------------------------


def test_planning_changes_nothing() -> None:
    model = Block()
    before = facts(model)
    made = plan(model, COMPACT)
    assert_equal_facts(before, facts(model))
    assert not is_swapped(model)
    assert [entry.name for entry in made.entries] == ["conv", "head"]
    assert [str(item) for item in made.left] == ["gate (Bilinear): no variant for Bilinear"]


@pytest.mark.parametrize("config", [LanceConfig(), COMPACT])
def test_planning_computes_no_parametrized_weight(config: LanceConfig) -> None:
    """Spectral norm moves its buffers each time that the weight is read in training mode."""
    layers = [nn.Linear(48, 48), parametrizations.spectral_norm(nn.Linear(48, 48)), nn.Linear(48, 4)]
    layers[1].parametrizations.weight.original.requires_grad_(False)
    model = nn.Sequential(*layers)
    before = copy.deepcopy(model.state_dict())
    plan(model, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parameters_of_a_container_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.position = nn.Parameter(torch.zeros(1, 4))
    model.scale = nn.Parameter(torch.ones(4))
    [item] = plan(model, COMPACT).left
    assert str(item) == (
        "the model itself (Sequential): its forward uses parameters of its own beside those of its layers: position"
    )


def test_a_failing_plan_changes_nothing() -> None:
    model = Block()
    before = facts(model)
    with pytest.raises(PlanError):
        swap(model, LanceConfig(layers="nothing.like.it"))
    assert_equal_facts(before, facts(model))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("trainable", ["stem", "body.0", "body.1", "head"]),
        (1, ["head"]),
        (3, ["body.0", "body.1", "head"]),
        (99, ["stem", "body.0", "body.1", "head"]),
        ("body", ["body.0", "body.1"]),
        ("body.*", ["body.0", "body.1"]),
        (["stem", "h*"], ["stem", "head"]),
        (("*",), ["stem", "body.0", "body.1", "head"]),
    ],
)
def test_selection(layers: Any, expected: list[str]) -> None:
    model = nn.ModuleDict(
        {
            "stem": nn.Linear(4, 4),
            "body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            "head": nn.Linear(4, 2),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    made = plan(model, LanceConfig(rank="compact", layers=layers))
    assert [entry.name for entry in made.entries] == expected
    left = {item.name: item.reason for item in made.left}
    assert set(left) == {"stem", "body.0", "body.1", "head"} - set(expected)
    assert all(reason == f"not in layers={layers!r}" for reason in left.values())


def test_rules_by_layer_reach_the_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    swap(model, LanceConfig(rank={"0": {"batch": 3, "channel": 2}, "1": 0.5}))
    ranks = [layer._lance.ranks for layer in compressed_layers(model).values()]
    assert (ranks[0].batch, ranks[0].channel, ranks[1].channel) == (3, 2, 0.5)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"layers": "hed"}, ["layers='hed'", "matches no layer", "There are 2", "head", "shell-style"]),
        ({"layers": ["conv", "block7.*"]}, ["layers='block7.*'", "matches no layer", "conv"]),
        ({"layers": "gate"}, ["layers='gate'", "only what is left alone: gate (Bilinear): no variant for Bilinear"]),
        ({"layers": "norm"}, ["layers='norm'", "matches no layer"]),
        ({"rank": {"haed": 4}}, ["rank['haed']", "matches no layer", "head", "batch, channel, spatial"]),
        ({"rank": {"head": 4, "conv9.*": 0.7}}, ["rank['conv9.*']", "matches no layer"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_near_ones(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        plan(Block(), LanceConfig(**options))
    for part in parts:
        assert part in str(caught.value)


def test_nothing_trainable_names_what_is_supported_and_what_is_frozen() -> None:
    model = Block().requires_grad_(False)
    with pytest.raises(PlanError) as caught:
        plan(model, COMPACT)
    message = str(caught.value)
    assert message.startswith("no layer of Block can be projected")
    for part in ("Conv1d, Conv2d, Conv3d, Linear", "2 supported layers are frozen, such as head", "requires_grad"):
        assert part in message


def test_a_filter_on_frozen_layers_says_that_they_are_frozen() -> None:
    model = Block()
    model.conv.requires_grad_(False)
    with pytest.raises(PlanError, match=r"layers='conv' names only layers whose weight is frozen.*requires_grad"):
        plan(model, LanceConfig(layers="conv"))


def test_no_supported_layer_at_all() -> None:
    with pytest.raises(PlanError, match=r"no layer of Sequential can be projected.*Left alone: 0 \(Bilinear\)"):
        plan(nn.Sequential(nn.Bilinear(2, 2, 2)), COMPACT)
    with pytest.raises(PlanError, match="no layer of Identity can be projected"):
        plan(nn.Identity(), COMPACT)


def test_a_model_that_is_one_layer() -> None:
    layer = nn.Linear(6, 4)
    ready(layer, torch.randn(8, 6), rank={"channel": 2})
    assert is_swapped(layer)
    assert list(compressed_layers(layer)) == [""]
    layer(torch.randn(8, 6)).sum().backward()
    restore(layer)
    assert type(layer) is nn.Linear


# --- swap and restore -------------------------------------------------------------------------------------------------


def test_swap_keeps_everything_but_the_classes() -> None:
    model = Block()
    model.conv.register_forward_hook(lambda *_: None)
    before = facts(model)
    made = swap(model, COMPACT)
    after = facts(model)
    assert_equal_facts(before, after, but=("classes", "attributes", "text"))
    swapped = {name for name, module in model.named_modules() if registry.is_variant(module)}
    assert swapped == {entry.name for entry in made.entries}
    assert isinstance(model.conv, nn.Conv2d)
    assert isinstance(model.head, nn.Linear)
    restore(model)
    assert_equal_facts(before, facts(model))


@pytest.mark.parametrize("calibrated", [True, False])
def test_restore_is_exact_and_idempotent(calibrated: bool) -> None:
    model = Block()
    before = facts(model)
    swap(model, COMPACT)
    if calibrated:
        with calibrate(model):
            model(torch.randn(8, 3, 8, 8))
    for _ in range(3):
        restore(model)
        assert_equal_facts(before, facts(model))
        assert not is_swapped(model)


def test_restore_of_a_model_that_was_never_swapped_does_nothing() -> None:
    model = Block()
    before = facts(model)
    restore(model)
    assert_equal_facts(before, facts(model))


def test_a_second_swap_is_refused() -> None:
    model = Block()
    swap(model, COMPACT)
    with pytest.raises(StateError, match=r"swapped already\. Call restore\(model\) first"):
        swap(model, COMPACT)


def test_a_plan_of_another_model_is_refused() -> None:
    model, other = Block(), Block()
    with pytest.raises(StateError, match="another model"):
        swap(model, plan(other, COMPACT))
    assert not is_swapped(other)
    assert not is_swapped(model)


def test_hooks_fire_and_see_the_same_values() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    ready(model, torch.randn(16, 6), rank=2)
    seen.clear()
    model(torch.randn(16, 6, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"]


def test_a_shared_module_is_one_layer_under_all_its_names() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first
            self.listed = [self.first]

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Shared()
    ready(model, torch.randn(16, 6), rank=3)
    assert model.first is model.second is model.listed[0]
    assert list(compressed_layers(model)) == ["first"]
    assert registry.is_variant(model.listed[0])
    model(torch.randn(16, 6)).sum().backward()
    restore(model)
    assert type(model.listed[0]) is nn.Linear


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.embedding(index))

    model = Tied()
    index = torch.randint(0, 10, (16, 5))
    plain = copy.deepcopy(model)
    ready(model, index, rank=10**6, bits=None)
    assert model.head.weight is model.embedding.weight
    for one in (model, plain):
        one(index).square().sum().backward()
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)


def test_the_optimiser_goes_on_with_the_same_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    ready(model, torch.randn(8, 6), rank=10**6)
    optimizer.zero_grad()
    before = model[0].weight.detach().clone()
    model(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert not torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], state)


def test_a_shallow_copy_and_a_later_load_state_dict() -> None:
    model = ready(nn.Sequential(nn.Linear(6, 4)), torch.randn(8, 6), rank=2)
    shallow = copy.copy(model[0])
    assert shallow.weight is model[0].weight
    assert type(shallow) is nn.Linear
    fresh = nn.Sequential(nn.Linear(6, 4))
    model.load_state_dict(fresh.state_dict())
    assert torch.equal(model[0].weight, fresh[0].weight)
    fresh.load_state_dict(model.state_dict())


def test_moving_and_casting_a_swapped_model() -> None:
    model = ready(nn.Sequential(nn.Linear(6, 4)), torch.randn(16, 6), rank=2)
    model.double()
    model(torch.randn(16, 6).double()).sum().backward()
    assert model[0].weight.grad.dtype == torch.float64
    model.to("meta")
    assert model[0].weight.device.type == "meta"


# --- modules that are left alone --------------------------------------------------------------------------------------


def patched_linear() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def patched_conv() -> nn.Module:
    layer = nn.Conv2d(6, 6, 1)
    layer._conv_forward = lambda x, w, b: x  # type: ignore[method-assign]
    return layer


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias) + 1


class SameForward(nn.Linear):
    """A subclass that adds nothing to the forward."""

    note = "mine"


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "instance forward": (patched_linear, "forward was replaced on the instance"),
    "instance _conv_forward": (patched_conv, "forward was replaced on the instance"),
    "own forward": (lambda: OwnForward(6, 6), "OwnForward"),
    "own _conv_forward": (lambda: OwnConvForward(6, 6, 1), "OwnConvForward"),
    "timm Conv2dSame": (lambda: timm.layers.Conv2dSame(6, 6, 3), "Conv2dSame"),
    "timm ScaledStdConv2d": (lambda: timm.layers.ScaledStdConv2d(6, 6, 3), "ScaledStdConv2d"),
    "timm Linear": (lambda: timm.layers.Linear(6, 6), "Linear"),
    "timm MixedConv": (lambda: timm.layers.CondConv2d(6, 6, 3), "CondConv2d"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), "parametrized"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)), "parametrized"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 6)), "parametrized"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), "torch.nn.utils hook"),
    "prune": (lambda: prune.random_unstructured(nn.Linear(6, 6), "weight", 0.5), "torch.nn.utils hook"),
    "lazy": (lambda: nn.LazyLinear(6), "lazy"),
    "lazy conv": (lambda: nn.LazyConv2d(6, 3), "lazy"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 6, 3), "no variant for ConvTranspose2d"),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_modules_with_a_life_of_their_own_are_left_alone_with_the_reason(kind: str) -> None:
    make, reason = LEFT_ALONE[kind]
    odd = make()
    before = type(odd)
    model = nn.ModuleList([nn.Linear(6, 6), odd])
    made = swap(model, COMPACT)
    assert [entry.name for entry in made.entries] == ["0"]
    (left,) = made.left
    assert left.name == "1"
    assert reason in str(left)
    assert type(odd) is before
    restore(model)
    assert type(odd) is before


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_old_weight_norm_is_left_alone() -> None:
    odd = nn.utils.weight_norm(nn.Linear(6, 6))
    made = plan(nn.ModuleList([nn.Linear(6, 6), odd]), COMPACT)
    assert [entry.name for entry in made.entries] == ["0"]
    assert "torch.nn.utils hook" in str(made.left[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_scripted_and_traced_modules_are_left_alone() -> None:
    scripted = torch.jit.script(nn.Linear(6, 6))
    traced = torch.jit.trace(nn.Linear(6, 6), torch.randn(2, 6))
    model = nn.ModuleList([nn.Linear(6, 6), scripted, traced])
    made = swap(model, COMPACT)
    assert [entry.name for entry in made.entries] == ["0"]
    assert [item.name for item in made.left] == ["1", "2"]
    scripted(torch.randn(4, 6)).sum().backward()
    traced(torch.randn(4, 6)).sum().backward()
    restore(model)


def test_norm_layers_with_a_forward_of_their_own_are_left_alone() -> None:
    for odd in (timm.layers.BatchNormAct2d(6), timm.layers.LayerNorm2d(6), timm.layers.FrozenBatchNormAct2d(6)):
        before = type(odd)
        model = nn.Sequential(nn.Conv2d(6, 6, 1), odd).eval()
        swap(model, COMPACT)
        assert type(odd) is before
        restore(model)
        assert type(odd) is before


def test_a_subclass_that_keeps_the_stock_forward_is_swapped() -> None:
    model = nn.Sequential(SameForward(6, 6))
    ready(model, torch.randn(8, 6), rank=2)
    assert isinstance(model[0], SameForward)
    assert model[0].note == "mine"
    restore(model)
    assert type(model[0]) is SameForward


def test_an_initialised_lazy_module_is_swapped() -> None:
    model = nn.Sequential(nn.LazyLinear(6))
    model(torch.randn(4, 3))
    assert [entry.name for entry in plan(model, COMPACT).entries] == ["0"]


def test_attention_is_trained_but_its_projection_that_is_never_called_is_swapped_back() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model = Attending()
    projection = type(model.attention.out_proj)
    made = swap(model, COMPACT)
    assert {entry.name for entry in made.entries} == {"attention.out_proj", "head"}
    with calibrate(model) as calibration:
        model(torch.randn(8, 5, 8))
    assert type(model.attention.out_proj) is projection
    assert list(compressed_layers(model)) == ["head"]
    (left,) = calibration.left
    assert (left.name, left.type) == ("attention.out_proj", projection.__name__)
    assert "never saw" in left.reason
    model(torch.randn(8, 5, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_compiled_model_is_swapped_through_its_wrapper() -> None:
    torch._dynamo.reset()
    inner = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model: Any = torch.compile(inner, backend="eager")
    swap(model, COMPACT)
    assert is_swapped(inner)
    restore(model)
    assert [type(module) for module in inner] == [nn.Linear, nn.Linear]


# --- other tools on top of a swapped module ---------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_parametrization_put_on_top_survives_the_restore(calibrated: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    swap(model, LanceConfig(rank=10**6))
    if calibrated:
        with calibrate(model):
            model(torch.randn(8, 6))
    parametrize.register_parametrization(model[0], "weight", Halved())
    input = torch.randn(8, 6)
    expected = nn.functional.linear(input, model[0].parametrizations.weight.original / 2, model[0].bias)
    torch.testing.assert_close(model[0](input), expected)
    model(input).sum().backward()
    assert model[0].parametrizations.weight.original.grad is not None
    restore(model)
    assert not is_swapped(model)
    torch.testing.assert_close(model[0](input), expected)
    assert parametrize.is_parametrized(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0](input), expected)


def test_a_parametrization_removed_again_leaves_the_swapped_class() -> None:
    model = ready(nn.Sequential(nn.Linear(6, 4)), torch.randn(8, 6), rank=2)
    swapped = type(model[0])
    parametrize.register_parametrization(model[0], "weight", Halved())
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is swapped
    restore(model)
    assert type(model[0]) is nn.Linear


def test_a_class_put_in_front_as_fully_shard_does_survives_the_restore() -> None:
    class Sharded:
        def reshard(self) -> str:
            return "resharded"

    model = ready(nn.Sequential(nn.Linear(6, 4)), torch.randn(8, 6), rank=2)
    layer = model[0]
    layer.__class__ = type(f"FSDP{type(layer).__name__}", (Sharded, type(layer)), {})
    assert is_swapped(model)
    layer(torch.randn(8, 6)).sum().backward()
    restore(model)
    assert not is_swapped(model)
    assert layer.reshard() == "resharded"
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "FSDPLinear"
    layer(torch.randn(8, 6)).sum().backward()


def test_a_class_in_front_of_a_stock_module_is_kept() -> None:
    class Sharded:
        def reshard(self) -> str:
            return "resharded"

    layer = nn.Linear(6, 4)
    sharded: Any = type("FSDPLinear", (Sharded, nn.Linear), {})
    layer.__class__ = sharded
    model = ready(nn.Sequential(layer), torch.randn(8, 6), rank=2)
    assert is_swapped(model)
    assert layer.reshard() == "resharded"  # type: ignore[operator]
    restore(model)
    assert type(layer) is sharded


def test_variant_classes_are_made_once() -> None:
    first, second = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(3, 2))
    for model in (first, second):
        swap(model, COMPACT)
    assert type(first[0]) is type(second[0])
    assert type(first[0]).__name__ == "LanceLinear"


def test_a_failure_in_the_middle_of_a_swap_restores_what_was_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block()
    before = facts(model)
    made = plan(model, COMPACT)
    install = registry.install
    calls: list[nn.Module] = []

    def failing(module: nn.Module, variant: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError
        install(module, variant)

    monkeypatch.setattr(registry, "install", failing)
    with pytest.raises(MemoryError):
        swap(model, made)
    assert_equal_facts(before, facts(model))


def test_a_session_restores_a_model_that_was_left_swapped() -> None:
    model = Block()
    before = facts(model)
    swap(model, COMPACT)
    session = LanceSession(model)
    session.start()
    session.stop()
    assert_equal_facts(before, facts(model))
