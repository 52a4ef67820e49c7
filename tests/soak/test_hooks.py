"""An exception from any hook, of the module or of a callback before or after ours, leaves the model as it was."""

from __future__ import annotations

import inspect
import random
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from tests.trainers import Classifier, assert_restored, lance, loader, make_trainer, seeded, snapshot

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning_lance.errors.LanceWarning"),
]


class OfTheUserError(Exception):
    """Raised by a hook."""


def hooks(kind: type) -> list[str]:
    return sorted(name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name.startswith("on_"))


CALLBACK = [*hooks(Callback), "setup", "teardown", "state_dict", "load_state_dict"]
MODULE = [
    *hooks(pl.LightningModule),
    *["setup", "teardown", "configure_optimizers", "training_step", "validation_step", "optimizer_step"],
    *["optimizer_zero_grad", "backward", "forward", "train_dataloader", "transfer_batch_to_device"],
    *["configure_gradient_clipping", "lr_scheduler_step", "configure_callbacks"],
]
# Lightning calls the callbacks' on_exception in order and stops where one raises: the next fit restores then.
PLACES = [("module", name) for name in MODULE]
PLACES += [(place, name) for name in CALLBACK for place in ("before", "after") if (place, name)[1] != "on_exception"]


def failing(owner: Any, hook: str, call: int) -> None:
    """Let a hook of an object raise at its n-th call."""
    original, seen = getattr(owner, hook), [0]

    def raising(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == call:
            raise OfTheUserError(hook)
        return original(*args, **kwargs)

    owner.__dict__[hook] = raising


def check(place: str, hook: str, call: int) -> bool:
    """Whether the hook was called as often; the model is asserted to be restored."""
    module = seeded(Classifier)
    callbacks = [Callback(), lance(), Callback()]
    owner = {"module": module, "before": callbacks[0], "after": callbacks[2]}[place]
    if not hasattr(owner, hook):
        return False
    failing(owner, hook, call)
    before = snapshot(module)
    del before["training"]  # Lightning leaves its own eval() of a validation behind
    trainer = make_trainer(callbacks, max_epochs=2, num_sanity_val_steps=1)
    raised = False
    try:
        trainer.fit(module, loader(), loader(8))
    except OfTheUserError:
        raised = True
    assert_restored(module, before)
    owner.__dict__.pop(hook)
    trainer = make_trainer([lance()], max_epochs=1)
    trainer.fit(module, loader())
    assert_restored(module, before)
    return raised


@pytest.mark.parametrize("number", range(12))
def test_a_drawn_hook(number: int) -> None:
    drawn = random.Random(number)
    place, hook = drawn.choice(PLACES)
    check(place, hook, drawn.choice([1, 1, 2]))


@pytest.mark.soak
def test_every_hook() -> None:
    raised = sum(check(place, hook, call) for place, hook in PLACES for call in (1, 2, 4))
    assert raised > 100
    print(f"{raised} exceptions from {len(PLACES)} hooks, the model restored after each")  # noqa: T201
