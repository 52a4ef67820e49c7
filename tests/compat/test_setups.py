"""Every training setup of the table, on ResNet-18."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lance import LanceCallback, LanceWarning, Report, is_swapped
from lightning_lance.surgery import compressed_layers
from tests.compat.networks import CLASSES, Case, UNet
from tests.compat.rows import Task, check_fit, check_row, data, lance, write
from tests.trainers import Recorder, make_trainer, snapshot

pytest.importorskip("torchvision")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning"),
]


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(weights=None, num_classes=CLASSES)


CASE = Case(resnet, (3, 32, 32))


def batches(**options: Any) -> DataLoader[Any]:
    return data(CASE, **options)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return (self.dataset[index] for index in range(len(self.dataset)))


class ManualTask(Task):
    """Manual optimisation with a scheduler, clipping and accumulation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.manual_backward(loss)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, 1.0, "norm")  # type: ignore[arg-type]
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
            scheduler.step()  # type: ignore[union-attr, call-arg]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Gan(Task):
    """Two networks, two optimisers, toggled in turn."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.generator = UNet()
        self.paint = nn.Conv2d(CLASSES, 3, 1)

    def generate(self, x: Tensor) -> Tensor:
        generator = self.generator
        first = generator.down1(x)
        merged = generator.merge(torch.cat([generator.up(generator.down2(first)), first], 1))
        return self.paint(generator.out(merged))

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        first, second = self.optimizers()  # type: ignore[misc, union-attr]
        with first.toggle_model():
            loss = -F.cross_entropy(self.net(self.generate(x)), y)
            self.manual_backward(loss)
            first.step()
            first.zero_grad()
        self.toggle_optimizer(second)
        loss = F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(self.generate(x).detach()), y)
        self.manual_backward(loss)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        painters = [*self.generator.parameters(), *self.paint.parameters()]
        return torch.optim.SGD(painters, lr=1e-4), torch.optim.SGD(self.net.parameters(), lr=1e-4)


class Checkpointed(nn.Module):
    """Recomputes two of its stages in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = resnet()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        x = checkpoint(body.layer1, x, use_reentrant=self.reentrant)
        x = checkpoint(body.layer2, x, use_reentrant=self.reentrant)
        return body.fc(body.avgpool(body.layer4(body.layer3(x))).flatten(1))


class ChannelsLast(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0].contiguous(memory_format=torch.channels_last), batch[1]], batch_idx)


class WithBackbone(Task):
    """What BackboneFinetuning asks for: a backbone, and a head that trains first."""

    def __init__(self) -> None:
        net = resnet()
        head = net.fc
        net.fc = nn.Identity()
        super().__init__(nn.Identity())
        self.backbone, self.head = net, nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        del head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=1e-3)


class Schedule(Task):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=100)]


class SelfDistilled(Task):
    """The network is called twice in one step, once without gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self(batch[0]).softmax(1)
        return F.cross_entropy(self(batch[0]), target)


def channels_last() -> Task:
    return ChannelsLast(resnet().to(memory_format=torch.channels_last))


def ema(**options: Any) -> Callback:
    return EMAWeightAveraging(decay=0.9, update_every_n_steps=1, **options)


Row = Callable[[], Report]
ROWS: dict[str, tuple[Row, str]] = {}


def row(name: str, note: str = "") -> Callable[[Row], Row]:
    """Decorator: one row of the table; a note is the stated limit."""

    def decorate(function: Row) -> Row:
        ROWS[name] = (function, note)
        return function

    return decorate


def simple(name: str, note: str = "", make: Callable[[], Task] = lambda: Task(resnet()), **options: Any) -> None:
    """A row that is a Trainer option, or a callback made by a function."""

    def run() -> Report:
        found = {key: value() if callable(value) else value for key, value in options.items()}
        return check_row(make(), found.pop("loader", batches()), **found)

    ROWS[name] = (run, note)


simple("precision 32-true")
simple("precision bf16-mixed", precision="bf16-mixed")
simple("precision bf16-true", precision="bf16-true")
simple("precision 64-true", precision="64-true")
simple("accumulate_grad_batches", accumulate_grad_batches=2)
simple("GradientAccumulationScheduler", callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2})])
simple("gradient clipping by norm", gradient_clip_val=0.5)
simple("gradient clipping by value", gradient_clip_val=0.1, gradient_clip_algorithm="value")
simple("AdamW and OneCycleLR", make=lambda: Schedule(resnet()))
simple("manual optimisation", make=lambda: ManualTask(resnet()))
simple(
    "two optimisers (GAN)",
    "the table counts both losses of a step, which are never in memory together",
    make=lambda: Gan(resnet()),
)
simple("a pass without gradients in the step", make=lambda: SelfDistilled(resnet()))
simple("SWA", callbacks=lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)], max_epochs=3)
simple("EMA", callbacks=lambda: [ema()], val=lambda: batches(steps=1))
simple("EMA with buffers", callbacks=lambda: [ema(use_buffers=True)], val=lambda: batches(steps=1))
simple("early stopping", callbacks=lambda: [EarlyStopping("loss", min_delta=100.0, patience=1)], max_epochs=9)
simple("channels_last", make=channels_last)
simple("activation checkpointing", make=lambda: Task(Checkpointed(False)))
simple("activation checkpointing, reentrant", make=lambda: Task(Checkpointed(True)))
simple("IterableDataset", loader=lambda: DataLoader(Stream(batches().dataset), batch_size=8))
simple("persistent workers", loader=lambda: batches(num_workers=1, persistent_workers=True))
simple("DataLoader generator", loader=lambda: batches(shuffle=True, generator=torch.Generator()))
simple("limit_train_batches", limit_train_batches=2)
simple("limit_train_batches, stream", loader=lambda: DataLoader(Stream(batches().dataset), 8), limit_train_batches=2)
simple("max_time", max_time=timedelta(minutes=5))
simple("max_steps", max_steps=4, max_epochs=-1)
simple("validation inside the epoch", val=lambda: batches(steps=1), val_check_interval=1)
simple("detect_anomaly", detect_anomaly=True)
simple("deterministic", deterministic=True)
simple("inference_mode=False", inference_mode=False, val=lambda: batches(steps=1))
simple(
    "BackboneFinetuning",
    make=WithBackbone,
    callbacks=lambda: [BackboneFinetuning(1, backbone_initial_lr=1e-3)],
)


@row("overfit_batches", "one batch defines the subspaces")
def overfit() -> Report:
    with pytest.warns(LanceWarning, match="has only 1"):
        return check_row(Task(resnet()), batches(), overfit_batches=1)


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


@row("BatchSizeFinder", "its trials run before the calibration: companions count, cores do not")
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
    assert callback.report.layers[0].input_shape[0] == module.batch_size
    return callback.report


@row("ModelPruning", "layers that are pruned before the fit are left alone")
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
    assert all(recorder.swapped)
    assert callback.report is not None
    assert {"net.layer4.0.conv1", "net.fc"} <= {item.name for item in callback.report.left} | {
        layer.name for layer in callback.report.layers
    }
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


def compiled(build: Callable[[Any], Any]) -> Report:
    torch._dynamo.reset()
    try:
        return check_row(build(Task(resnet())), batches(), max_epochs=2)
    finally:
        torch._dynamo.reset()


@row("torch.compile of the network inside")
def compile_inside() -> Report:
    def build(module: Task) -> Task:
        module.net.compile(backend="aot_eager")
        return module

    return compiled(build)


@row("torch.compile of one stage inside")
def compile_stage() -> Report:
    def build(module: Task) -> Task:
        module.net.layer3 = torch.compile(module.net.layer3, backend="aot_eager")
        return module

    return compiled(build)


@row("trainer.fit(torch.compile(module))")
def compile_module() -> Report:
    torch._dynamo.reset()
    module, callback, recorder = Task(resnet()), lance(), Recorder()
    before = snapshot(module)
    make_trainer([callback, recorder]).fit(torch.compile(module, backend="aot_eager"), batches())
    check_fit(module, before, callback, recorder)
    torch._dynamo.reset()
    assert callback.report is not None
    return callback.report


@row("torch.compile after the swap")
def compile_after() -> Report:
    class Late(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net.compile(backend="aot_eager")

    torch._dynamo.reset()
    report = check_row(Task(resnet()), batches(), [Late()], ignore="attributes")  # compile() sets one
    torch._dynamo.reset()
    return report


SLOW = {
    "torch.compile of the network inside",
    "torch.compile after the swap",
    "trainer.fit(torch.compile(module))",
    "two optimisers (GAN)",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ROWS]
)
def test_setup(name: str) -> None:
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
                seen.update(factor.dtype for factor in layer._lance.subspace.factors())

    make_trainer([lance(), Look()], precision=precision, max_epochs=1).fit(Task(resnet()), batches())
    assert seen == {dtype} or (precision == "bf16-mixed" and seen <= {torch.float32, torch.bfloat16})


def test_every_layer_of_both_networks_of_a_gan_is_calibrated() -> None:
    """Manual optimisation: the rehearsal sees what training_step sees, and steps nothing."""
    module, callback = Gan(resnet()), lance()
    report = check_row(module, batches(), callback=callback)
    names = {layer.name for layer in report.layers}
    assert {"generator.down2.0", "paint", "net.layer4.1.conv2"} <= names
    assert {item.name for item in report.left} == {"generator.up"}


def test_manual_steps_are_those_of_training() -> None:
    module, recorder = ManualTask(resnet()), Recorder()
    trainer = make_trainer([lance(), recorder])
    trainer.fit(module, batches(steps=4))
    assert trainer.global_step == 4
    assert module.lr_schedulers().last_epoch == 4  # type: ignore[union-attr]


def test_manual_optimisation_that_bypasses_lightning_observes_its_first_steps() -> None:
    class Raw(ManualTask):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.trainer.optimizers[0]
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    module = Raw(resnet())
    values = [parameter.detach().clone() for parameter in module.parameters()]
    observed: list[tuple[bool, bool]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and not observed:
                same = all(torch.equal(a, b) for a, b in zip(values, pl_module.parameters(), strict=True))
                observed.append((same, callback.session.observing))  # type: ignore[union-attr]

    callback: LanceCallback = lance()
    with pytest.warns(LanceWarning) as caught:
        make_trainer([callback, Look()]).fit(module, batches(steps=4))
    messages = [str(item.message) for item in caught if issubclass(item.category, LanceWarning)]
    assert "Raw.training_step failed without gradients" in messages[0]
    assert "could not be measured" in messages[1]
    assert len(messages) == 2
    assert observed == [(True, True)]
    assert len(callback.state_dict()["subspaces"]) == 21
