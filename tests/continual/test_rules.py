"""The registry and the files agree, and a scaled direction moves as its formula says."""

from __future__ import annotations

import copy
import importlib
import pkgutil

import pytest
import torch
from torch import nn

from lightning_lance import LanceConfig, StateError
from lightning_lance.continual import ContinualConfig, ContinualSession
from lightning_lance.continual.rules import RULES, Rule

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_file_of_a_rule_is_registered() -> None:
    package = importlib.import_module("lightning_lance.continual.rules")
    files = {module.name for module in pkgutil.iter_modules(package.__path__)} - {"rule"}
    assert {rule.__module__.rsplit(".", 1)[1] for rule in RULES.values()} == files
    assert all(issubclass(rule, Rule) for rule in RULES.values())


def test_a_step_of_scaled_projection_is_that_of_the_paper() -> None:
    """``W ← W - lr g (I - M Λ Mᵀ)`` twice in the complement form: the gradient of ``T``, and ``W`` of ``T``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1, 0.1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = LanceConfig(rank=None, bits=None)
    session = ContinualSession(config, ContinualConfig(rule="scaled", threshold=0.98, heads=["2"], freeze_above=1.0))
    session.begin_experience(model, [lambda: model(x)], [optimizer])
    session.end_experience(model, [lambda: model(x)])
    values, vectors = torch.linalg.eigh(x.T @ x)
    values, vectors = values.flip(0).sqrt(), vectors.flip(1)
    count = session.memories["0"].capacity().protected
    assert 1 <= count < 6
    importance = (11 * values / (10 * values + values[0]))[:count].clamp(max=1.0)
    scale = torch.eye(6, dtype=torch.float64) - (vectors[:, :count] * importance) @ vectors[:, :count].T
    plain = copy.deepcopy(model)
    session.begin_experience(model, [lambda: model(x)], [optimizer])
    for net in (model, plain):
        net.zero_grad()
        net(x).square().mean().backward()
    optimizer.step()
    session.end_experience(model, [lambda: model(x)])
    expected = plain[0].weight - 0.1 * plain[0].weight.grad @ scale @ scale
    torch.testing.assert_close(model[0].weight, expected, rtol=0, atol=1e-7)


def test_a_stream_of_another_rule_is_refused() -> None:
    state = ContinualSession(options=ContinualConfig(rule="threshold")).state_dict()
    with pytest.raises(StateError, match=r"is 'threshold'. Allowed: rule='columns'"):
        ContinualSession().load_state_dict(state)
