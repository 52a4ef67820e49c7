"""Transforms of torch.func through layers that protect: their gradients have no part in what is protected either."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lance.continual import ContinualConfig, ContinualSession
from tests.continual.streams import EVERY_OPTIMIZER, EXACT
from tests.oracles import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a transform of torch.func ran")
        yield


def network(padding_mode: str = "zeros", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, padding_mode=padding_mode), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 96), nn.ReLU(), nn.Linear(96, 3),
    ).to(dtype)  # fmt: skip


def images(experience: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Few latent directions, other ones in each experience."""
    generator = torch.Generator().manual_seed(100 + experience)
    latent, planes = torch.randn(16, 2, generator=generator), torch.randn(2, 4, 1, 1, generator=generator)
    noise = torch.randn(16, 4, 8, 8, generator=generator)
    return (torch.einsum("bk,kcxy->bcxy", latent, planes) + 0.1 * noise).to(dtype)


def second_experience(model: nn.Module, optimizer: str, dtype: torch.dtype, **options: Any) -> ContinualSession:
    options = {"heads": ["8"], "threshold": 0.8, "warn_above": 1.0, "freeze_above": 1.0, **options}
    session = ContinualSession(EXACT, ContinualConfig(**options))
    for experience in range(2):
        x = images(experience, dtype)
        stepping = EVERY_OPTIMIZER[optimizer](model.parameters())
        session.begin_experience(model, [lambda x=x: model(x)], [stepping])
        if experience == 0:
            for _ in range(3):
                stepping.zero_grad()
                with session.step():
                    loss = model(x).square().mean()
                loss.backward()
                stepping.step()
            session.end_experience(model, [lambda x=x: model(x)])
    return session


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_gradients_are_those_of_a_backward_pass(padding_mode: str, optimizer: str, dtype: torch.dtype) -> None:
    model = network(padding_mode, dtype)
    session = second_experience(model, optimizer, dtype)
    x = images(1, dtype)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    with session.step():
        found = torch.func.grad(loss)(parameters, x)
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
        value, slope = torch.func.jvp(lambda x: loss(parameters, x), (x,), (x,))
        ours = model(x).square().mean()
    model.zero_grad()
    ours.backward()
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(value, ours.detach(), rtol=0, atol=0)
    directional = torch.autograd.grad(model(x.requires_grad_()).square().mean(), x)[0]
    assert relative_error(slope, (directional * x.detach()).sum()) < tolerance
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}  # biases are frozen
    assert trained.keys() >= {"0.weight", "6.weight", "8.weight", "8.bias"}
    for name, parameter in trained.items():
        assert relative_error(found[name], parameter.grad) < tolerance, name
        assert relative_error(each[name].mean(0), parameter.grad) < tolerance, name
    twin = network(padding_mode, dtype)
    plain = torch.func.grad(lambda p: torch.func.functional_call(twin, p, (x.detach(),)).square().mean())(parameters)
    for name in ("0.weight", "6.weight"):  # what is protected is left out
        assert relative_error(plain[name], found[name]) > 0.01


def test_autocast_does_not_round_what_is_left_out() -> None:
    model = network()
    session = second_experience(model, "sgd", torch.float32)
    x = images(1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.functional_call(model, parameters, (x,)).float().square().mean()

    with session.step(), torch.autocast("cpu", torch.bfloat16):
        found = torch.func.grad(loss)(parameters)
    for name in ("0", "6"):
        basis = session.memories[name].protected[0].double()
        rows = found[f"{name}.weight"].flatten(1).double()
        assert basis.shape[0] == rows.shape[1]
        assert float((rows @ basis).norm() / rows.norm()) < 1e-5


@pytest.mark.parametrize("reserved", [0.9, 4])
def test_a_smaller_parameter_is_differentiated_too(reserved: Any) -> None:
    model = network()
    session = second_experience(model, "sgd", torch.float32, reserved=reserved)
    x = images(1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with session.step():
        value, slope = torch.func.jvp(lambda x: model(x).square().mean(), (x,), (x,))
        ours = model(x).square().mean()
        found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().mean())(parameters)
    assert value == ours
    assert not found["0.weight"].any()  # what is trained is smaller, and no parameter of the module
    h = 1e-3
    with torch.no_grad():
        difference = (model(x * (1 + h)).square().mean() - model(x * (1 - h)).square().mean()) / (2 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-2, atol=1e-4)
