"""Streams of experiences with real optimisers: what must not move does not, and everything comes back."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance import (
    CalibrationError,
    ConfigError,
    LanceConfig,
    LanceWarning,
    PlanError,
    StateError,
    is_swapped,
    measure_saved_bytes,
)
from lightning_lance.continual import ContinualConfig, ContinualSession, Stage, basis
from lightning_lance.continual.config import AUTO_DAMPING
from lightning_lance.continual.layers import Reserved, reserved_variant
from lightning_lance.tensors.linalg import symmetric_eigh
from tests.continual.streams import EVERY_OPTIMIZER, EXACT
from tests.oracles import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 32),
        nn.ReLU(),
        nn.Linear(32, 3),
    )


def data(experience: int, size: int = 48) -> tuple[Tensor, Tensor]:
    """Few latent directions, other ones in each experience."""
    generator = torch.Generator().manual_seed(100 + experience)
    latent = torch.randn(size, 3, generator=generator)
    planes = torch.randn(3, 6, 8, 8, generator=generator)
    return torch.einsum("bk,kcxy->bcxy", latent, planes), latent.argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, experience: int, steps: int = 8) -> None:
    inputs, targets = data(experience)
    for step in range(steps):
        part = slice(16 * (step % 3), 16 * (step % 3) + 16)

        def closure(part: slice = part) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[part]), targets[part])
            loss.backward()
            return float(loss)

        optimizer.step(closure)


def stream(threshold: float = 0.8, config: LanceConfig | None = None, **options: Any) -> ContinualSession:
    options.setdefault("heads", ["8"])
    return ContinualSession(config, ContinualConfig(threshold=threshold, warn_above=1.0, **options))


def begin(session: ContinualSession, model: nn.Module, optimizer: Any, experience: int) -> None:
    session.begin_experience(model, [lambda: model(data(experience)[0])], [optimizer])


def end(session: ContinualSession, model: nn.Module, experience: int) -> None:
    session.end_experience(model, [lambda: model(data(experience)[0])])


def run(
    session: ContinualSession, model: nn.Module, optimizer: torch.optim.Optimizer, experiences: range | list[int]
) -> None:
    for experience in experiences:
        begin(session, model, optimizer, experience)
        train(model, optimizer, experience)
        end(session, model, experience)


def learned(
    optimizer: str, config: LanceConfig | None = None, **options: Any
) -> tuple[nn.Sequential, torch.optim.Optimizer, ContinualSession]:
    """A network, its optimiser and its session after a first experience."""
    model, session = network(), stream(config=config, **options)
    steps = EVERY_OPTIMIZER[optimizer](model.parameters())
    run(session, model, steps, [0])
    return model, steps, session


def learn_batch(
    session: ContinualSession,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    steps: int = 1,
    last: Tensor | None = None,
) -> None:
    """An experience of one batch, at whose end another one is seen where one is given."""
    session.begin_experience(model, [lambda: model(x)], [optimizer])
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    session.end_experience(model, [lambda: model(x if last is None else last)])


def side(module: nn.Module, session: ContinualSession) -> Any:
    variant = reserved_variant(module)
    assert variant is not None
    return variant.side(module, session.options.feature_side == "patch")[0]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Converting a tensor with requires_grad.*")
        yield


@pytest.mark.parametrize("feature_side", ["patch", "channel"])
@pytest.mark.parametrize("reserved", ["full", 4, 0.9])
@pytest.mark.parametrize("name", [*EVERY_OPTIMIZER, "lbfgs"])
def test_no_optimiser_moves_what_is_protected(name: str, reserved: Any, feature_side: Any) -> None:
    model = network()
    made = {**EVERY_OPTIMIZER, "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)}
    optimizer = made[name](model.parameters())
    # Few channels are soon full, which would leave nothing to test.
    session = stream(0.8 if feature_side == "patch" else 0.4, reserved=reserved, feature_side=feature_side)
    run(session, model, optimizer, [0])
    for experience in (1, 2):
        before = {name: model.get_submodule(name).weight.detach().clone() for name in session.memories}
        protected = {name: memory.protected.clone() for name, memory in session.memories.items()}
        probes = {name: probe(model.get_submodule(name), protected[name], session) for name in before}
        begin(session, model, optimizer, experience)
        train(model, optimizer, experience)
        head = model[8].weight.detach().clone()
        end(session, model, experience)
        assert torch.equal(model[8].weight, head)
        moved = 0
        for layer, old in before.items():
            module = model.get_submodule(layer)
            view = side(module, session)
            change = (view.rows(module.weight.detach()) - view.rows(old)).double()
            leak, size = float((change @ protected[layer].double()).norm()), float(change.norm())
            rounded = 2e-7 * float(old.norm())  # by steps that end in float32
            assert leak <= 1e-5 * size + rounded, f"{layer}: {leak / size:.1e}"
            moved += size > 1e-3 * float(old.norm())
            inputs, outputs = probes[layer]
            assert relative_error(apply(module, inputs, view), outputs) < 1e-4
        assert moved >= 2


def probe(module: Any, protected: Tensor, session: ContinualSession) -> tuple[Tensor, Tensor]:
    """Feature vectors in the span of what is protected, and what the layer makes of them."""
    groups, _, count = protected.shape
    inputs = torch.randn(groups, 5, count) @ protected.mT
    return inputs, apply(module, inputs, side(module, session))


def apply(module: Any, inputs: Tensor, view: Any) -> Tensor:
    return inputs @ view.rows(module.weight.detach()).mT


def test_outputs_for_protected_inputs_stay_through_the_whole_network() -> None:
    """All of a first experience is protected, and the second one learned: biases, norms and statistics included."""
    model = network()
    optimizer = EVERY_OPTIMIZER["adamw"](model.parameters())
    session = stream(threshold=1.0)
    flat = data(0)[0].mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)  # few different patches: not all are taken
    session.begin_experience(model, [lambda: model(flat)], [optimizer])
    train(model, optimizer, 0)
    session.end_experience(model, [lambda: model(flat)])
    body, other = model[:8].eval(), data(1)[0]
    before, before_other = body(flat).detach(), body(other).detach()
    begin(session, model, optimizer, 1)
    model.train()
    train(model, optimizer, 1)
    end(session, model, 1)
    model.eval()
    # Statistics in float32 miss directions of less than 1e-7 of the energy, through three layers.
    assert relative_error(body(flat).detach(), before) < 3e-4
    assert relative_error(body(other).detach(), before_other) > 0.02


@pytest.mark.parametrize("reserved", ["full", 5])
def test_shared_parameters_and_statistics_are_frozen_and_flags_come_back(reserved: Any) -> None:
    model, optimizer, session = learned("adamw", reserved=reserved)
    before = snapshot(model)
    ids, groups = [id(p) for p in model.parameters()], [list(map(id, g["params"])) for g in optimizer.param_groups]
    keys = list(model.state_dict())
    begin(session, model, optimizer, 1)
    assert list(model.state_dict()) == keys
    model.train()  # as trainers do
    train(model, optimizer, 1)
    assert model[0].bias.grad is None
    end(session, model, 1)
    after = model.state_dict()
    for key in before:
        free = key.startswith("8.") or (key.endswith("weight") and key != "1.weight")
        assert torch.equal(before[key], after[key]) != free, key
    assert ids == [id(p) for p in model.parameters()]
    assert groups == [list(map(id, g["params"])) for g in optimizer.param_groups]
    assert set(map(id, optimizer.state)) <= set(ids)
    assert all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model] == [type(m) for m in network()]
    assert not any(m._forward_pre_hooks or m._forward_hooks or "_lance" in m.__dict__ for m in model.modules())
    assert all(m.training for m in model.modules())


def test_a_truncated_reservation_trains_and_remembers_little() -> None:
    model, optimizer, session = learned("adam", reserved=5)
    begin(session, model, optimizer, 1)
    train(model, optimizer, 1, 1)
    assert not model[6].weight.requires_grad
    shapes = [tuple(p.shape) for p in optimizer.param_groups[0]["params"] if p.requires_grad]
    assert shapes == [(8, 5), (12, 5), (32, 5), (3, 32), (3,)]
    for state in (optimizer.state[p] for p in optimizer.param_groups[0]["params"] if p.requires_grad):
        assert state["exp_avg"].shape in shapes
    assert model[6].weight not in optimizer.state


def test_a_truncated_reservation_without_its_optimiser_is_refused() -> None:
    model, optimizer, session = learned("sgd", reserved=5)
    with pytest.raises(StateError, match=r"0: no optimiser.*optimizers="):
        session.begin_experience(model, [lambda: model(data(1)[0])])
    assert not session.running
    assert not is_swapped(model)
    assert all(p.requires_grad for p in model.parameters())
    run(session, model, optimizer, [1])


def test_a_step_of_gradient_descent_is_the_projected_one() -> None:
    """Without compression: W ← W - lr g (I - M Mᵀ), which is GPM."""
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = stream(config=EXACT)

    def inputs(experience: int) -> Tensor:
        return data(experience)[0].double()

    session.begin_experience(model, [lambda: model(inputs(0))], [optimizer])
    session.end_experience(model, [lambda: model(inputs(0))])
    stock = copy.deepcopy(model)
    stock[1].eval()
    session.begin_experience(model, [lambda: model(inputs(1))], [optimizer])
    for net in (model, stock):
        F.cross_entropy(net(inputs(1)), data(1)[1]).backward()
    optimizer.step()
    session.end_experience(model, [lambda: model(inputs(0))])
    for name in ("0", "3", "6"):
        module, plain = model.get_submodule(name), stock.get_submodule(name)
        view, protected = side(module, session), session.memories[name].protected
        kept = protected[..., : max(session.memories[name].counts)]
        gradient = view.rows(plain.weight.grad)
        # end_experience saw experience 0 again: nothing was added, so this is the basis that training had.
        expected = view.rows(plain.weight) - 0.1 * (gradient - gradient @ kept @ kept.mT)
        assert relative_error(view.rows(module.weight).detach(), expected.detach()) < 1e-10


@pytest.mark.parametrize("reserved", ["full", 5])
def test_state_dict_in_training_is_the_model_that_runs(reserved: Any) -> None:
    runs = []
    for saving in (False, True):
        torch.manual_seed(0)
        model, optimizer, session = learned("adamw", reserved=reserved)
        begin(session, model, optimizer, 1)
        train(model, optimizer, 1, 4)
        if saving:
            stock = network()
            stock.load_state_dict(model.state_dict())
            model.eval()
            with torch.no_grad():  # so that no sample order is drawn
                assert relative_error(stock.eval()(data(1)[0]), model(data(1)[0])) < 1e-5
            model.train()
        train(model, optimizer, 1, 4)
        end(session, model, 1)
        runs.append(snapshot(model))
    for key, value in runs[0].items():
        if value.is_floating_point():
            assert relative_error(runs[1][key], value) < 1e-5


def test_damping_follows_the_optimiser_unless_it_is_given() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    adam = torch.optim.Adam(parameters)
    options = ContinualConfig()
    assert options.damping_of([]) == options.damping_of([sgd, sgd]) == 0.0
    assert options.damping_of([adam]) == options.damping_of([sgd, adam]) == AUTO_DAMPING > 0.0
    assert ContinualConfig(damping=0.5).damping_of([sgd]) == ContinualConfig(damping=0.5).damping_of([adam]) == 0.5


class Shared(nn.Module):
    """Two experiences whose inputs share directions with little energy of the first one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(12, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("whole", [False, True])
def test_damped_steps_move_what_the_threshold_leaves_out_less(whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    spectra = torch.ones(2, 12)
    spectra[0, 4:8], spectra[0, 8:] = 0.15, 0.0  # under the threshold, and nothing at all
    spectra[1, :4], spectra[1, 4:8] = 0.0, 0.05
    inputs = [torch.randn(64, 12, generator=generator) * spectrum for spectrum in spectra]
    targets = torch.randint(2, (64,), generator=generator)
    drift, learned = {}, {}
    for damping in (0.0, 1.5):
        model = Shared()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        session = ContinualSession(
            LanceConfig(rank="full"), ContinualConfig(threshold=0.9, heads=["head"], damping=damping)
        )
        for x in inputs:
            before = model.body(inputs[0]).detach()
            start = F.cross_entropy(model(x), targets).item()
            session.begin_experience(model, [lambda x=x, model=model: model(x)], [optimizer], whole=whole)
            for _ in range(30):
                optimizer.zero_grad()
                F.cross_entropy(model(x), targets).backward()
                optimizer.step()
            session.end_experience(model, [lambda x=x, model=model: model(x)])
        drift[damping] = relative_error(model.body(inputs[0]).detach(), before)
        learned[damping] = start - F.cross_entropy(model(inputs[1]), targets).item()
    assert drift[1.5] < 0.5 * drift[0.0]
    assert learned[1.5] > 0.7 * learned[0.0] > 0.0


@pytest.mark.parametrize("reserved", ["full", 5])
def test_restoring_or_copying_in_training_keeps_what_was_learned(reserved: Any) -> None:
    model, optimizer, session = learned("adamw", reserved=reserved)
    begin(session, model, optimizer, 1)
    train(model, optimizer, 1)
    inputs = data(1)[0]
    model.eval()
    expected = model(inputs).detach()
    twin = copy.deepcopy(model)
    assert type(twin[0]) is nn.Conv2d
    assert relative_error(twin(inputs).detach(), expected) < 1e-5
    assert isinstance(model[0], Reserved)


def test_an_abandoned_experience_keeps_the_promise_and_the_bases() -> None:
    model, optimizer, session = learned("adamw")
    protected = session.memories["6"].protected.clone()
    before = model[6].weight.detach().clone()
    begin(session, model, optimizer, 1)
    train(model, optimizer, 1)
    session.abandon()
    session.abandon()
    change = (model[6].weight.detach() - before).double()
    assert float((change @ protected[0].double()).norm()) < 1e-5 * float(change.norm())
    assert torch.equal(session.memories["6"].protected, protected)
    assert session.experience == 1
    assert not is_swapped(model)
    assert all(p.requires_grad for p in model.parameters())
    run(session, model, optimizer, [1])
    assert session.experience == 2


def test_failures_at_either_end_restore_the_model() -> None:
    model = network()
    optimizer = EVERY_OPTIMIZER["sgd"](model.parameters())
    session = stream()
    bad = torch.full((8, 6, 8, 8), float("nan"))
    begin(session, model, optimizer, 0)
    with pytest.raises(CalibrationError, match="0 received NaN or Inf"):
        session.end_experience(model, [lambda: model(bad)])
    assert not is_swapped(model)
    assert not session.running
    assert session.experience == 0
    begin(session, model, optimizer, 0)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|size"):
        session.end_experience(model, [lambda: model(torch.randn(4, 6, 20, 20))])
    assert not is_swapped(model)
    run(session, model, optimizer, [0, 1])
    assert session.experience == 2


def test_steps_out_of_order_are_refused() -> None:
    model, session = network(), stream()
    with pytest.raises(StateError, match="without begin_experience"):
        session.end_experience(model, [])
    begin(session, model, None, 0)
    with pytest.raises(StateError, match="while one is running"):
        begin(session, model, None, 0)
    with pytest.raises(StateError, match="another model"):
        session.end_experience(network(), [])
    with pytest.raises(StateError, match="while an experience is running"):
        session.load_state_dict(session.state_dict())
    end(session, model, 0)


def test_saving_between_experiences_and_going_on_is_the_uninterrupted_run() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, ContinualSession]:
        torch.manual_seed(0)
        model = network()
        return model, EVERY_OPTIMIZER["adam"](model.parameters()), stream()

    model, optimizer, session = start()
    run(session, model, optimizer, [0, 1])
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), session.state_dict()], buffer)
    run(session, model, optimizer, [2])
    buffer.seek(0)
    weights, steps, bases = torch.load(buffer, weights_only=True)
    other, resumed_optimizer, resumed = start()
    other.load_state_dict(weights)
    resumed_optimizer.load_state_dict(steps)
    resumed.load_state_dict(bases)
    run(resumed, other, resumed_optimizer, [2])
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    for name, memory in session.memories.items():
        assert torch.equal(memory.protected, resumed.memories[name].protected)
    assert resumed.experience == 3


def test_saving_in_an_experience_and_beginning_it_again() -> None:
    model, optimizer, session = learned("adam")
    begin(session, model, optimizer, 1)
    train(model, optimizer, 1, 4)
    weights, state = snapshot(model), session.state_dict()
    other, resumed = network(), stream()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert all(memory.stage is Stage.CONSOLIDATED for memory in resumed.memories.values())
    run(resumed, other, EVERY_OPTIMIZER["adam"](other.parameters()), [1])
    assert resumed.experience == 2


def test_a_session_is_copied_between_experiences_only() -> None:
    model, session = network(), stream()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for experience in range(2):
        begin(session, model, optimizer, experience)
        with pytest.raises(StateError, match="cannot be copied while an experience is running"):
            copy.deepcopy(session)
        train(model, optimizer, experience)
        end(session, model, experience)
        other = copy.deepcopy(session)
        assert other.state_dict()["memories"].keys() == session.memories.keys()
        begin(other, model, optimizer, experience + 1)
        other.abandon()
        assert not session.running


def test_a_full_layer_is_frozen_and_said_once() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    session = ContinualSession(options=ContinualConfig(heads=["2"], threshold=0.9999))
    x = torch.randn(64, 4)

    with pytest.warns(LanceWarning, match=r"nearly full after 1 experiences: 0 \(0 of 4 directions free\)"):
        learn_batch(session, model, optimizer, x)
    assert session.capacity()["0"].free == 0
    before, head = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    with pytest.warns(LanceWarning, match="0: 4 of 4 directions are protected; its weight is frozen"):
        learn_batch(session, model, optimizer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn_batch(session, model, optimizer, x)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[2].weight, head)


def test_a_full_layer_of_few_inputs_is_not_said_where_others_have_room() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    session = ContinualSession(options=ContinualConfig(heads=["4"], threshold=0.99))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn_batch(session, model, optimizer, torch.randn(64, 4))
    capacity = session.capacity()
    assert capacity["0"].free == 0
    assert capacity["2"].free > 6


class Mixed(nn.Module):
    """Everything that no basis protects: an embedding, tied weights, attention, a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.body = nn.Linear(8, 16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) * self.scale
        hidden = self.norm(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])
        return self.classifier(F.relu(self.body(self.second(self.first(hidden)).mean(1))))


def test_what_no_basis_protects_is_frozen_and_named_once() -> None:
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    session = ContinualSession(options=ContinualConfig(heads=["classifier"], threshold=0.8))
    tokens = torch.randint(0, 10, (32, 5))

    learn_batch(session, model, optimizer, tokens, 3)
    assert set(session.memories) == {"body"}
    before = snapshot(model)
    with pytest.warns(LanceWarning, match="no basis can protect them") as caught:
        learn_batch(session, model, optimizer, tokens, 3)
    text = str(next(w.message for w in caught if "no basis" in str(w.message)))
    for name in ("scale", "embedding.weight", "attention.in_proj_weight", "attention.out_proj.weight", "first.weight"):
        assert name in text
    assert "norm" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn_batch(session, model, optimizer, tokens, 3)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"body.weight", "classifier.weight", "classifier.bias"}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)) for _ in range(2)
        )
        self.active = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[self.active](x)


def test_what_earlier_experiences_did_not_use_or_have_trains_as_in_a_first_one() -> None:
    model = Branches()
    session = ContinualSession(options=ContinualConfig(threshold=0.5, warn_above=1.0))
    x = torch.randn(32, 2) @ torch.randn(2, 6)
    model.extra = nn.Linear(1, 1)  # never used
    for experience, active in enumerate([0, 1, 2, 0]):
        if active == 2:
            model.branches.append(nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)))
        model.active = active
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        before = snapshot(model)
        learn_batch(session, model, optimizer, x, 3)
        after = model.state_dict()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        if experience < 3:
            assert changed == {key for key in before if key.startswith(f"branches.{active}.")}
        else:
            assert changed == {"branches.0.0.weight", "branches.0.3.weight"}
    assert set(session.memories) == {f"branches.{b}.{i}" for b in range(3) for i in (0, 3)}
    assert all(memory.stage is Stage.CONSOLIDATED for memory in session.memories.values())


def test_a_module_called_twice_is_protected_for_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.body(x)))

    model = Twice()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    session = ContinualSession(options=ContinualConfig(heads=["head"], threshold=1.0, warn_above=1.0))
    inputs = [torch.randn(32, 1) @ torch.randn(1, 8) for _ in range(2)]

    learn_batch(session, model, optimizer, inputs[0], 4)
    before = model.body(model.body(inputs[0])).detach()
    learn_batch(session, model, optimizer, inputs[1], 4)
    assert relative_error(model.body(model.body(inputs[0])).detach(), before) < 1e-4
    assert relative_error(model.body(model.body(inputs[1])).detach(), before) > 0.01


@pytest.mark.parametrize("reserved", ["full", 6])
def test_fewer_bytes_are_kept_than_without(reserved: Any) -> None:
    model = network()
    optimizer = EVERY_OPTIMIZER["sgd"](model.parameters())
    session = stream(reserved=reserved)
    inputs = torch.randn(64, 6, 8, 8)
    naive = measure_saved_bytes(lambda: model(inputs).sum(), model).total
    for index in range(2):
        begin(session, model, optimizer, index)
        with session.step():
            loss = model(inputs).sum()
        loss.backward()
        report = session.compression.report
        assert report.plain.total >= 0.9 * naive
        assert report.compressed.total < naive / 3
        end(session, model, index)


def test_a_layer_that_is_not_compressed_is_protected_all_the_same() -> None:
    model, optimizer, session = learned("adamw", config=LanceConfig(rank="compact", layers=["0"]))
    before, protected = model[6].weight.detach().clone(), session.memories["6"].protected[0].double()
    run(session, model, optimizer, [1])
    change = (model[6].weight.detach() - before).double()
    assert float(change.norm()) > 1e-3 * float(before.norm())
    assert float((change @ protected).norm()) < 1e-5 * float(change.norm())


@pytest.mark.filterwarnings("ignore:0. 15 of 20 directions are protected")
@pytest.mark.parametrize(("freeze_above", "frozen"), [(0.75, True), (0.8, False), (1.0, False)])
def test_a_nearly_full_layer_is_frozen(freeze_above: float, frozen: bool) -> None:
    model = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    options = ContinualConfig(heads=["2"], threshold=1.0, freeze_above=freeze_above, warn_above=1.0)
    session = ContinualSession(options=options)
    x = torch.randn(64, 15) @ torch.linalg.qr(torch.randn(20, 15)).Q.T  # needs 15 of 20 directions
    y = torch.randn(64, 20)
    for _ in range(2):
        before = model[0].weight.detach().clone()
        learn_batch(session, model, optimizer, y, last=x)
        assert session.capacity()["0"].protected == 15
    assert torch.equal(model[0].weight, before) == frozen


def test_where_nothing_can_be_compressed_any_more_the_stream_goes_on() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    session = ContinualSession(LanceConfig(rank="compact", layers=["0"]), ContinualConfig(heads=["2"], threshold=1.0))
    x = torch.randn(64, 2, 6, 6)
    session.begin_experience(model, [lambda: model(x)], [optimizer])
    with pytest.warns(LanceWarning, match="nearly full"):
        session.end_experience(model, [lambda: model(x)])
    with pytest.warns(LanceWarning, match="no layer that still trains can be compressed"):
        session.begin_experience(model, [lambda: model(x)], [optimizer])
    model(x).sum().backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    session.end_experience(model, [lambda: model(x)])


def test_a_first_experience_with_nothing_to_compress_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(PlanError, match="no layer of Sequential can be protected"):
        ContinualSession().begin_experience(model, [lambda: model(torch.randn(2, 4))])


def test_a_head_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match=r"heads='fc' matches no module or parameter.*'heads.\*'"):
        stream(heads=["fc"]).begin_experience(network(), [])


def test_a_layer_that_grew_is_refused() -> None:
    model, session = network(), stream()
    run(session, model, EVERY_OPTIMIZER["sgd"](model.parameters()), [0])
    model[6] = nn.Linear(90, 32)
    with pytest.raises(StateError, match="6: its memory is for 1 groups of width 108, the layer has 1 of width 90"):
        begin(session, model, None, 1)
    assert not is_swapped(model)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0},
        {"threshold": 1.1},
        {"threshold_growth": -0.1},
        {"reserved": 0},
        {"reserved": True},
        {"reserved": "all"},
        {"reserved": 1.5},
        {"damping": -0.5},
        {"damping": True},
        {"damping": float("inf")},
        {"damping": "much"},
        {"freeze_above": 0.0},
        {"freeze_above": 1.1},
        {"feature_side": "pixel"},
        {"max_rows": 0},
        {"heads": [3]},
    ],
)
def test_bad_options_are_refused_with_their_value(options: dict[str, Any]) -> None:
    key, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=key) as caught:
        ContinualConfig(**options)
    assert repr(value) in str(caught.value)


def test_the_threshold_grows_as_published_and_stops() -> None:
    options = ContinualConfig()
    assert [options.threshold_of(t) for t in (0, 1, 9)] == pytest.approx([0.95, 0.953, 0.977])
    assert options.threshold_of(50) == 0.999
    assert ContinualConfig(threshold=1.0).threshold_of(3) == 1.0
    automatic = ContinualConfig(threshold_growth=0.0)
    assert automatic.threshold_of(4) == 0.95
    assert ContinualConfig(threshold=0.8, threshold_growth=0.0).threshold_of(4) == 0.8


def test_a_boundary_decomposes_no_more_than_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer vectors than they are long have a small Gram matrix; that of the layer's width takes many times as long."""
    found: list[int] = []

    def watched(gram: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        found.append(gram.shape[0])
        return symmetric_eigh(gram, *arguments)

    monkeypatch.setattr(basis, "symmetric_eigh", watched)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 3))
    session = stream(heads=["3"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run(session, model, optimizer, range(3))
    samples = data(0)[0].shape[0]
    assert found
    assert max(found) <= samples < model[1].in_features
