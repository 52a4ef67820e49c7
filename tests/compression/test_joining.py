"""Layers that a fine-tuning schedule unfreezes join a running fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_lance.compression.surgery import compressed_layers
from tests.trainers import (
    CLASSES,
    Classifier,
    EpochLoader,
    Recorder,
    Reseed,
    assert_restored,
    assert_same_weights,
    fit,
    lance,
    seeded,
    small_net,
    snapshot,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*dataloader_iter"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning"),
]


class WithBackbone(Classifier):
    """What BackboneFinetuning asks for."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.backbone = small_net()
        self.backbone.append(nn.Linear(CLASSES, 16))
        self.backbone.append(nn.ReLU())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.05, momentum=0.9)


class Watch(Callback):
    """Which layers have a subspace, at the start of each step."""

    def __init__(self) -> None:
        self.layers: list[set[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        found = compressed_layers(pl_module)
        self.layers.append({name for name, layer in found.items() if layer._lance.subspace is not None})


def unfreeze_at(epoch: int) -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=epoch, backbone_initial_lr=0.02, train_bn=True)


LATE = {"backbone.0", "backbone.3", "backbone.9", "backbone.10"}


@pytest.mark.parametrize("train_bn", [True, False])
def test_backbone_joins_when_it_unfreezes(train_bn: bool) -> None:
    """The first three steps of what joins define its subspaces."""
    schedule = BackboneFinetuning(1, backbone_initial_lr=0.02, train_bn=train_bn)
    watch, callback = Watch(), lance()
    module = WithBackbone()
    before = snapshot(module)
    fit(module, [schedule, callback, watch], EpochLoader())
    assert_restored(module, before)
    assert watch.layers == [set()] * 4 + [{"head"}] * 5 + [{"head"} | LATE]
    assert callback.report is not None
    assert {layer.name for layer in callback.report.layers} == {"head"} | LATE


def test_join_equals_plain_training_at_full_rank() -> None:
    """No sample, statistic or draw is taken when layers join."""
    plain, compressed = seeded(WithBackbone), seeded(WithBackbone)
    recorders = Recorder(), Recorder()
    fit(plain, [unfreeze_at(1), recorders[0]], EpochLoader(), precision="64-true", max_epochs=3)
    fit(
        compressed,
        [unfreeze_at(1), lance(rank=10**6, bits=None), recorders[1]],
        EpochLoader(),
        precision="64-true",
        max_epochs=3,
    )
    assert recorders[0].samples == recorders[1].samples
    assert_same_weights(weights(plain), weights(compressed), 1e-10)


class Thaw(BaseFinetuning):
    """Unfreezes one module of the backbone per epoch, from the last; what Lightning forgets on a resume included."""

    order = (10, 9, 3, 0)

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        for index in self.order[:epoch]:
            self.make_trainable(pl_module.backbone[index])
        if 0 < epoch <= len(self.order):
            group = {"params": list(pl_module.backbone[self.order[epoch - 1]].parameters()), "lr": 0.01}
            optimizer.add_param_group(group)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A resume in the middle of an epoch skips on_train_epoch_start: unfreeze what the run had unfrozen."""
        for index in self.order[: trainer.current_epoch]:
            self.make_trainable(pl_module.backbone[index])


@pytest.mark.parametrize("refresh", [None, "epoch", 4])
def test_resume_around_joins_equals_the_uninterrupted_run(refresh: Any, tmp_path: Path) -> None:
    def run(path: Path | None) -> tuple[Any, Recorder]:
        module, recorder = seeded(WithBackbone), Recorder()
        callbacks: list[Callback] = [Reseed(), Thaw(), lance(refresh=refresh), recorder]
        if path is None:
            callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
            callbacks.append(ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="epoch-{step}"))
        fit(
            module,
            callbacks,
            EpochLoader(24),
            ckpt_path=path,
            max_epochs=4,
            enable_checkpointing=path is None,
        )
        return module, recorder

    whole, recorder = run(None)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 12 + 4
    for path in checkpoints:
        step = torch.load(path)["global_step"]
        if step == 12 or (step % 3 == 0 and not path.name.startswith("epoch")):
            continue  # saved in the last step of an epoch: Lightning then forgets the next on_train_epoch_start
        resumed, part = run(path)
        assert part.losses == recorder.losses[step:], step
        assert_same_weights(weights(whole), weights(resumed))


def test_layers_unfrozen_by_hand_inside_an_epoch_join_at_the_next_step() -> None:
    class ByHand(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                pl_module.backbone.requires_grad_(True)

    module, watch = WithBackbone(), Watch()
    module.backbone.requires_grad_(False)
    fit(module, [ByHand(), lance(), watch], EpochLoader())
    assert watch.layers == [set()] * 6 + [{"head"} | LATE] * 4
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_freeze_norms_follows_the_schedule() -> None:
    """A norm that is unfrozen trains in training mode again; flags come back."""
    flags: list[bool] = []

    class Flags(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            flags.append(pl_module.backbone[1].training)

    module = WithBackbone()
    before = snapshot(module)
    schedule = BackboneFinetuning(1, backbone_initial_lr=0.02, train_bn=True)
    schedule.freeze_before_training = lambda pl_module: schedule.freeze(pl_module.backbone, train_bn=False)  # type: ignore[method-assign]
    fit(module, [schedule, lance(freeze_norms=True), Flags()], EpochLoader())
    assert flags == [False] * 5 + [True] * 5
    assert_restored(module, before)
