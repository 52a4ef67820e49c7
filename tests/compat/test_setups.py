"""Every training setup of the table, on ResNet-18."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ModelCheckpoint, ModelPruning
from torch.utils.data import DataLoader

from lightning_lance import LanceCallback, LanceWarning, Report, is_swapped
from lightning_lance.compression.surgery import compressed_layers
from tests.compat.rows import Task, check_fit, check_row, data, lance, write
from tests.compat.setups import CASE, SETUPS, ManualTask, resnet
from tests.swapped import COMPACT_MODES
from tests.trainers import Recorder, make_trainer, snapshot

pytest.importorskip("torchvision")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


def batches(**options: Any) -> DataLoader[Any]:
    return data(CASE, **options)


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if setup.slow else []) for name, setup in SETUPS.items()]
)
@pytest.mark.parametrize("rank", ["auto", COMPACT_MODES], ids=["auto", "compact"])
def test_setup(name: str, rank: Any) -> None:
    setup = SETUPS[name]
    report = check_row(
        setup.make(),
        setup.loader(batches),
        setup.callbacks(),
        setup.later(),
        lance(rank=rank, calibration_batches=1),
        val=setup.val(batches),
        ignore=setup.ignore,
        **setup.options,
    )
    if rank == "auto":
        assert report.layers == report.left == []
        assert report.ratio is not None
        assert setup.note or report.ratio >= 6
        write("setup", name, report, setup.note)
    else:
        assert report.layers
        assert set(setup.layers) <= {layer.name for layer in report.layers}


# --- setups with a run of their own --------------------------------------------------------------------------------

Row = Callable[[], Report | None]
ROWS: dict[str, tuple[Row, str]] = {}


def row(name: str, note: str = "") -> Callable[[Row], Row]:
    """Decorator: one row of the table; a note is the stated limit."""

    def decorate(function: Row) -> Row:
        ROWS[name] = (function, note)
        return function

    return decorate


@row("LearningRateFinder before")
def lr_finder_before() -> Report:
    return lr_finder(lambda callback, finder: [finder, callback])


@row("LearningRateFinder after")
def lr_finder_after() -> Report:
    return lr_finder(lambda callback, finder: [callback, finder])


def lr_finder(order: Callable[..., list[Callback]]) -> Report:
    module, callback, recorder = Task(resnet()), lance(), Recorder()
    before = snapshot(module)
    finder = LearningRateFinder(num_training_steps=3, min_lr=1e-5, max_lr=1e-2)
    with contextlib.suppress(IndexError):  # too few steps for a suggestion
        make_trainer([*order(callback, finder), recorder]).fit(module, batches())
    check_fit(module, before, callback, recorder)
    assert callback.report is not None
    return callback.report


@row("BatchSizeFinder")
def batch_size_finder() -> Report:
    class Sized(Task):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return batches(batch=self.batch_size)

        def val_dataloader(self) -> Any:
            return batches(steps=1)

    module, callback, recorder = Sized(resnet()), lance(), Recorder()
    before = snapshot(module)
    finder = BatchSizeFinder(init_val=2, max_trials=3, steps_per_trial=1)
    make_trainer([callback, finder, recorder]).fit(module)
    assert module.batch_size > 2
    check_fit(module, before, callback, recorder)
    assert callback.report is not None
    shapes = [holder.shape for holder in callback.report.compressed.holders]  # type: ignore[union-attr]
    assert max(shape[0] for shape in shapes if len(shape) == 4) == module.batch_size
    return callback.report


@row("ModelPruning")
def pruning() -> Report:
    module, callback, recorder = Task(resnet()), lance(), Recorder()
    parameters = [(module.net.layer4[0].conv1, "weight"), (module.net.fc, "weight")]
    pruner = ModelPruning("l1_unstructured", parameters, amount=0.3, make_pruning_permanent=True)
    types = {name: type(child) for name, child in module.named_modules()}
    make_trainer([pruner, callback, recorder]).fit(module, batches())
    assert {name: type(child) for name, child in module.named_modules()} == types
    assert not is_swapped(module)
    zeros = [
        float((weight == 0).float().mean()) for weight in (module.net.layer4[0].conv1.weight, module.net.fc.weight)
    ]
    assert all(share >= 0.29 for share in zeros)
    assert callback.report is not None
    assert callback.report.compressed.total < callback.report.plain.total  # type: ignore[union-attr]
    return callback.report


@row("two fits with one Trainer")
def two_fits() -> Report:
    module, callback, recorder = Task(resnet()), lance(), Recorder()
    before = snapshot(module)
    trainer = make_trainer([callback, recorder], max_epochs=1)
    trainer.fit(module, batches())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches())
    check_fit(module, before, callback, recorder)
    assert callback.report is not None
    return callback.report


@row("test and predict after fit")
def after_fit() -> Report:
    module, callback, recorder = Task(resnet()), lance(), Recorder()
    before = snapshot(module)
    trainer = make_trainer([callback, recorder])
    trainer.fit(module, batches())
    trainer.test(module, batches(), verbose=False)
    trainer.predict(module, DataLoader(torch.randn(4, 3, 32, 32), batch_size=2))
    check_fit(module, before, callback, recorder)
    assert callback.report is not None
    return callback.report


def checkpoint(at_step: int, **options: Any) -> Path:
    """A checkpoint written in the middle of an epoch of three batches."""
    every = ModelCheckpoint(".", filename="at", every_n_train_steps=at_step, save_top_k=1, enable_version_counter=False)
    make_trainer([lance(**options), every], max_steps=at_step, max_epochs=-1, enable_checkpointing=True).fit(
        Task(resnet()), batches()
    )
    return Path("at.ckpt")


@row("resume in the middle of an epoch")
def resume() -> Report:
    module, callback, recorder = Task(resnet()), lance(), Recorder()
    before = snapshot(module)
    trainer = make_trainer([callback, recorder])
    with pytest.warns(UserWarning, match="resuming from a checkpoint that ended before the epoch ended"):
        trainer.fit(module, batches(), ckpt_path=str(checkpoint(2)))
    assert trainer.global_step == 6
    assert len(recorder.losses) == 4
    check_fit(module, before, callback, recorder)
    assert callback.report is not None
    return callback.report


@row("resume with another rank", "the stored subspaces win, which is said once")
def resume_with_another_rank() -> Report:
    module, callback, recorder = Task(resnet()), lance(rank=0.5), Recorder()
    before = snapshot(module)
    with pytest.warns(LanceWarning) as caught:
        make_trainer([callback, recorder]).fit(module, batches(), ckpt_path=str(checkpoint(3, rank=3)))
    messages = [str(item.message) for item in caught if issubclass(item.category, LanceWarning)]
    assert len(messages) == 1
    assert "rank=3" in messages[0]
    assert "rank=0.5" in messages[0]
    check_fit(module, before, callback, recorder)
    report = callback.report
    assert report is not None
    assert all(
        rank <= 3 for layer in report.layers if layer.core_shape != layer.input_shape for rank in layer.core_shape
    )
    return report


@row("resume without the callback", "the rest of the run is plain")
def resume_without_the_callback() -> None:
    module, path, recorder = Task(resnet()), checkpoint(3), Recorder()
    before = snapshot(module)
    trainer = make_trainer([recorder])
    with pytest.warns(UserWarning, match="Please add the following callbacks: .*LanceCallback"):
        trainer.fit(module, batches(), ckpt_path=str(path))
    assert trainer.global_step == 6
    assert not any(recorder.swapped)
    after = snapshot(module)
    assert all(after[key] == before[key] for key in ("types", "keys", "hooks", "parameters"))


@pytest.mark.parametrize("name", ROWS)
def test_setup_with_a_run_of_its_own(name: str) -> None:
    run, note = ROWS[name]
    report = run()
    write("setup", name, report, note)


# --- what the rows cannot show -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("bf16-mixed", torch.float32)]
)
def test_factors_have_the_dtype_of_the_weights(precision: Any, dtype: torch.dtype) -> None:
    seen: set[torch.dtype] = set()

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            for layer in compressed_layers(pl_module).values():
                subspace = layer._lance.subspace
                seen.update(factor.dtype for factor in (subspace.factors() if subspace else ()))

    callback = lance(rank=COMPACT_MODES, calibration_batches=1)
    make_trainer([callback, Look()], precision=precision, max_epochs=1).fit(Task(resnet()), batches())
    assert seen == {dtype} or (precision == "bf16-mixed" and seen <= {torch.float32, torch.bfloat16})


def test_manual_steps_are_those_of_training() -> None:
    module, recorder = ManualTask(resnet()), Recorder()
    trainer = make_trainer([lance(), recorder])
    trainer.fit(module, batches(steps=4))
    assert trainer.global_step == 4
    assert module.lr_schedulers().last_epoch == 4  # type: ignore[union-attr]


def test_manual_optimisation_that_bypasses_lightning() -> None:
    class Raw(ManualTask):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.trainer.optimizers[0]
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    module = Raw(resnet())
    before = [parameter.detach().clone() for parameter in module.parameters()]
    callback: LanceCallback = lance(rank=COMPACT_MODES)
    make_trainer([callback]).fit(module, batches(steps=4))
    assert len(callback.state_dict()["subspaces"]) == 21
    assert callback.report is not None
    assert callback.report.ratio > 6  # type: ignore[operator]
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
