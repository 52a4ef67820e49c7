"""Columns of one's own: earlier experiences do not move, each is evaluated with what it has, and all comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance import LanceConfig, PlanError, StateError, is_swapped
from lightning_lance.continual import ContinualConfig, ContinualSession
from lightning_lance.continual.layers import Reserved
from tests.continual.streams import OPTIMIZERS, Net, Stream, batch
from tests.mutations import same

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::lightning_lance.LanceWarning"),
]


def rows(weight: Tensor, groups: int) -> Tensor:
    return weight.double().reshape(groups, weight.shape[0] // groups, -1)


def products(stream: Stream, bases: dict[str, Tensor]) -> dict[str, Tensor]:
    """``W M`` in float64, for bases ``(groups, K, m)``."""
    return {name: rows(weight, bases[name].shape[0]) @ bases[name] for name, weight in stream.weights().items()}


@pytest.mark.parametrize("options", [{}, {"damping": 0.5}, {"reserved": 12}, {"damping": 0.5, "reserved": 12}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_experience_moves_another(optimizer: str, options: dict[str, Any]) -> None:
    """What an experience's weights make of what was protected after it is the same at the end of the stream."""
    stream = Stream(optimizer, **options)
    found, bases, starts, own = {}, {}, {}, 0
    for experience in range(4):
        starts[experience] = stream.weights() if experience else {}
        stream.learn(experience)
        bases[experience] = {n: m.stored.double() for n, m in stream.session.memories.items()}
        stream.session.select(stream.model, f"task {experience}")
        found[experience] = products(stream, bases[experience])
        own += sum(
            not torch.equal(a, b) for a, b in zip(stream.weights().values(), starts[experience].values(), strict=False)
        )
        stream.session.select(stream.model, None)
    for experience in range(4):
        stream.session.select(stream.model, f"task {experience}")
        for name, before in found[experience].items():
            moved = float((products(stream, bases[experience])[name] - before).norm())
            size = float(
                (
                    rows(stream.weights()[name], before.shape[0])
                    - rows(Net().get_submodule(name).weight.detach(), before.shape[0])
                ).norm()
            )
            assert moved <= 2e-6 * max(size, float(before.norm())), f"{name} of {experience}: {moved:.1e}"
    assert own >= 6
    assert stream.session.rule.bytes > 0


def test_selection_training_and_split_are_those_of_the_formulas() -> None:
    """One linear layer in float64 against matrices that are written out."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    spectra = torch.tensor([[3.0, 2.0, 1.5, 1.0] + [0.01] * 8, [0.5, 3.0, 0.2, 2.5, 1.0, 1.0] + [0.01] * 6])
    inputs = [torch.randn(64, 12, generator=generator, dtype=torch.float64) * s @ basis.T for s in spectra]
    target = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    # Room for two columns of 8 numbers among the 96 of the weight.
    options = ContinualConfig(threshold=0.95, columns=17 / 96, heads=["2"])
    session = ContinualSession(LanceConfig(rank=None, bits=None), options)
    session.begin_experience(model, [lambda: model(inputs[0])], [optimizer], own="a")
    session.end_experience(model, [lambda: model(inputs[0])])
    stored = session.memories["0"].stored[0].double()
    assert session.memories["0"].stored.dtype == torch.float16

    plain = copy.deepcopy(model)
    energy = torch.einsum("kj,nk,nl,lj->j", stored, inputs[1], inputs[1], stored)
    chosen = sorted(energy.topk(2).indices.tolist())
    closed = stored[:, [j for j in range(stored.shape[1]) if j not in chosen]]
    outside = torch.eye(12, dtype=torch.float64) - closed @ torch.linalg.pinv(closed)
    start = plain[0].weight.detach().clone()
    session.begin_experience(model, [lambda: model(inputs[1])], [optimizer], own="b")
    assert session.memories["0"].opened == [chosen]
    for _ in range(3):
        for net in (model, plain):
            net.zero_grad()
            (net(inputs[1]) - target).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            plain[0].weight -= 0.05 * plain[0].weight.grad @ outside
            for parameter in plain[2].parameters():
                parameter -= 0.05 * parameter.grad
    session.end_experience(model, [lambda: model(inputs[1])])

    change = (plain[0].weight - start).detach()
    # The part of the change along all that is stored is the experience's own: solve for its coefficients.
    own = change @ stored @ torch.linalg.pinv(stored)
    assert own.norm() > 1e-3
    torch.testing.assert_close(model[0].weight.detach(), start + change - own, rtol=0, atol=1e-9)
    session.select(model, "b")
    torch.testing.assert_close(model[0].weight.detach(), start + change, rtol=0, atol=5e-3 * float(own.abs().max()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_selecting_comes_back_bit_for_bit_and_an_export_is_a_plain_model(optimizer: str) -> None:
    stream = Stream(optimizer)
    stream.learn(0, 1, 2)
    shared = copy.deepcopy(stream.model.state_dict())
    outputs = {}
    for experience in (2, 0, 1):
        stream.session.select(stream.model, f"task {experience}")
        outputs[experience] = stream.model.eval()(batch(experience)[0], experience).detach()
    assert not same(dict(stream.model.state_dict()), dict(shared))
    stream.session.select(stream.model, None)
    assert same(dict(stream.model.state_dict()), dict(shared))
    for experience, expected in outputs.items():
        exported = stream.session.export(stream.model, f"task {experience}")
        assert type(exported) is Net
        assert not is_swapped(exported)
        assert exported is not stream.model
        assert list(exported.state_dict()) == list(shared)
        assert torch.equal(exported(batch(experience)[0], experience), expected)
    assert same(dict(stream.model.state_dict()), dict(shared))
    with pytest.raises(StateError, match=r"'task 9'.*'task 0', 'task 1', 'task 2'"):
        stream.session.export(stream.model, "task 9")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("body.5.weight", r"body\.5.*'task 1'.*select\(model, None\)"),
        ("body.0.bias", r"body\.0\.bias was changed"),
    ],
)
def test_what_was_changed_under_a_selection_is_not_overwritten(name: str, text: str) -> None:
    stream = Stream()
    stream.learn(0, 1)
    stream.session.select(stream.model, "task 1")
    with torch.no_grad():
        stream.model.get_parameter(name).add_(1.0)
    with pytest.raises(StateError, match=text):
        stream.session.select(stream.model, None)


def test_damped_steps_take_no_second_copy_of_what_is_stored() -> None:
    stream = Stream("adamw")
    stream.learn(0, 1)
    stream.begin(2)
    for name, memory in stream.session.memories.items():
        layer = stream.model.get_submodule(name)
        assert isinstance(layer, Reserved)
        assert 0 < memory.beside <= memory.width / 6 + 0.5
        assert memory.steps is not None
        assert float(memory.steps.min()) < 0.9
        basis = layer.reservation.basis
        assert basis.dtype == torch.float16
        assert basis.shape[2] == max(memory.counts) + memory.beside
        state = memory.state_dict()
        for part in (memory.stored, memory._basis, memory._soft):
            assert part.untyped_storage().data_ptr() == basis.untyped_storage().data_ptr()
        assert state["basis"].shape[2] + state["soft"].shape[2] == basis.shape[2]


@pytest.mark.parametrize("part", ["steps", "wide", "above"])
def test_a_bad_size_of_steps_is_refused(part: str) -> None:
    stream = Stream("adamw")
    stream.learn(0)
    stream.begin(1)
    state = stream.state()
    layers = state["running"]["layers"]
    sizes = layers["body.5"]["steps"]
    layers["body.5"]["steps"] = {"steps": "0.5", "wide": sizes[:, 1:], "above": sizes + 1.0}[part]
    other = Stream("adamw")
    with pytest.raises(StateError, match=r"'body.5'.*'steps'"):
        other.resume(state)
    assert not is_swapped(other.model)


@pytest.mark.parametrize("norm", [None, lambda: nn.BatchNorm2d(6)], ids=["no norm", "a norm"])
def test_a_stream_that_was_stored_with_a_selection_goes_on_alike(norm: Any) -> None:
    one, other = Stream("adamw", norm), Stream("adamw", norm)
    one.learn(0, 1)
    one.session.select(one.model, "task 1")
    other.load(one.state())
    assert other.session.selected == "task 1"
    for own in ("task 0", "task 1"):
        for stream in (one, other):
            stream.session.select(stream.model, own)
        assert same(one.model.state_dict(), other.model.state_dict())
    for stream in (one, other):
        stream.learn(2)
    assert same(one.state(), other.state())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"damping": 0.5}, {"reserved": 12}])
def test_an_evaluation_within_an_experience_sees_the_other_and_leaves_no_trace(
    optimizer: str, options: dict[str, Any]
) -> None:
    runs = []
    for looking in (False, True):
        stream = Stream(optimizer, **options)
        stream.learn(0, 1)
        bases = {n: m.stored.double() for n, m in stream.session.memories.items()}
        expected = products_of(stream.session.export(stream.model, "task 1"), bases)
        stream.begin(2)
        stream.train(2, 0, 3)
        if looking:
            stream.model.eval()
            seen: dict[str, Tensor] = {}
            with torch.no_grad():
                running = stream.model(batch(2)[0], 2)
                stream.session.select(stream.model, "task 1")
                hooks = [stream.model.get_submodule(name).register_forward_hook(see(name, seen)) for name in bases]
                stream.model(batch(1)[0], 1)
                for hook in hooks:
                    hook.remove()
                stream.session.select(stream.model, None)
                assert torch.equal(stream.model(batch(2)[0], 2), running)
            for name, weight in seen.items():
                found = rows(weight, bases[name].shape[0]) @ bases[name]
                assert float((found - expected[name]).norm()) <= 2e-6 * float(expected[name].norm()), name
            stream.model.train()
        stream.train(2, 3, 6)
        stream.end(2)
        runs.append(stream.model.state_dict())
    assert same(dict(runs[0]), dict(runs[1]))


def see(name: str, seen: dict[str, Tensor]) -> Any:
    """A hook that notes the weight that a layer works with."""

    def hook(module: Any, _: Any, __: Any) -> None:
        seen[name] = module_weight(module)

    return hook


def module_weight(module: Any) -> Tensor:
    """The weight that a layer works with."""
    shown = module.reservation.shown if isinstance(module, Reserved) else None
    if shown is None and isinstance(module, Reserved):
        return module.reservation.effective(module.weight)
    return (module.weight if shown is None else shown).detach().clone()


def products_of(model: nn.Module, bases: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: rows(model.get_submodule(name).weight.detach(), b.shape[0]) @ b for name, b in bases.items()}


@pytest.mark.parametrize("again", ["begun again", "abandoned"])
def test_an_experience_that_did_not_end_leaves_nothing_of_its_own_in_what_is_shared(again: str) -> None:
    stream = Stream("adamw")
    stream.learn(0, 1)
    bases = {n: m.stored.double() for n, m in stream.session.memories.items()}
    before = products(stream, bases)
    stream.begin(2)
    stream.train(2)
    if again == "abandoned":
        stream.session.abandon()
    else:
        state = stream.state()
        stream = Stream("adamw")
        stream.load(state)
        stream.begin(2)
        stream.session.abandon()
    for name, found in products(stream, bases).items():
        assert float((found - before[name]).norm()) <= 2e-6 * float(before[name].norm()), name
    stream.learn(2)
    assert "task 2" in stream.session.rule.names


def test_a_name_that_comes_again_keeps_its_columns_and_moves_nothing() -> None:
    stream = Stream("adamw")
    stream.learn(0, 1)
    stream.session.select(stream.model, "task 1")
    bases = {n: m.stored.double() for n, m in stream.session.memories.items()}
    before = products(stream, bases)
    stream.begin(2, own="task 1")
    stream.train(2)
    stream.end(2)
    assert stream.session.rule.names == ["task 0", "task 1"]
    stream.session.select(stream.model, "task 1")
    for name, found in products(stream, bases).items():
        assert float((found - before[name]).norm()) <= 2e-6 * float(before[name].norm()), name


def test_with_columns_more_is_learned_than_without() -> None:
    losses = {}
    for columns in (0.0, 0.1):
        stream = Stream("adamw", columns=columns, threshold=0.999, damping=0.0)
        stream.learn(0, 1, 2)
        stream.begin(3)
        for _ in range(20):
            stream.train(3)
        with torch.no_grad():
            losses[columns] = float(F.cross_entropy(stream.model(batch(3)[0], 3), batch(3)[1]))
    assert losses[0.1] < 0.9 * losses[0.0], losses


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_bases_and_columns_take_two_bytes_a_number(damping: float) -> None:
    stream = Stream(damping=damping)
    stream.learn(0, 1)
    memory = stream.session.memories["body.5"]
    assert memory.stored.dtype == torch.float16
    beside = memory.capacity().bytes - 2 * 150 * sum(memory.counts)
    assert beside <= 8 if damping == 0.0 else beside % (2 * 150 + 8) == 0 < beside < 150 * 2 * 150
    # The span of what is stored is what is protected, and orthonormal where it is used.
    found = memory.protected[0].double()
    assert float((found.T @ found - torch.eye(found.shape[1])).abs().max()) < 1e-6
    raw = memory.stored[0].double()
    assert float((raw - found @ (found.T @ raw)).norm()) < 1e-6 * float(raw.norm())


@pytest.mark.parametrize("options", [{}, {"damping": 0.5}, {"reserved": 12}, {"rule": "scaled"}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("own", [True, False])
def test_weights_that_are_loaded_within_an_experience_are_those_that_the_model_works_with(
    own: bool, optimizer: str, options: dict[str, Any]
) -> None:
    stream = Stream(optimizer, **options)
    for experience in range(3):
        name = None if not own else f"task {experience}"
        before = stream.weights()
        stream.session.begin_experience(stream.model, stream.passes(experience), [stream.optimizer], own=name)
        bases = {n: m.protected.double() for n, m in stream.session.memories.items()}
        stream.train(experience, 0, 3)
        best = copy.deepcopy(stream.model.state_dict())
        expected = stream.model(batch(experience)[0], experience).detach()
        stream.train(experience, 3, 6)
        moved = stream.model(batch(experience)[0], experience).detach()
        stream.model.load_state_dict(best)
        found = stream.model(batch(experience)[0], experience).detach()
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
        assert float((moved - expected).norm()) > 1e-3 * float(expected.norm())
        stream.train(experience, 3, 6)
        stream.end(experience)
        for name, old in before.items() if options.get("rule") != "scaled" else ():
            groups = bases[name].shape[0]
            leak = (rows(stream.model.get_submodule(name).weight.detach(), groups) - rows(old, groups)) @ bases[name]
            assert float(leak.norm()) <= 2e-6 * float(old.norm()), name


class Positioned(nn.Module):
    """A parameter that is no layer's weight, and a large one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(12))
        self.table = nn.Parameter(torch.zeros(40, 12))
        self.body = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(20, 2) for _ in range(2))

    def forward(self, input: Tensor, task: int) -> Tensor:
        hidden = self.body(input + self.positions + self.table.mean(0))
        output: Tensor = self.heads[task](hidden)
        return output


@pytest.mark.parametrize("heads", [["heads"], ["heads", "table"]])
def test_small_parameters_that_no_basis_protects_are_own_and_named_ones_are_free(heads: list[str]) -> None:
    torch.manual_seed(0)
    model = Positioned().double()
    session = ContinualSession(LanceConfig(bits=None), ContinualConfig(heads=heads, columns=1 / 16))
    first = torch.randn(32, 12, dtype=torch.float64) @ torch.diag(torch.linspace(1, 0, 12, dtype=torch.float64) ** 3)
    outputs = torch.tensor(0.0)
    for task in range(2):
        inputs = first.roll(5 * task, 1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        session.begin_experience(model, [lambda x=inputs, t=task: model(x, t)], [optimizer], own=str(task))
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs, task), (inputs[:, 5 * task] > 0).long()).backward()
            optimizer.step()
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert "positions" in moved
        assert ("table" in moved) == (task == 0 or "table" in heads)
        session.end_experience(model, [lambda x=inputs, t=task: model(x, t)])
        if task == 0:
            positions = model.positions.detach().clone()
            outputs = model(inputs, 0).detach()
    assert torch.equal(model.positions, positions)  # what all share is that of the first experience
    session.select(model, "1")
    assert not torch.equal(model.positions, positions)
    session.select(model, "0")
    if "table" not in heads:
        torch.testing.assert_close(model(first, 0), outputs, rtol=0.0, atol=0.2)


def test_a_weight_that_is_named_among_the_heads_is_not_protected() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    session = ContinualSession(options=ContinualConfig(heads=["0.weight", "2"]))
    inputs = torch.randn(16, 6)
    with pytest.raises(PlanError, match="no layer of Sequential can be protected"):
        session.begin_experience(model, [lambda: model(inputs)])
    session = ContinualSession(options=ContinualConfig(heads=["0.weight"]))
    session.begin_experience(model, [lambda: model(inputs)])
    assert set(session.memories) == {"2"}
