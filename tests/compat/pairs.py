"""Time of training steps, ours next to plain ones in the same process, in turn."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from tests.compat.networks import Case
from tests.compat.rows import data, lance
from tests.compat.setups import CASE, Setup
from tests.trainers import make_trainer

BATCH = 16
SIZE = 64
SKIPPED = 3
PAIRS = 8
FEWEST = 5
SECONDS = 12.0


class Turns:
    """Lets two threads run strictly in turn, until one has finished."""

    def __init__(self) -> None:
        self.side: int | None = 0
        self.changed = threading.Condition()

    def wait(self, side: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.side in (side, None))

    def hand_over(self, side: int) -> None:
        with self.changed:
            if self.side is not None:
                self.side = 1 - side
                self.changed.notify_all()
        self.wait(side)

    def finish(self) -> None:
        with self.changed:
            self.side = None
            self.changed.notify_all()


class Timed(Callback):
    """Times each step with all that the other callbacks do around it, then lets the other side do one."""

    def __init__(self, turns: Turns, side: int) -> None:
        self.turns, self.side = turns, side
        self.times: list[float] = []
        self.begun = time.monotonic()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.process_time() - self.start)
        found = len(self.times) - SKIPPED
        late = time.monotonic() - self.begun > SECONDS
        trainer.should_stop = found >= PAIRS or (late and found >= FEWEST)
        if trainer.should_stop:
            self.turns.finish()
        else:
            self.turns.hand_over(self.side)


def step_ratio(setup: Setup, case: Case) -> float:
    """Median over pairs of the processor time of a step of ours to that of a plain one.

    Args:
        setup: what is trained, and how.
        case: its inputs.
    """
    turns, sides = Turns(), []
    failed: list[BaseException] = []

    def batches(**options: Any) -> DataLoader[Any]:
        return data(case, **{"batch": BATCH, **options})

    def train(side: int) -> None:
        turns.wait(side)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        own = [lance()] if side else []
        callbacks = [timed[side], *setup.callbacks(), *own, *setup.later()]
        options = {**setup.options, "max_epochs": 1000}
        try:
            make_trainer(callbacks, **options).fit(setup.make(), setup.loader(batches), setup.val(batches))
        except BaseException as error:
            failed.append(error)
        finally:
            turns.finish()

    timed = [Timed(turns, side) for side in range(2)]
    for side in range(2):
        sides.append(threading.Thread(target=train, args=(side,), daemon=True))
        sides[-1].start()
    for thread in sides:
        thread.join()
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch._dynamo.reset()
    if failed:
        raise failed[0]
    pairs = zip(timed[0].times[SKIPPED:], timed[1].times[SKIPPED:], strict=False)
    return statistics.median(ours / plain for plain, ours in pairs)


def setup_ratio(setup: Setup) -> float:
    """:func:`step_ratio` on ResNet-18 with larger inputs than those of the tests."""
    return step_ratio(setup, Case(CASE.build, (3, SIZE, SIZE)))
