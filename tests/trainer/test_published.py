"""``preset="published"`` in real Trainers: subspaces and gradients of a HOSVD, and no trace of how they were found."""

from __future__ import annotations

import copy
import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_lance import (
    CalibrationError,
    ConfigError,
    LanceCallback,
    LanceConfig,
    LanceSession,
    PlanError,
    StateError,
)
from lightning_lance.subspaces.batch import LearnedBatch
from tests.hosvd import assert_same_factor, hosvd, projected
from tests.oracles import relative_error
from tests.trainers import (
    Batches,
    Classifier,
    EpochLoader,
    Images,
    Recorder,
    Reseed,
    SaveAt,
    assert_restored,
    assert_same_weights,
    fit,
    loader,
    seeded,
    snapshot,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
]


def published(**options: Any) -> LanceCallback:
    return LanceCallback(**{"preset": "published", "verbose": False, **options})


class Dropping(nn.Module):
    """Convolutions, one of them depthwise, dropout, a frozen and a trained norm, tokens, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.frozen = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 1)
        self.drop = nn.Dropout(0.3)
        self.tokens = nn.Linear(8, 10)
        self.classifier = nn.Linear(10, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.frozen(self.first(x))))
        x = self.drop(F.relu(self.second(self.norm(self.depthwise(x)))))
        return self.classifier(F.relu(self.tokens(x.flatten(2).mT)).mean(1))


class DoubleImages(Images):
    def __getitem__(self, index: int) -> Any:
        image, label, index = super().__getitem__(index)
        return image.double(), label, index


class FirstGradients(Callback):
    """Gradients of the first step, and what it was computed from."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.state: dict[str, Tensor] = {}
        self.random: Any = None
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.batch is None:
            self.batch, self.state = batch, copy.deepcopy(pl_module.state_dict())
            self.random = torch.get_rng_state()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.gradients:
            found = pl_module.named_parameters()
            self.gradients = {name: p.grad.detach().clone() for name, p in found if p.grad is not None}


def seen_by(net: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """Inputs of layers, in eval mode."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0]))
        for name in names
    ]
    net.eval()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_a_fit_has_the_factors_ranks_and_gradients_of_a_hosvd() -> None:
    data = DataLoader(DoubleImages(20), batch_size=6)
    module = Classifier(seeded(Dropping).double()).double()
    callback, first = published(calibration_batches=3), FirstGradients()
    fit(module, [callback, first], data, max_epochs=1)
    subspaces = callback.state_dict()["subspaces"]
    names = ["first", "second", "tokens"]
    assert set(subspaces) == {f"net.{name}" for name in names}

    # The same step plainly, with every input and the gradient of every output.
    plain = Classifier(Dropping().double()).double()
    plain.load_state_dict(first.state)
    batches = [batch[0] for batch in data]
    calibration = seen_by(plain.net, names, batches[:3])
    plain.train()
    plain.net.frozen.eval()
    inputs, outputs = {}, {}
    for name in names:

        def note(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            inputs[name], outputs[name] = args[0].detach(), output

        plain.net.get_submodule(name).register_forward_hook(note)
    torch.set_rng_state(first.random)
    F.cross_entropy(plain(first.batch[0]), first.batch[1]).backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None and name.removeprefix("net.").removesuffix(".weight") not in names:
            assert relative_error(first.gradients[name], parameter.grad) < 1e-12, name

    for name in names:
        bases = hosvd(calibration[name], 0.7)
        stored = subspaces[f"net.{name}"]
        spatial = stored["spatial"][0][1]
        own = [stored["channel"], *spatial] if name != "tokens" else [*spatial, stored["channel"]]
        for factor, basis in zip([stored["batch"][3], *own], bases, strict=True):
            assert basis is not None
            if factor is None:
                assert basis.shape[0] == basis.shape[1]
            else:
                assert_same_factor(factor, basis, 1e-8)
        layer = plain.net.get_submodule(name)
        weight = layer.weight.detach().clone().requires_grad_()
        x = projected(inputs[name], bases)
        if name == "tokens":
            again = F.linear(x, weight)
        else:
            again = F.conv2d(x, weight, None, layer.stride, layer.padding)
        grad = outputs[name].grad
        assert grad is not None
        again.backward(grad)
        assert weight.grad is not None
        assert relative_error(first.gradients[f"net.{name}.weight"], weight.grad) < 1e-10, name
        assert layer.weight.grad is not None
        assert relative_error(first.gradients[f"net.{name}.weight"], layer.weight.grad) > 0.01, name


def test_what_it_leaves_alone_is_named_and_last_n_does_not_count_it() -> None:
    callback = published(layers=2)
    fit(Classifier(seeded(Dropping)), [callback], max_epochs=1)
    assert callback.report is not None
    assert [layer.name for layer in callback.report.layers] == ["net.second", "net.tokens"]
    left = {item.name: item.reason for item in callback.report.left}
    assert left.keys() == {"net.first", "net.depthwise", "net.classifier"}
    assert "depthwise" in left["net.depthwise"]
    assert "classifier" in left["net.classifier"]
    with pytest.raises(PlanError, match=r"names only what is left alone: net.classifier \(Linear\): the classifier"):
        fit(Classifier(seeded(Dropping)), [published(layers=["net.classifier"])])


def test_every_sample_is_trained_on_as_without_it_and_nothing_is_left_behind() -> None:
    generator = torch.Generator().manual_seed(3)
    orders = []
    for callbacks in ([], [published(calibration_batches=4)]):
        module, recorder = Classifier(seeded(Dropping)), Recorder()
        before = snapshot(module)
        random.seed(5)
        data = DataLoader(Images(22, augment=True), batch_size=5, shuffle=True, generator=generator.manual_seed(3))
        fit(module, [recorder, *callbacks], data)
        assert_restored(module, before)
        orders.append((recorder.samples, torch.rand(1), random.random(), generator.get_state()))
        assert recorder.swapped == [bool(callbacks)] * 10
    one, other = orders
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
    assert one[2] == other[2]
    assert torch.equal(one[3], other[3])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_running_epoch_keeps_its_place(workers: int) -> None:
    data: Any = EpochLoader()
    if workers:
        data = DataLoader(Images(40), batch_size=8, num_workers=1, persistent_workers=True)
    recorder = Recorder()
    fit(Classifier(seeded(Dropping)), [recorder, published(calibration_batches=3)], data, max_epochs=1)
    assert sorted(index for batch in recorder.samples for index in batch) == list(range(40))


def test_the_last_smaller_batch_trains() -> None:
    callback = published(calibration_batches=9)
    recorder = Recorder()
    fit(Classifier(seeded(Dropping)), [callback, recorder], loader(19, batch_size=8))
    assert [len(samples) for samples in recorder.samples] == [8, 8, 3, 8, 8, 3]
    assert all(stored["batch"][3].shape[0] == 8 for stored in callback.state_dict()["subspaces"].values())


def test_training_mode_and_running_statistics_are_those_of_plain_training() -> None:
    states = []
    for callbacks in ([], [published(layers=["net.tokens"])]):
        module = Classifier(seeded(Dropping), lr=0.0)
        module.net.frozen.requires_grad_(False)
        fit(module, [Reseed(), *callbacks], max_epochs=1)
        states.append(weights(module))
        assert module.net.frozen.training
    # The trained norm saw each batch once; the frozen one stays as it is, which plain training changes.
    plain, ours = states
    for key in ("net.norm.running_mean", "net.norm.num_batches_tracked"):
        assert ours[key].isfinite().all()
    assert torch.equal(ours["net.norm.num_batches_tracked"], plain["net.norm.num_batches_tracked"])
    assert torch.equal(ours["net.frozen.running_mean"], torch.zeros(6))


@pytest.mark.parametrize("stop", [2, 7])
def test_a_resumed_fit_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    whole = Classifier(seeded(Dropping))
    fit(whole, [published(calibration_batches=3), Reseed()], EpochLoader(), max_epochs=2)
    part = Classifier(seeded(Dropping))
    trainer = fit(part, [published(calibration_batches=3), Reseed(), SaveAt(stop, tmp_path / "at.ckpt")], EpochLoader())
    assert trainer.global_step == 10
    resumed, callback = Classifier(seeded(Dropping, 9)), published(calibration_batches=3)
    fit(resumed, [callback, Reseed()], EpochLoader(), ckpt_path=str(tmp_path / "at.ckpt"), max_epochs=2)
    assert_same_weights(weights(whole), weights(resumed))


def test_the_state_loads_safely_and_damage_is_named() -> None:
    callback = published(calibration_batches=2)
    module = Classifier(seeded(Dropping))
    fit(module, [callback], max_epochs=1)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    session = LanceSession(Classifier(seeded(Dropping)), LanceConfig(preset="published"))
    session.start()
    session.load_state_dict(state)
    found = {name: layer._lance.subspace for name, layer in session.layers.items()}
    assert all(subspace is not None and isinstance(subspace.batch, LearnedBatch) for subspace in found.values())
    with session.step():
        loss = session.model(torch.randn(8, 3, 8, 8)).sum()
    loss.backward()
    state["subspaces"]["net.first"]["batch"][3] += 1
    with pytest.raises(StateError, match=r"net\.first.*orthonormal columns"):
        session.load_state_dict(state)
    session.stop()


def test_a_state_of_other_options_wins() -> None:
    other = LanceCallback(rank="compact", verbose=False, calibration_batches=2)
    fit(Classifier(seeded(Dropping)), [other], max_epochs=1)
    session = LanceSession(Classifier(seeded(Dropping)), LanceConfig(preset="published"))
    session.start()
    with pytest.warns(UserWarning, match=r"stored options \(rank='compact', batch='unbiased'"):
        session.load_state_dict(other.state_dict())
    assert session.config.rank == "compact"
    session.stop()


class Boom(Exception):
    pass


class _Failing(Dropping):
    """Fails in the given call, or in the given mode."""

    def __init__(self, call: int, error: type[Exception] = Boom) -> None:
        super().__init__()
        self.calls, self.call, self.error = 0, call, error

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise self.error("here")
        return super().forward(x)


@pytest.mark.parametrize("call", [1, 3, 6])
def test_the_model_is_restored_on_an_error_in_a_pass_and_in_a_step(call: int) -> None:
    module = Classifier(_Failing(call))
    before, values = snapshot(module), weights(module)
    with pytest.raises(Boom):
        fit(module, [published(calibration_batches=4)])
    before["attributes"] = snapshot(module)["attributes"]
    assert_restored(module, before)
    if call < 5:
        assert_same_weights(values, weights(module))


def test_a_pass_that_does_not_fit_the_model_says_what_to_do() -> None:
    module = Classifier(_Failing(1, TypeError))
    with pytest.raises(CalibrationError, match=r"TypeError: here\)\. Give forward_fn"):
        fit(module, [published()])
    seen = []

    def forward(module: Any, batch: Any) -> Any:
        seen.append(module.training)
        return module.net(batch[0])

    fit(Classifier(seeded(Dropping)), [published(forward_fn=forward, calibration_batches=3)], max_epochs=1)
    assert seen == [False] * 3


def test_a_loader_that_can_be_read_once_only_is_refused() -> None:
    class Once(Batches):
        def __copy__(self) -> Any:
            raise TypeError("cannot pickle 'generator' object")

    with pytest.raises(CalibrationError, match=r"a Once can be read once only\. Give a DataLoader"):
        fit(Classifier(seeded(Dropping)), [published()], Once(list(loader(16))))


def test_nan_in_a_pass_is_refused() -> None:
    module = Classifier(seeded(Dropping))
    module.net.first.weight.data[0] = torch.nan
    before = snapshot(module)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        fit(module, [published()])
    assert_restored(module, before)


class _Thaw(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.net.first.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": list(pl_module.net.first.parameters())})


def test_a_layer_that_is_unfrozen_later_is_calibrated_then() -> None:
    module = Classifier(seeded(Dropping))
    module.net.first.requires_grad_(False)
    callback = published(calibration_batches=2)
    fit(module, [_Thaw(), callback])
    assert set(callback.state_dict()["subspaces"]) == {"net.first", "net.second", "net.tokens"}
    assert callback.state_dict()["observing"] is None


def test_a_loop_of_ones_own_calibrates_first() -> None:
    net = seeded(Dropping)
    session = LanceSession(net, LanceConfig(preset="published", calibration_batches=2))
    session.start()
    with pytest.raises(StateError, match=r"Call calibrate\(passes\) with 2 forward passes first"), session.step():
        pass
    flags = []
    x = torch.randn(6, 3, 8, 8)
    session.calibrate(iter([lambda: flags.append(net.training) or net(x)] * 2))
    assert flags == [False, False]
    assert net.training
    with session.step():
        loss = net(x).sum()
    loss.backward()
    assert session.report is not None
    assert len(session.report.layers) == 3
    session.stop()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", 0.9),
        ("batch", "projected"),
        ("bits", 4),
        ("memory_budget", "1MB"),
        ("refresh", "epoch"),
        ("skip", "depthwise"),
    ],
)
def test_an_option_that_contradicts_it_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{option}=.* contradicts preset='published', which has {option}="):
        LanceCallback(preset="published", **{option: value})


def test_options_beside_it() -> None:
    config = LanceCallback(preset="published", layers=4, calibration_batches=7, rank=0.7).config
    assert (config.layers, config.calibration_batches, config.rank, config.bits) == (4, 7, 0.7, None)
    assert LanceConfig(preset="published").calibration_batches == 100
    assert LanceConfig(preset="published").freeze_norms
    with pytest.raises(ConfigError, match=r"preset='publish' is not allowed\. Allowed: None, 'published'"):
        LanceConfig(preset="publish")
    for wrong in ({"skip": "norms"}, {"calibration": "before"}, {"batch": "learned", "memory_budget": "1MB"}):
        with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}="):
            LanceConfig(**wrong)
