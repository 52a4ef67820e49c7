"""The callback in real Trainers: no trace of the calibration, restore, resume, options."""

from __future__ import annotations

import csv
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_lance import (
    CalibrationError,
    ConfigError,
    ContinualCallback,
    LanceCallback,
    LanceSession,
    LanceWarning,
    PlanError,
    StateError,
    is_swapped,
    measure_saved_bytes,
)
from tests.processes import in_process
from tests.swapped import COMPACT_MODES
from tests.trainers import (
    CLASSES,
    SIZE,
    Batches,
    Classifier,
    EpochLoader,
    Images,
    ImageStream,
    Recorder,
    Reseed,
    assert_restored,
    assert_same_weights,
    fit,
    lance,
    loader,
    make_trainer,
    seeded,
    small_net,
    snapshot,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

WHOLE: dict[str, Any] = {"rank": 10**6, "bits": None}
"""Every mode is projected on all of it: our operators run, and are exact."""


# --- no trace ------------------------------------------------------------------------------------------------------


def test_full_rank_equals_plain_training() -> None:
    """In float64 any sample, draw, statistic or step that the calibration takes would show."""
    plain, compressed = seeded(Classifier), seeded(Classifier)
    recorders = Recorder(), Recorder()
    one = fit(plain, [recorders[0]], loader(44), precision="64-true", val=loader(16))
    other = fit(compressed, [lance(**WHOLE), recorders[1]], loader(44), precision="64-true", val=loader(16))
    assert recorders[1].swapped == [True] * 12
    assert_same_weights(weights(plain), weights(compressed), 1e-10)
    np.testing.assert_allclose(recorders[0].losses, recorders[1].losses, rtol=1e-10)
    assert recorders[0].samples == recorders[1].samples
    assert one.global_step == other.global_step == 12
    assert one.fit_loop.epoch_loop.batch_progress == other.fit_loop.epoch_loop.batch_progress
    for key, value in one.callback_metrics.items():
        torch.testing.assert_close(value, other.callback_metrics[key], rtol=1e-10, atol=1e-10)


def stream_loader() -> DataLoader[Any]:
    return DataLoader(ImageStream(40), batch_size=8)


def generator_loader() -> DataLoader[Any]:
    return loader(generator=torch.Generator().manual_seed(3))


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": loader,
    "last batch smaller": lambda: loader(42),
    "workers": lambda: loader(num_workers=2),
    "persistent workers": lambda: loader(num_workers=1, persistent_workers=True),
    "generator": generator_loader,
    "iterable": stream_loader,
    "iterable with workers": lambda: DataLoader(ImageStream(40), batch_size=8, num_workers=1),
    "several loaders": lambda: {"a": loader(40), "b": loader(24, generator=torch.Generator())},
    "any iterable": lambda: Batches(list(generator_loader())),
}


class FirstOfSeveral(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)


class SampleOrderOf(Recorder):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        batches = batch.values() if isinstance(batch, dict) else [batch]
        self.samples.append([index for item in batches for index in item[2].tolist()])
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize(
    ("name", "calibration_batches"),
    [*((name, 3) for name in LOADERS), ("plain", 1), ("iterable", 5), ("several loaders", 5)],
)
def test_every_sample_trains_once_and_in_order(name: str, calibration_batches: int) -> None:
    recorders = SampleOrderOf(), SampleOrderOf()
    plain, compressed = seeded(FirstOfSeveral), seeded(FirstOfSeveral)
    fit(plain, [recorders[0]], LOADERS[name](), precision="64-true")
    callback = lance(**WHOLE, calibration_batches=calibration_batches)
    fit(compressed, [callback, recorders[1]], LOADERS[name](), precision="64-true")
    assert callback.report is not None
    assert len(recorders[0].samples) in (10, 12)
    assert recorders[1].samples == recorders[0].samples
    assert_same_weights(weights(plain), weights(compressed), 1e-10)


# --- restore -------------------------------------------------------------------------------------------------------


def test_restored_exactly_after_fit() -> None:
    module = Classifier()
    before = snapshot(module)
    recorder = Recorder()
    fit(module, [lance(), recorder], val=loader(8))
    assert all(recorder.swapped)
    assert_restored(module, before)
    assert type(module.net[0]) is nn.Conv2d


HOOKS = [
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_epoch_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
]


class Boom(Callback):
    """Raises in one hook."""

    def __init__(self, hook: str, error: type[BaseException] = RuntimeError) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error(f"boom in {hook}")

        setattr(self, hook, fail)


@pytest.mark.parametrize("first", [True, False], ids=["neighbour first", "neighbour last"])
@pytest.mark.parametrize("hook", [*HOOKS, "teardown"])
def test_restored_when_a_neighbour_fails(hook: str, first: bool) -> None:
    module = Classifier()
    before = snapshot(module)
    callbacks = [Boom(hook), lance(freeze_norms=True)]
    with pytest.raises(RuntimeError, match=f"boom in {hook}"):
        fit(module, callbacks if first else callbacks[::-1], val=loader(8), max_epochs=1)
    del before["training"]  # Lightning leaves its own eval() of a validation behind
    assert_restored(module, before)


@pytest.mark.parametrize("hook", ["setup", *HOOKS, "training_step", "validation_step", "configure_optimizers"])
def test_restored_when_the_module_fails(hook: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"boom in {hook}")

    module = Classifier()
    before = snapshot(module)
    setattr(module, hook, fail)
    if hook == "on_sanity_check_start":  # callbacks have it, modules do not
        fit(module, [lance()], max_epochs=1)
    else:
        with pytest.raises(RuntimeError, match=f"boom in {hook}"):
            fit(module, [lance()], val=loader(8), max_epochs=1)
    del before["training"]
    assert_restored(module, before)


def test_restored_after_ctrl_c() -> None:
    """Lightning turns Ctrl-C into SystemExit and skips every other hook."""
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(SystemExit):
        fit(module, [lance(), Boom("on_train_batch_end", KeyboardInterrupt)])
    assert_restored(module, before)


class FailsToHandle(Boom):
    """Raises in a hook and again when told of it, so that the callbacks after it are never told."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        raise ValueError("boom in on_exception")


def test_a_model_that_could_not_be_restored_is_restored_by_the_next_fit() -> None:
    module = Classifier()
    before = snapshot(module)
    callback = lance()
    with pytest.raises(ValueError, match="boom in on_exception"):
        fit(module, [FailsToHandle("on_train_batch_end"), callback])
    assert is_swapped(module)  # Lightning never called the callback
    fit(module, [callback])
    assert_restored(module, before)


def test_neighbour_after_it_that_fails_in_on_exception() -> None:
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(ValueError, match="boom in on_exception"):
        fit(module, [lance(), FailsToHandle("on_train_batch_end")])
    assert_restored(module, before)


def test_two_fits_with_one_trainer() -> None:
    module, callback, recorder = seeded(Classifier), lance(), Recorder()
    before = snapshot(module)
    trainer = make_trainer([callback, recorder], max_epochs=1)
    trainer.fit(module, loader())
    assert_restored(module, before)
    first = callback.report
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert_restored(module, before)
    assert recorder.swapped == [True] * 15
    assert callback.report is not first


def test_validation_and_test_run_the_stock_path(tmp_path: Path) -> None:
    """Swapped modules are exact without gradients; after the fit they are gone."""
    seen: dict[str, Any] = {}

    class Watch(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.setdefault("validation", is_swapped(self))
            super().validation_step(batch, batch_idx)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen.setdefault("test", is_swapped(self))
            super().test_step(batch, batch_idx)

    module = Watch()
    trainer = fit(module, [lance()], val=loader(8), max_epochs=1, num_sanity_val_steps=0)
    trainer.test(module, loader(8, shuffle=False), verbose=False)
    assert seen == {"validation": True, "test": False}


def test_a_test_run_with_a_checkpoint_does_not_leak_into_the_next_fit(tmp_path: Path) -> None:
    module, callback = Classifier(), lance(rank=2)
    trainer = fit(module, [callback], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = lance(rank=3)
    trainer = make_trainer([other], max_epochs=1)
    trainer.test(module, loader(8, shuffle=False), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert not is_swapped(module)
    trainer.fit(module, loader())  # would warn that stored subspaces win
    assert other.report is not None
    assert other.report.layers[1].core_shape == (3, 3, 3, 3)


# --- resume --------------------------------------------------------------------------------------------------------


def run(
    tmp_path: Path,
    options: dict[str, Any],
    ckpt_path: Any = None,
    data: Any = None,
    module: type[Classifier] = Classifier,
    max_epochs: int = 3,
) -> tuple[Classifier, Recorder, Any]:
    """Three epochs of five batches, with a checkpoint of every step unless resumed."""
    model, recorder = seeded(module), Recorder()
    callbacks: list[Callback] = [Reseed(), lance(**options), recorder]
    if ckpt_path is None:
        every = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", "save_on_train_epoch_end": False}
        callbacks.append(ModelCheckpoint(tmp_path, **every))
    trainer = fit(
        model,
        callbacks,
        EpochLoader() if data is None else data,
        ckpt_path=ckpt_path,
        max_epochs=max_epochs,
        enable_checkpointing=ckpt_path is None,
    )
    return model, recorder, trainer


RESUME_OPTIONS: dict[str, dict[str, Any]] = {
    "compact": {},
    "nothing projected": {"rank": "auto"},
    "two bits": {"rank": None, "bits": 2},
    "refresh each epoch": {"refresh": "epoch"},
    "refresh every 4": {"refresh": 4, "calibration_batches": 2},
    "refresh without a pause": {"refresh": 2, "calibration_batches": 4},
    "published": {"rank": 0.7, "batch": "projected", "refresh": "epoch"},
    "budget": {"rank": "auto", "memory_budget": 9000, "refresh": 3},
}


@pytest.mark.parametrize("name", RESUME_OPTIONS)
def test_resume_from_any_step_equals_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    options = RESUME_OPTIONS[name]
    whole, recorder, _ = run(tmp_path, options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path)["global_step"])
    assert len(checkpoints) == 15
    for step, path in enumerate(checkpoints[:-1], start=1):
        resumed, part, _ = run(tmp_path, options, path)
        assert part.samples == recorder.samples[step:], step
        assert part.losses == recorder.losses[step:], step
        assert_same_weights(weights(whole), weights(resumed))


def test_checkpoint_loads_safely_and_without_the_callback(tmp_path: Path) -> None:
    module = seeded(Classifier)
    trainer = fit(module, [lance(rank=0.9, refresh=3)], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    [state] = [state for key, state in checkpoint["callbacks"].items() if "Lance" in key]
    assert set(state["subspaces"]) == {"net.0", "net.3", "net.9"}
    assert not any("lance" in key.lower() for key in checkpoint["state_dict"])
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same_weights(weights(module), weights(loaded))
    # A run without the callback continues too; Lightning names what is missing.
    other = seeded(Classifier)
    with pytest.warns(UserWarning, match="Please add the following callbacks: .*LanceCallback"):
        fit(other, ckpt_path=str(tmp_path / "a.ckpt"), max_epochs=3)
    assert not is_swapped(other)


def test_state_in_a_checkpoint_is_a_copy(tmp_path: Path) -> None:
    """Lightning's dump aliases tensors; training on must not change what an asynchronous writer still holds."""
    states: list[Any] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            states.append((callback.state_dict(), flat(callback.state_dict())))

    callback = lance(refresh=2, calibration_batches=2)
    fit(Classifier(), [callback, Keep()])
    for state, values in states:
        for tensor, value in zip(flat(state, copy=False), values, strict=True):
            torch.testing.assert_close(tensor, value, rtol=0, atol=0)


def flat(state: Any, copy: bool = True) -> list[Any]:
    leaves = [leaf for leaf in tree_leaves(state) if isinstance(leaf, (Tensor, int, float)) or leaf is None]
    return [leaf.clone() if copy and isinstance(leaf, Tensor) else leaf for leaf in leaves]


class Die(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def until_it_dies() -> None:
    torch.set_num_threads(1)
    every = ModelCheckpoint(".", every_n_train_steps=1, save_top_k=1, filename="only", enable_version_counter=False)
    callbacks = [Reseed(), lance(refresh="epoch"), Die(), every]
    fit(seeded(Classifier), callbacks, EpochLoader(), max_epochs=3, enable_checkpointing=True)


def test_killed_and_resumed_in_another_process(tmp_path: Path) -> None:
    assert in_process(until_it_dies) == -signal.SIGKILL
    assert torch.load(tmp_path / "only.ckpt")["global_step"] == 8
    resumed, part, _ = run(tmp_path, {"refresh": "epoch"}, tmp_path / "only.ckpt")
    (tmp_path / "whole").mkdir()
    whole, recorder, _ = run(tmp_path / "whole", {"refresh": "epoch"})
    assert part.losses == recorder.losses[8:]
    assert_same_weights(weights(whole), weights(resumed))


def test_stored_rank_wins_and_is_said_once(tmp_path: Path) -> None:
    fit(seeded(Classifier), [lance(rank=2)], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    other = lance(rank=0.5)
    with pytest.warns(LanceWarning) as caught:
        fit(seeded(Classifier), [other], ckpt_path=str(tmp_path / "a.ckpt"), max_epochs=3)
    ours = [str(warning.message) for warning in caught if issubclass(warning.category, LanceWarning)]
    assert len(ours) == 1
    assert "rank=2" in ours[0]
    assert "rank=0.5, batch='unbiased', bits='auto' was asked for and is ignored" in ours[0]
    assert other.report is not None
    assert [layer.core_shape for layer in other.report.layers] == [
        (2, 2, 2, 2),
        (2, 2, 2, 2),
        (2, 2),
    ]


def test_resume_with_other_layers(tmp_path: Path) -> None:
    """Stored layers that are not swapped now are named; new ones are calibrated."""
    fit(seeded(Classifier), [lance(layers=["net.0", "net.3"])], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    callback = lance(layers=["net.3", "net.9"])
    with pytest.warns(LanceWarning, match=r"stored subspaces of net\.0 are not used"):
        fit(seeded(Classifier), [callback], ckpt_path=str(tmp_path / "a.ckpt"), max_epochs=2)
    assert callback.report is not None
    assert [layer.name for layer in callback.report.layers] == ["net.3", "net.9"]


def test_state_of_another_version(tmp_path: Path) -> None:
    trainer = fit(seeded(Classifier), [lance()], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt")
    [key] = [key for key in checkpoint["callbacks"] if "Lance" in key]
    checkpoint["callbacks"][key]["version"] = 99
    torch.save(checkpoint, tmp_path / "b.ckpt")
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(StateError, match=r"'version'. is 99. Allowed: version 5"):
        fit(module, [lance()], ckpt_path=str(tmp_path / "b.ckpt"), max_epochs=2)
    assert_restored(module, before)


# --- what is reported ----------------------------------------------------------------------------------------------


def test_metrics_reach_the_logger(tmp_path: Path) -> None:
    fit(Classifier(), [lance()], logger=CSVLogger(tmp_path, name="", version=""), max_epochs=1, log_every_n_steps=1)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    [row] = [row for row in rows if row["lance/saved_bytes"]]
    assert float(row["lance/saved_bytes_plain"]) > float(row["lance/saved_bytes"]) > 0
    assert 0.5 < float(row["lance/captured_energy"]) <= 1
    assert float(row["lance/rank/net.0/channel"]) == 3
    assert row["step"] == "4"


def test_table_is_printed_once_per_fit(capsys: pytest.CaptureFixture[str]) -> None:
    callback = lance(verbose=True)
    fit(Classifier(), [callback], max_epochs=3)
    text = capsys.readouterr().out
    assert text.count("all that autograd keeps, measured") == 1
    assert text.count("LANCE: ") == 1
    assert "print(callback.report) lists them" in text
    assert "net.3" in str(callback.report)


def test_unused_and_refused_layers_are_named() -> None:
    net = nn.Sequential(small_net(), nn.LSTM(CLASSES, CLASSES, batch_first=True))

    class Odd(Classifier):
        def __init__(self) -> None:
            super().__init__(net)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.net[1](self.net[0](x)[:, None])
            return out[:, 0]

    callback = lance()
    module = Odd()
    before = snapshot(module)
    fit(module, [callback], max_epochs=1)
    assert callback.report is not None
    left = {item.name: item for item in callback.report.left}
    assert left["net.1"].type == "LSTM"
    assert "never saw" in left["unused"].reason
    assert_restored(module, before)


# --- inputs --------------------------------------------------------------------------------------------------------


class Poisoned(Images):
    """One image holds a bad value."""

    value = float("nan")

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, label, index = super().__getitem__(index)
        if index == 9:
            image[0, 0, 0] = self.value
        return image, label, index


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_calibration_inputs_are_an_error_and_leave_the_model_as_it_was(value: float) -> None:
    data = Poisoned(40)
    data.value = value
    module = seeded(Classifier)
    before, values = snapshot(module), weights(module)
    with pytest.raises(CalibrationError, match=r"net\.0 received NaN or Inf during calibration .* check the data"):
        fit(module, [lance()], DataLoader(data, batch_size=8))
    assert_restored(module, before)
    assert values.keys() == weights(module).keys()


def test_bad_values_in_a_refresh_keep_the_subspaces() -> None:
    module, callback = seeded(Classifier), lance(refresh="epoch", calibration_batches=1, rank=2)
    data = Poisoned(32)
    data.value = 1.0

    class Poison(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            data.value = float("nan") if trainer.current_epoch == 1 else 1.0

    with pytest.warns(LanceWarning, match=r"were not refreshed: net\.0 received NaN or Inf"):
        fit(module, [callback, Poison()], DataLoader(data, batch_size=16))
    assert callback.state_dict()["subspaces"]["net.0"]["channel"].isfinite().all()


def test_layers_with_all_zero_inputs_are_left_alone() -> None:
    class Zeroed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.extra(torch.zeros(len(x), 6))

        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(6, CLASSES)

    callback = lance()
    with pytest.warns(LanceWarning, match="extra: all calibration inputs were zero"):
        fit(Zeroed(), [callback], max_epochs=1)
    assert callback.report is not None
    assert "extra" in {item.name for item in callback.report.left}


def test_all_zero_images_are_an_error() -> None:
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)))
    before = snapshot(module)
    batches = Batches([(torch.zeros(8, 3, SIZE, SIZE), torch.zeros(8, dtype=torch.int64))] * 4)
    with pytest.raises(CalibrationError, match=r"no swapped layer saw a usable input .* net\.1: .* all zero"):
        fit(module, [lance()], batches)
    assert_restored(module, before)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("rank", ["auto", COMPACT_MODES, 0.7, 2], ids=str)
def test_odd_batches_train(batch_size: int, rank: Any) -> None:
    """A batch of 1, and a last batch that is smaller."""
    recorder = Recorder()
    fit(Classifier(), [lance(rank=rank), recorder], loader(15, batch_size), max_epochs=1)
    assert len(recorder.losses) == -(-15 // batch_size)
    assert all(np.isfinite(recorder.losses))
    assert all(swapped == (rank != "auto") for swapped in recorder.swapped)


def test_batch_of_one_at_full_rank_equals_plain_training() -> None:
    plain, compressed = seeded(Classifier), seeded(Classifier)
    fit(plain, [], loader(5, 1), precision="64-true")
    fit(compressed, [lance(rank={"batch": "compact"}, bits=None)], loader(5, 1), precision="64-true")  # auto: 4 of 1
    assert_same_weights(weights(plain), weights(compressed), 1e-10)


def mixed_sizes() -> Batches:
    """Batches of 8 x 8 images, with two of 12 x 12 after the calibration."""
    sizes = [8, 8, 8, 8, 12, 8, 12]
    return Batches([(torch.randn(6, 3, size, size), torch.randint(0, CLASSES, (6,))) for size in sizes])


@pytest.mark.parametrize("rank", ["compact", COMPACT_MODES, {"batch": "compact"}, "auto"], ids=str)
def test_changing_sizes_train_and_say_nothing(rank: Any) -> None:
    recorder = Recorder()
    fit(Classifier(), [lance(rank=rank), recorder], mixed_sizes(), max_epochs=2)
    assert len(recorder.losses) == 14


# --- frozen norms --------------------------------------------------------------------------------------------------


def frozen_classifier() -> Classifier:
    module = Classifier()
    for child in (module.net[1], module.net[4]):
        child.requires_grad_(False)
    module.net[4].eval()
    return module


def test_freeze_norms() -> None:
    """Frozen norms run in eval mode in every step, also after a validation inside the epoch; flags come back."""
    module = frozen_classifier()
    module.net.append(nn.BatchNorm1d(CLASSES))  # trainable: not touched
    flags: list[tuple[bool, bool, bool]] = []

    class Watch(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            flags.append((pl_module.net[1].training, pl_module.net[4].training, pl_module.net[10].training))

    before, values = snapshot(module), weights(module)
    fit(module, [lance(freeze_norms=True), Watch()], val=loader(8), val_check_interval=2)
    assert flags == [(False, False, True)] * 10
    after = weights(module)
    assert_restored(module, before)
    for name in ("net.1.running_mean", "net.1.num_batches_tracked", "net.4.running_var"):
        assert torch.equal(values[name], after[name])
    assert not torch.equal(values["net.10.running_mean"], after["net.10.running_mean"])


def test_freeze_norms_equals_plain_training_in_eval_mode() -> None:
    plain, compressed = seeded(frozen_classifier), seeded(frozen_classifier)

    class Eval(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.net[1].eval()

    fit(plain, [Eval()], precision="64-true")
    fit(compressed, [lance(**WHOLE, freeze_norms=True)], precision="64-true")
    assert_same_weights(weights(plain), weights(compressed), 1e-10)


def test_frozen_norms_in_training_mode_are_pointed_out() -> None:
    callback, other = lance(), lance(freeze_norms=True)
    fit(frozen_classifier(), [callback], max_epochs=1)
    fit(frozen_classifier(), [other], max_epochs=1)
    assert callback.report is not None
    assert other.report is not None
    assert "freeze_norms=True, 1 batch norm with frozen weights" in str(callback.report)
    assert "freeze_norms" not in str(other.report)
    assert other.report.compressed.total < callback.report.compressed.total  # type: ignore[union-attr]


@pytest.mark.parametrize("other", [LanceCallback, ContinualCallback])
def test_one_callback_serves_a_trainer(other: type[LanceCallback]) -> None:
    module = Classifier(small_net())
    used = lance()
    fit(module, [used], max_epochs=1)
    for first in (lance(rank={"net.0": "compact"}), used):  # Lightning has an error of its own for two of a kind
        with pytest.raises(ConfigError, match=rf"LanceCallback and {other.__name__} in one Trainer.*rank=\{{'layer3"):
            fit(module, [first, other()], max_epochs=1)
    assert [child.__class__ for child in module.net] == [child.__class__ for child in small_net()]


def test_parts_of_a_network_have_ranks_of_their_own() -> None:
    module = Classifier(small_net())
    callback = lance(rank={"net.0": COMPACT_MODES, "net.9": 4})
    fit(module, [callback], max_epochs=1)
    assert callback.report is not None
    assert [layer.name for layer in callback.report.layers] == ["net.0", "net.9"]
    assert callback.report.layers[1].core_shape[0] == 4


# --- options -------------------------------------------------------------------------------------------------------

WRONG_FOR_MODEL: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "pattern": (
        {"layers": "nett.0"},
        (),
        r"layers='nett\.0' matches no layer that can be projected\..*such as net\.0",
    ),
    "one of two": ({"layers": ["net.0", "x"]}, (), r"layers='x' matches no layer"),
    "refused layer": ({"layers": "odd"}, (), r"names only what is left alone: odd \(LSTM\)"),
    "rank pattern": ({"rank": {"n.*": 2}}, (), r"rank\['n\.\*'\] matches no layer that can be projected"),
    "nothing trainable": ({}, (0, 3, 9), r"3 supported layers are frozen, such as net\.9: set requires_grad"),
    "frozen": ({"layers": ["net.0"]}, (0,), r"names only layers whose weight is frozen, such as net\.0"),
}


@pytest.mark.parametrize("name", WRONG_FOR_MODEL)
def test_options_that_do_not_fit_the_model_leave_it_as_it_was(name: str) -> None:
    options, frozen, message = WRONG_FOR_MODEL[name]
    module = Classifier()
    module.odd = nn.LSTM(2, 2)
    for index in frozen:
        module.net[index].requires_grad_(False)
    before = snapshot(module)
    with pytest.raises(PlanError, match=message):
        fit(module, [lance(**options)])
    assert_restored(module, before)
    if name == "frozen":
        fit(module, [lance(layers=["net.0", "net.3"])], max_epochs=1)


def test_an_option_that_does_not_exist_is_named_with_the_one_that_was_meant() -> None:
    for made in (LanceCallback, ContinualCallback):
        with pytest.raises(
            TypeError, match=rf"{made.__name__} has no option 'ranks'\. Did you mean 'rank'\? Allowed: .*bits"
        ):
            made(ranks="compact")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"config='compact' is not allowed.*LanceConfig\("):
        LanceSession(nn.Linear(2, 2), "compact")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": "compact", "memory_budget": "1KB"}, {}])
def test_a_fit_that_ends_before_the_subspaces_are_found_says_so(options: dict[str, Any]) -> None:
    found = lance(calibration_batches=64, **{"rank": "auto", **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Classifier(small_net()), [found], max_epochs=1)
    said = [str(one.message) for one in caught if "within the 64 steps that define the subspaces" in str(one.message)]
    assert len(said) == (1 if options else 0)


class Untrained(Classifier):
    """Computes and trains nothing, as where everything is frozen."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.requires_grad_(not frozen)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        with torch.set_grad_enabled(not any(p.requires_grad for p in self.parameters())):
            self(batch[0])

    def configure_optimizers(self) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize("frozen", [True, False])
def test_a_fit_in_which_nothing_was_to_do_says_so_once(frozen: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Untrained(frozen), [lance(rank="auto")])
    [said] = [str(one.message) for one in caught if one.category is LanceWarning]
    assert said.startswith("LANCE had nothing to do: autograd kept nothing in the training steps of this fit")
    assert ("since no parameter of Untrained requires grad" in said) == frozen


# --- nothing is rehearsed ------------------------------------------------------------------------------------------


class Teacher(Classifier):
    """Does what a training step may do beside computing a loss, and must do once a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = small_net().requires_grad_(False)
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                own.lerp_(other, 0.1)
        return super().training_step(batch, batch_idx) + 0.1 * self.teacher(batch[0]).square().mean()


@pytest.mark.parametrize("options", [{"rank": "auto"}, {"rank": COMPACT_MODES}, WHOLE, {"rank": 3, "refresh": 2}])
def test_every_step_runs_once_and_in_order(options: dict[str, Any]) -> None:
    module = seeded(Teacher)
    fit(module, [lance(**options)])
    assert module.seen == [*range(5), *range(5)]


def test_whatever_a_step_does_is_what_plain_training_does() -> None:
    plain, ours = seeded(Teacher), seeded(Teacher)
    fit(plain, [], precision="64-true")
    fit(ours, [lance(**WHOLE)], precision="64-true")
    assert_same_weights(weights(plain), weights(ours), 1e-10)
    exact = seeded(Teacher)
    fit(exact, [lance(rank=None, bits=None)], precision="64-true")
    assert_same_weights(weights(plain), weights(exact))


@pytest.mark.parametrize("rank", ["auto", COMPACT_MODES], ids=str)
def test_layers_that_some_steps_leave_out(rank: Any) -> None:
    class Alternating(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 32)))
            self.heads = nn.ModuleList(nn.Linear(32, CLASSES) for _ in range(2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if batch_idx == 0:
                return None
            return F.cross_entropy(self.heads[batch_idx % 2](self.net(batch[0])), batch[1])

    callback = lance(rank=rank)
    fit(Alternating(), [callback])
    assert callback.report is not None
    assert callback.report.left == []


def test_a_backward_pass_inside_of_the_step_is_measured() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(self(batch[0]), batch[1]).backward()
                optimizer.step()

    automatic, manual = lance(rank="auto", bits=4), lance(rank="auto", bits=4)
    fit(seeded(Classifier), [automatic], max_epochs=1)
    fit(seeded(Manual), [manual], max_epochs=1)
    assert automatic.report is not None
    assert manual.report is not None
    assert manual.report.plain.total == automatic.report.plain.total > 0
    assert manual.report.compressed.total == automatic.report.compressed.total


def test_plain_bytes_of_the_report_are_those_of_plain_training() -> None:
    measured: list[int] = []

    class Measure(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                found = measure_saved_bytes(lambda: F.cross_entropy(pl_module(batch[0]), batch[1]), pl_module)
                measured.append(found.total)

    fit(Classifier(), [Measure()], max_epochs=1)
    for options in ({"bits": 4, "rank": "auto"}, {"rank": COMPACT_MODES}, {"rank": 0.7, "batch": "projected"}):
        callback = lance(**options)
        fit(Classifier(), [callback], max_epochs=1)
        assert callback.report is not None
        assert callback.report.plain.total == measured[0]
        assert callback.report.compressed.total < measured[0] / 4
