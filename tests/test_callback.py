"""The callback in real Trainers: no trace of the calibration, restore, resume, options."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lance import LanceWarning, is_swapped
from tests.trainers import (
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
    snapshot,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

WHOLE = {"batch": "full", "channel": "full", "spatial": "full"}


# --- no trace ------------------------------------------------------------------------------------------------------


def test_full_rank_equals_plain_training() -> None:
    """In float64 any sample, draw, statistic or step that the calibration takes would show."""
    plain, compressed = seeded(Classifier), seeded(Classifier)
    recorders = Recorder(), Recorder()
    one = fit(plain, [recorders[0]], loader(44), precision="64-true", val=loader(16))
    other = fit(compressed, [lance(rank=WHOLE), recorders[1]], loader(44), precision="64-true", val=loader(16))
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
    "list of batches": lambda: list(loader()),
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
    callback = lance(rank=WHOLE, calibration_batches=calibration_batches)
    fit(compressed, [callback, recorders[1]], LOADERS[name](), precision="64-true")
    assert callback.report is not None
    assert len(recorders[0].samples) in (10, 12)
    assert recorders[1].samples == recorders[0].samples
    assert_same_weights(weights(plain), weights(compressed), 1e-10)


def test_limit_train_batches_takes_nothing_beyond_the_limit() -> None:
    class Counting(Images):
        taken = 0

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
            Counting.taken += 1
            return super().__getitem__(index)

    with pytest.warns(LanceWarning, match="calibration_batches=3, but the epoch has only 2"):
        fit(Classifier(), [lance()], DataLoader(Counting(40), batch_size=8), limit_train_batches=2, max_epochs=1)
    assert Counting.taken == 16


def test_calibration_leaves_no_trace_in_module_and_generators() -> None:
    class Watch(Callback):
        """Runs before and after the callback in the same hook."""

        def __init__(self) -> None:
            self.states: list[Any] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.states.append(
                    {
                        "buffers": {name: buffer.clone() for name, buffer in pl_module.named_buffers()},
                        "python": random.getstate(),
                        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
                        "torch": torch.get_rng_state().tolist(),
                        "training": [module.training for module in pl_module.modules()],
                        "step": trainer.global_step,
                        "updates": pl_module.accuracy._update_count,
                        "metrics": dict(trainer.callback_metrics),
                        "batch": batch[0].clone(),
                        "grads": [parameter.grad for parameter in pl_module.parameters()],
                        "attributes": sorted(vars(pl_module)),
                    }
                )

    class Random(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0].add_(random.random() + np.random.rand() + float(torch.rand(())))  # noqa: NPY002
            return super().training_step(batch, batch_idx)

    before, after = Watch(), Watch()
    module = Random()
    module.net[6].eval()
    fit(module, [before, lance(), after], max_epochs=1)
    [one], [other] = before.states, after.states
    for key in ("buffers", "batch"):
        torch.testing.assert_close(one.pop(key), other.pop(key), rtol=0, atol=0)
    assert one == other


def test_metric_states_and_user_log_survive_calibration() -> None:
    class Own(Classifier):
        def on_train_start(self) -> None:
            self.log = self.keep  # type: ignore[assignment]
            self.kept: list[str] = []

        def keep(self, name: str, *_: Any, **__: Any) -> None:
            self.kept.append(name)

    module = Own()
    fit(module, [lance()], max_epochs=1)
    assert module.kept == ["loss", "accuracy"] * 5
    assert vars(module)["log"].__func__ is Own.keep


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


@pytest.mark.filterwarnings("ignore:.*cannot run without gradients")
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


def test_ctrl_c_during_calibration() -> None:
    class Interrupting(Classifier):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    module = Interrupting()
    before = snapshot(module)
    with pytest.raises(SystemExit):
        fit(module, [lance(freeze_norms=True)])
    assert_restored(module, before)
    assert "log" not in vars(module)


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
    "auto": {},
    "refresh each epoch": {"refresh": "epoch"},
    "refresh every 4": {"refresh": 4, "calibration_batches": 2},
    "refresh without a pause": {"refresh": 2, "calibration_batches": 4},
    "published": {"rank": 0.7, "batch": "projected", "refresh": "epoch"},
    "budget": {"memory_budget": 9000, "refresh": 3},
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


class GradientPenalty(Classifier):
    """Needs gradients inside the forward pass, so that the subspaces come from ordinary training steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].requires_grad_()
        [slope] = torch.autograd.grad(self(x).sum(), x)
        return super().training_step(batch, batch_idx) + 0 * slope.sum().detach()


@pytest.mark.filterwarnings("ignore:.*(cannot run without gradients|could not be measured)")
def test_resume_inside_the_first_observation(tmp_path: Path) -> None:
    whole, recorder, _ = run(tmp_path, {}, module=GradientPenalty)
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path)["global_step"])
    for step in (1, 2, 3, 4):
        resumed, part, _ = run(tmp_path, {}, checkpoints[step - 1], module=GradientPenalty)
        assert part.losses == recorder.losses[step:], step
        assert_same_weights(weights(whole), weights(resumed))
