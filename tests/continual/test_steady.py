"""Where steps are sums of gradients, projecting these is enough; where they are not after all, nothing is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lance.continual import ContinualConfig, ContinualSession
from lightning_lance.continual.layers import reserved_layers
from lightning_lance.continual.reservation import WATCH_STEPS
from tests.continual.streams import EXACT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*Converting a tensor with requires_grad"),
]


class OtherSGD(torch.optim.SGD):
    """Known to nobody, so that no assumption is made about its steps."""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 3)
    ).to(dtype)


def batch(experience: int, size: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Few latent directions, other ones in each experience: ``M`` stays below half of the layers."""
    generator = torch.Generator().manual_seed(experience)
    latent = torch.randn(size, 2, generator=generator, dtype=torch.float64)
    planes = torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    return torch.einsum("bk,kcxy->bcxy", latent, planes).to(dtype), (latent[:, 0] > 0).long()


def begun(
    make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype = torch.float64
) -> tuple[nn.Sequential, ContinualSession, torch.optim.Optimizer, dict[str, Tensor]]:
    """In the second experience, with the weights at its start."""
    torch.manual_seed(0)
    model = network(dtype)
    session = ContinualSession(EXACT, ContinualConfig(threshold=0.6, heads=["5"], damping=0.0, warn_above=1.0))
    for experience in (0, 1):
        optimizer = make(model.parameters())
        session.begin_experience(model, [lambda e=experience: model(batch(e, dtype=dtype)[0])], [optimizer])
        if experience == 0:
            train(model, optimizer, 0, 3, dtype=dtype)
            session.end_experience(model, [lambda: model(batch(0, dtype=dtype)[0])])
    before = {name: model.get_submodule(name).weight.detach().clone() for name in session.memories}
    assert all(0 < memory.counts[0] <= memory.width // 2 for memory in session.memories.values())
    return model, session, optimizer, before


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: int,
    steps: int,
    change: Callable[[nn.Module], None] | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    inputs, targets = batch(experience, dtype=dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        if change is not None:
            change(model)
        optimizer.step()


def steady(model: nn.Module) -> list[bool]:
    """Of which layers steps are taken to be sums of gradients."""
    found = [layer.reservation for layer in reserved_layers(model).values()]
    return [one.form.steady and not one.flat for one in found]


def anchored(model: nn.Module) -> list[bool]:
    """Which layers hold, between two steps, what their weight is along all that is protected."""
    found = []
    for layer in reserved_layers(model).values():
        held = {name: value for name, value in vars(layer.reservation).items() if isinstance(value, Tensor)}
        held |= dict(layer.named_parameters(recurse=True)) | {"anchor": layer.reservation.anchor}
        groups, _, columns = layer.reservation.basis.shape
        product = (groups, layer.weight.shape[0] // groups, columns)
        found.append(any(value is not None and value.shape == product for n, value in held.items() if n != "_expected"))
    return found


def leak(model: nn.Module, session: ContinualSession, before: dict[str, Tensor], protected: dict[str, Tensor]) -> float:
    """Largest part of a weight change that lies in what was protected."""
    found = []
    for name, old in before.items():
        rows = session.memories[name].groups, -1, session.memories[name].width
        change = (model.get_submodule(name).weight.detach() - old).double().reshape(rows)
        assert float(change.norm()) > 1e-3 * float(old.norm())
        found.append(float((change @ protected[name].double()).norm() / change.norm()))
    return max(found)


def bases(session: ContinualSession) -> dict[str, Tensor]:
    return {name: memory.protected.clone() for name, memory in session.memories.items()}


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_it_trains_what_the_form_for_any_steps_trains(options: dict[str, Any]) -> None:
    model, session, optimizer, before = begun(lambda p: torch.optim.SGD(p, 0.05, **options))
    other, general, second, _ = begun(lambda p: OtherSGD(p, 0.05, **options))
    assert steady(model) == [True, True]
    assert steady(other) == [False, False]
    protected = bases(session)
    for net, steps in ((model, optimizer), (other, second)):
        train(net, steps, 1, 40)
    assert steady(model) == [True, True]
    inputs = batch(1)[0]
    torch.testing.assert_close(model(inputs), other(inputs), rtol=1e-9, atol=1e-11)
    for net, ended in ((model, session), (other, general)):
        ended.end_experience(net, [lambda net=net: net(inputs)])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert leak(model, session, before, protected) < 1e-12


def test_the_stock_operator_runs_and_single_precision_keeps_the_promise() -> None:
    model, session, optimizer, before = begun(lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), torch.float32)
    protected = bases(session)
    train(model, optimizer, 1, 3 * WATCH_STEPS, dtype=torch.float32)
    assert steady(model) == [True, True]
    x = torch.randn(5, 96)
    assert torch.equal(model[3](x), F.linear(x, model[3].weight, model[3].bias))
    session.end_experience(model, [lambda: model(batch(1, dtype=torch.float32)[0])])
    assert leak(model, session, before, protected) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, weight_decay=1e-4),
        lambda p: torch.optim.Adam(p, 1e-3),
        lambda p: OtherSGD(p, 0.05),
    ],
)
def test_other_steps_are_not_trusted(make: Any) -> None:
    assert not any(steady(begun(make)[0]))


def test_momentum_from_before_is_not_trusted() -> None:
    torch.manual_seed(0)
    model = network()
    session = ContinualSession(EXACT, ContinualConfig(threshold=0.6, heads=["5"], warn_above=1.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for experience in (0, 1):
        session.begin_experience(model, [lambda e=experience: model(batch(e)[0])], [optimizer])
        if experience == 1:
            assert not any(steady(model))
            before, protected = {n: model.get_submodule(n).weight.detach().clone() for n in ("0", "3")}, bases(session)
        train(model, optimizer, experience, 5)
        session.end_experience(model, [lambda e=experience: model(batch(e)[0])])
    assert leak(model, session, before, protected) < 1e-12


def decay(model: nn.Module) -> None:
    """A penalty on the weights themselves, such as those of regularisation methods."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach(), alpha=0.05)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def noise(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(torch.randn_like(parameter), alpha=1e-2)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "weight decay": lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "somebody's": lambda p: OtherSGD(p, 0.05),
}


@pytest.mark.parametrize("change", [None, decay, clip, noise])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_moves_inside_whatever_the_step_and_nothing_is_stored_for_it(
    kind: str, change: Any, dtype: torch.dtype
) -> None:
    model, session, optimizer, before = begun(OPTIMIZERS[kind], dtype)
    protected = bases(session)
    train(model, optimizer, 1, 40, change, dtype)
    assert steady(model) == [change is None and kind in ("sgd", "momentum")] * 2
    assert anchored(model) == [kind == "somebody's"] * 2
    session.end_experience(model, [lambda: model(batch(1, dtype=dtype)[0])])
    # Clipped steps are so short that the rounding of the weights shows beside them.
    assert leak(model, session, before, protected) < (1e-4 if dtype == torch.float32 else 1e-12)


def test_weight_decay_that_a_schedule_turns_on_is_seen() -> None:
    model, session, optimizer, before = begun(OPTIMIZERS["momentum"])
    protected = bases(session)
    train(model, optimizer, 1, 5)
    assert steady(model) == [True, True]
    optimizer.param_groups[0]["weight_decay"] = 0.1
    train(model, optimizer, 1, 20)
    assert steady(model) == [False, False]
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert leak(model, session, before, protected) < 1e-12


def test_gradients_changed_by_a_hook_of_the_optimizer_are_seen() -> None:
    def make(p: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(p, 0.05)
        held = [x for group in optimizer.param_groups for x in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(held, 1e-3) and None)
        return optimizer

    model, session, optimizer, before = begun(make)
    protected = bases(session)
    train(model, optimizer, 1, 20)
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert leak(model, session, before, protected) < 1e-12


class Decoupled(torch.optim.AdamW):
    """Goes on with the weights after the step of another one, through `.data`, as many do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data * 0.99
        return loss


class SharpnessAware(torch.optim.Optimizer):
    """Moves weights outside of `step`, up the gradient and back."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, 0.05)

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        held = [x for group in self.param_groups for x in group["params"] if x.grad is not None]
        moves = [0.05 * x.detach().abs() * x.grad.sign() for x in held]
        for x, move in zip(held, moves, strict=True):
            x.data.add_(move)
        with torch.enable_grad():
            loss = closure()
        for x, move in zip(held, moves, strict=True):
            x.data.sub_(move)
        self.base.step()
        return loss


@pytest.mark.parametrize("kind", [lambda p: Decoupled(p, 1e-2), SharpnessAware])
@pytest.mark.parametrize("change", [None, decay])
@pytest.mark.filterwarnings("error:.*was changed")
def test_somebodys_own_optimizer_may_move_weights_at_any_time(kind: Any, change: Any) -> None:
    torch.manual_seed(0)
    model = network()
    session = ContinualSession(EXACT, ContinualConfig(threshold=0.6, heads=["5"], warn_above=1.0))
    before, protected = {}, {}
    for experience in (0, 1):
        inputs, targets = batch(experience)
        optimizer = kind(model.parameters())
        session.begin_experience(model, [lambda x=inputs: model(x)], [optimizer])
        if experience == 1:
            before = {n: model.get_submodule(n).weight.detach().clone() for n in session.memories}
            protected = bases(session)
        for _ in range(10):
            optimizer.step(closing(model, inputs, targets, change))
        session.end_experience(model, [lambda x=inputs: model(x)])
    assert leak(model, session, before, protected) < 1e-12


def closing(model: nn.Module, inputs: Tensor, targets: Tensor, change: Any = None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        if change is not None:
            change(model)
        return loss

    return closure


@pytest.mark.parametrize("kind", ["sgd", "weight decay", "adam", "fused"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.filterwarnings("error:.*was changed")
def test_a_step_under_autocast_is_as_one_without(kind: str, inside: bool) -> None:
    model, session, optimizer, before = begun(OPTIMIZERS[kind], torch.float32)
    protected = bases(session)
    inputs, targets = batch(1, dtype=torch.float32)
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(inputs), targets)
            if inside:
                loss.backward()
                optimizer.step()
        if not inside:
            loss.backward()
            optimizer.step()
    assert not any(anchored(model))
    session.end_experience(model, [lambda: model(inputs)])
    assert leak(model, session, before, protected) < 1e-4


def test_momentum_that_is_loaded_in_the_middle_is_seen() -> None:
    model, session, optimizer, before = begun(OPTIMIZERS["momentum"])
    protected = bases(session)
    stored = copy.deepcopy(optimizer.state_dict())
    stored["state"] = {i: {"momentum_buffer": torch.ones_like(p)} for i, p in enumerate(model.parameters())}
    train(model, optimizer, 1, 3)
    optimizer.load_state_dict(stored)
    train(model, optimizer, 1, 10)
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert leak(model, session, before, protected) < 1e-12


def test_an_optimizer_may_be_anything_that_has_groups() -> None:
    class Averaging:
        """Steps of another one, and then the average of what has been."""

        def __init__(self, parameters: Any) -> None:
            self.inner = torch.optim.SGD(parameters, 0.05, momentum=0.9)
            self.param_groups, self.state = self.inner.param_groups, self.inner.state
            self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

        __slots__ = ("inner", "param_groups", "slow", "state")

        def zero_grad(self) -> None:
            self.inner.zero_grad()

        def step(self) -> None:
            self.inner.step()
            for fast, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                fast.data.copy_(slow.lerp_(fast.detach(), 0.5))

    model, session, optimizer, before = begun(Averaging)
    protected = bases(session)
    train(model, optimizer, 1, 10)
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert leak(model, session, before, protected) < 1e-12


def test_parameters_may_be_exchanged() -> None:
    model, session, _, before = begun(OPTIMIZERS["adam"])
    protected = bases(session)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    train(model, torch.optim.Adam(model.parameters(), 1e-2), 1, 20)
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert leak(model, session, before, protected) < 1e-12


def test_a_step_that_fails_half_way_leaves_nothing_inside() -> None:
    model, session, optimizer, before = begun(OPTIMIZERS["adam"])
    protected = bases(session)
    train(model, optimizer, 1, 3)

    def fail(*_: Any) -> None:
        raise RuntimeError("after the weights have moved")

    optimizer.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="have moved"):
        train(model, optimizer, 1, 1)
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert leak(model, session, before, protected) < 1e-12


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_good_weights_loaded_after_nan_train_on(kind: str) -> None:
    model, session, optimizer, before = begun(OPTIMIZERS[kind])
    protected = bases(session)
    good = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1, 1)
    with torch.no_grad():
        model[3].weight.fill_(float("nan"))
    for _ in range(WATCH_STEPS):
        train(model, optimizer, 1, 1)
    model.load_state_dict(good)
    fresh = OPTIMIZERS[kind](model.parameters())
    train(model, fresh, 1, 20)
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert leak(model, session, before, protected) < 1e-12


def test_what_moves_a_weight_last_is_said() -> None:
    model, session, optimizer, _ = begun(OPTIMIZERS["adam"])
    train(model, optimizer, 1, 9)
    with torch.no_grad():
        model[3].weight.mul_(0.5)
    with pytest.warns(UserWarning, match="was changed, and not in a step"):
        session.end_experience(model, [lambda: model(batch(1)[0])])


@pytest.mark.parametrize("argument", [3.0, lambda value: value])
def test_other_optimizers_are_called_with_what_is_theirs(argument: Any) -> None:
    class Theirs(torch.optim.Optimizer):
        def step(self, given: Any) -> Any:
            return given(4.0) if callable(given) else given

    begun(OPTIMIZERS["adam"])
    theirs = Theirs([nn.Parameter(torch.zeros(1))], {})
    assert theirs.step(argument) in (3.0, 4.0)


@pytest.mark.parametrize("change", [None, decay, clip])
def test_gradients_that_a_closure_computes_are_seen_too(change: Any) -> None:
    model, session, optimizer, before = begun(lambda p: torch.optim.SGD(p, 0.05))
    protected = bases(session)
    inputs, targets = batch(1)
    closure = closing(model, inputs, targets, change)
    for number in range(20):
        loss = optimizer.step(closure) if number % 2 else optimizer.step(closure=closure)
        assert loss is not None
    assert steady(model) == [change is None] * 2
    session.end_experience(model, [lambda: model(inputs)])
    assert leak(model, session, before, protected) < 1e-12


def test_a_line_search_moves_nothing_inside() -> None:
    def make(p: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(p, lr=0.1, max_iter=5, line_search_fn="strong_wolfe")

    model, session, optimizer, before = begun_with_closure(make)
    protected = bases(session)
    lbfgs(model, optimizer, 1, 4)
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert leak(model, session, before, protected) < 1e-12


def lbfgs(model: nn.Module, optimizer: torch.optim.Optimizer, experience: int, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(closing(model, *batch(experience)))


def begun_with_closure(make: Any) -> tuple[nn.Sequential, ContinualSession, Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = network()
    session = ContinualSession(EXACT, ContinualConfig(threshold=0.6, heads=["5"], damping=0.0, warn_above=1.0))
    for experience in (0, 1):
        optimizer = make(model.parameters())
        session.begin_experience(model, [lambda e=experience: model(batch(e)[0])], [optimizer])
        if experience == 0:
            lbfgs(model, optimizer, 0, 2)
            session.end_experience(model, [lambda: model(batch(0)[0])])
    return model, session, optimizer, {n: model.get_submodule(n).weight.detach().clone() for n in session.memories}


def test_an_optimizer_that_the_session_was_not_told_of_is_seen_too() -> None:
    model, session, _, before = begun(lambda p: torch.optim.SGD(p, 0.05))
    protected = bases(session)
    train(model, torch.optim.Adam(model.parameters(), 1e-2), 1, 20)
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert leak(model, session, before, protected) < 1e-12


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writing_into_a_weight_outside_of_a_step_is_noticed_and_then_kept_out(kind: str, dtype: torch.dtype) -> None:
    model, session, optimizer, _ = begun(OPTIMIZERS[kind], dtype)
    train(model, optimizer, 1, 3, None, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.99)
    with pytest.warns(UserWarning, match="was changed, and not in a step"):
        train(model, optimizer, 1, 4, None, dtype)
    assert all(anchored(model))
    start = {name: model.state_dict()[f"{name}.weight"].clone() for name in session.memories}
    protected = bases(session)
    for _ in range(20):
        train(model, optimizer, 1, 1, None, dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)
    session.end_experience(model, [lambda: model(batch(1, dtype=dtype)[0])])
    assert leak(model, session, start, protected) < 1e-5


def test_hooks_end_with_the_experience() -> None:
    from torch.optim import optimizer as shared

    before = len(shared._global_optimizer_pre_hooks), len(shared._global_optimizer_post_hooks)
    model, session, _, _ = begun(OPTIMIZERS["adam"])
    assert len(shared._global_optimizer_pre_hooks) == before[0] + 1
    session.end_experience(model, [lambda: model(batch(1)[0])])
    assert (len(shared._global_optimizer_pre_hooks), len(shared._global_optimizer_post_hooks)) == before


def test_a_resumed_experience_goes_on_as_it_was() -> None:
    def make(p: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(p, 0.05, momentum=0.9)

    model, session, optimizer, _ = begun(make)
    train(model, optimizer, 1, 5)
    weights, stored = copy.deepcopy(model.state_dict()), copy.deepcopy(session.state_dict())
    running, momentum = copy.deepcopy(session.running_state()), copy.deepcopy(optimizer.state_dict())
    resumed, again = network(), ContinualSession(EXACT, session.options)
    resumed.load_state_dict(weights)
    again.load_state_dict(stored)
    second = make(resumed.parameters())
    second.load_state_dict(momentum)
    assert running is not None
    again.resume_experience(resumed, running, [second])
    assert steady(resumed) == [True, True]
    for net, steps in ((model, optimizer), (resumed, second)):
        train(net, steps, 1, 7)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_graph_has_the_same_gradients() -> None:
    model, _, _, _ = begun(lambda p: torch.optim.SGD(p, 0.05), torch.float32)
    x, y = batch(1, dtype=torch.float32)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), model[3].weight)[0]
    compiled = torch.compile(model, backend="aot_eager")
    found = torch.autograd.grad(F.cross_entropy(compiled(x), y), model[3].weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert steady(model) == [True, True]
