"""Experiences in plain Lightning: the same callback in one fit after another, and nothing of the earlier ones moves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lance import ConfigError, ContinualCallback, StateError
from lightning_lance.continual.layers import reserved_layers
from tests.continual.streams import EVERY_OPTIMIZER
from tests.trainers import (
    CLASSES,
    Classifier,
    EpochLoader,
    SaveAt,
    assert_restored,
    assert_same_weights,
    fit,
    snapshot,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning_lance.LanceWarning"),
]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 24), nn.ReLU(),
        nn.Linear(24, CLASSES),
    )  # fmt: skip


class Learner(Classifier):
    """A classifier with any optimiser."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(net())
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return EVERY_OPTIMIZER[self.optimizer](self.parameters())


def experience(index: int) -> DataLoader[Any]:
    """Images that lie in few directions, others in each experience."""
    generator = torch.Generator().manual_seed(index)
    basis = torch.randn(5, 3, 8, 8, generator=generator)
    images = torch.einsum("nk,kchw->nchw", torch.randn(48, 5, generator=generator), basis)
    classes = torch.arange(48) % CLASSES
    return DataLoader(TensorDataset(images + classes.view(-1, 1, 1, 1) * 0.3, classes), batch_size=8)


def callback(**options: Any) -> Any:
    given = {"heads": ["net.6"], "threshold": 0.9, "calibration_batches": 6, "verbose": False}
    return ContinualCallback(**{**given, **options})


def test_options() -> None:
    found = callback(rank=0.7, bits=4)
    assert (found.config.rank, found.config.bits, found.config.calibration_batches) == (0.7, 4, 6)
    assert (ContinualCallback().config.rank, ContinualCallback().config.bits) == ("auto", "auto")
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(other) is ContinualCallback
    with pytest.raises(ConfigError, match="refresh='epoch' is not allowed in continual learning"):
        callback(refresh="epoch")
    with pytest.raises(ConfigError, match=r"threshold=2\.0 is not allowed"):
        callback(threshold=2.0)


def assert_only_outside_moves(module: Learner, lance: Any, train: Callable[[], Any], least: float) -> dict[str, Tensor]:
    """Training moves the weights, and nothing along what is protected at its beginning; returns the biases before."""
    protected = {name: memory.protected[0].double() for name, memory in lance.stream.memories.items()}
    start = weights(module)
    train()
    for name, basis in protected.items():
        old = start[f"{name}.weight"]
        change = (module.get_submodule(name).weight.detach() - old).double().flatten(1)
        assert float((change @ basis).norm()) <= min(1e-5 * float(change.norm()), 1e-6 * float(old.norm()))
        assert float(change.norm()) > least * float(old.norm())
    return {f"{name}.bias": start[f"{name}.bias"] for name in protected}


@pytest.mark.parametrize("reserved", ["full", 6], ids=str)
@pytest.mark.parametrize("optimizer", EVERY_OPTIMIZER)
def test_weights_move_only_outside_of_what_is_protected(optimizer: str, reserved: Any) -> None:
    torch.manual_seed(0)
    module, lance = Learner(optimizer), callback(reserved=reserved)
    before = snapshot(module)
    for index in range(4):
        biases = assert_only_outside_moves(
            module, lance, lambda index=index: fit(module, [lance], experience(index), max_epochs=2), 1e-5
        )
        assert_restored(module, before)
        assert all(torch.equal(module.state_dict()[name], bias) for name, bias in biases.items())
        assert set(lance.stream.memories) == {"net.0", "net.4"}
    assert lance.stream.experience == 4


def test_outputs_for_earlier_experiences_stay() -> None:
    torch.manual_seed(0)
    module, lance = Learner("adamw"), callback(threshold=1.0)
    fit(module, [lance], experience(0), max_epochs=1)
    images = next(iter(experience(0)))[0]
    body = nn.Sequential(*module.net[:6])
    with torch.no_grad():
        before = body(images)
        fit(module, [lance], experience(1), max_epochs=2)
        assert float((body(images) - before).norm() / before.norm()) < 1e-3
    plain = Learner("adamw")
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        fit(plain, [], experience(1), max_epochs=2)
        assert float((nn.Sequential(*plain.net[:6])(images) - before).norm() / before.norm()) > 1e-2


@pytest.mark.parametrize("reserved", ["full", 6], ids=str)
@pytest.mark.parametrize("step", [1, 4, 7])
def test_resuming_within_an_experience_equals_the_uninterrupted_run(step: int, reserved: Any, tmp_path: Path) -> None:
    def begun() -> tuple[Learner, Any]:
        torch.manual_seed(0)
        module, lance = Learner("adamw"), callback(reserved=reserved)
        fit(module, [lance], EpochLoader(), max_epochs=1)
        return module, lance

    module, lance = begun()
    fit(module, [lance, SaveAt(step, tmp_path / "a.ckpt")], EpochLoader(), max_epochs=2)
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert "ContinualCallback" in stored["callbacks"]
    resumed, other = begun()
    fit(resumed, [other], EpochLoader(), ckpt_path=str(tmp_path / "a.ckpt"), max_epochs=2)
    assert_same_weights(weights(module), weights(resumed))
    assert lance.stream.experience == other.stream.experience == 2
    for name, memory in lance.stream.memories.items():
        assert torch.equal(memory.protected, other.stream.memories[name].protected)


def test_a_failed_fit_leaves_the_model_and_what_was_protected() -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert reserved_layers(module)
            raise RuntimeError("stop")

    torch.manual_seed(0)
    module, lance = Learner(), callback()
    before = snapshot(module)
    fit(module, [lance], experience(0), max_epochs=1)
    protected = {name: memory.protected for name, memory in lance.stream.memories.items()}
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, [lance, Fails()], experience(1), max_epochs=1)
    assert_restored(module, before)
    assert lance.stream.experience == 1
    for name, memory in lance.stream.memories.items():
        assert torch.equal(memory.protected, protected[name])
    fit(module, [lance], experience(1), max_epochs=1)
    assert lance.stream.experience == 2


def test_fewer_bytes_are_kept_than_plainly() -> None:
    module, lance = Learner(), callback()
    for index in range(3):
        fit(module, [lance], experience(index), max_epochs=1)
        assert lance.report is not None
        assert lance.report.plain is not None
        assert lance.report.compressed is not None
        assert lance.report.compressed.total < 0.3 * lance.report.plain.total


class Averages(Callback):
    """Averages what the model works with after each step, by itself."""

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self.found: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, value in pl_module.state_dict().items():
            old = self.found.get(name)
            new = value.detach().double()
            self.found[name] = new if old is None else self.decay * old + (1 - self.decay) * new


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"damping": 0.0}])
@pytest.mark.parametrize("ours_first", [True, False])
def test_the_average_of_a_fit_is_what_is_learned_and_moves_nothing(
    ours_first: bool, options: dict[str, Any], optimizer: str
) -> None:
    ema = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging
    torch.manual_seed(0)
    model, lance = Learner(optimizer), callback(threshold=0.7, freeze_above=1.0, **options)
    for index in range(3):
        watch = Averages(0.8)
        found = [lance, watch, ema(decay=0.8, update_every_n_steps=1)]
        callbacks = found if ours_first else found[::-1]
        assert_only_outside_moves(
            model, lance, lambda c=callbacks, i=index: fit(model, c, experience(i), max_epochs=2), 1e-4
        )
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value.double(), watch.found[name], rtol=0, atol=1e-5)


def test_a_stochastic_average_of_a_fit_is_what_is_learned_and_moves_nothing() -> None:
    torch.manual_seed(0)
    model, lance = Learner("adamw"), callback(threshold=0.7, freeze_above=1.0)
    for index in range(3):
        swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
        assert_only_outside_moves(
            model, lance, lambda s=swa, i=index: fit(model, [lance, s], experience(i), max_epochs=4), 1e-4
        )


def test_an_average_of_fewer_directions_is_refused() -> None:
    average = StochasticWeightAveraging(swa_lrs=1e-2)
    with pytest.raises(StateError, match=r"StochasticWeightAveraging.*reserved=0.5.*'full'"):
        fit(Learner("adamw"), [callback(reserved=0.5), average], experience(0))


def test_with_names_each_experience_has_columns_of_its_own() -> None:
    torch.manual_seed(0)
    model, lance = Learner("adamw"), callback(columns=0.1)
    outputs = []
    for index in range(3):
        lance.own = str(index)
        fit(model, [lance], experience(index), max_epochs=2)
        assert lance.stream.selected == str(index)
        outputs.append(model.net[:6](next(iter(experience(index)))[0]).detach())
    assert lance.stream.rule.names == ["0", "1", "2"]
    assert lance.stream.rule.bytes > 0
    for index, expected in enumerate(outputs):
        lance.stream.select(model, str(index))
        found = model.net[:6](next(iter(experience(index)))[0])
        # The threshold leaves out a tenth of the energy, which later experiences may move.
        assert float((found - expected).norm()) < 0.35 * float(expected.norm())


@pytest.mark.parametrize("verbose", [True, False])
def test_a_table_is_printed_after_each_fit(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    lance = callback(verbose=verbose)
    fit(Learner(), [lance], experience(0))
    printed = capsys.readouterr().out
    assert (lance.stream.table() in printed) == verbose
    assert "after experience 0" in lance.stream.table()


class Bare(Learner):
    """Without a ``forward``: its training step runs the network itself."""

    forward = pl.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.stepped = True
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_module_without_a_forward_is_refused_before_its_first_step() -> None:
    """What an experience needs is seen in forward passes, which come after its last step too."""
    module = Bare()
    with pytest.raises(ConfigError, match=r"Bare has no forward\(\).*forward_fn=") as raised:
        fit(module, [ContinualCallback(verbose=False)], max_epochs=1)
    assert "\n" not in str(raised.value)
    assert not hasattr(module, "stepped")
    callback = ContinualCallback(verbose=False, forward_fn=lambda module, batch: module.net(batch[0]))
    fit(module, [callback], max_epochs=1)
    assert callback.capacity
