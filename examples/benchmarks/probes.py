"""What a benchmark of continual learning measures: plugins that watch an Avalanche strategy and change nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lightning_lance import ContinualMetrics, measure_saved_bytes
from lightning_lance.avalanche import LancePlugin
from lightning_lance.compression.isolation import isolated


class AccuracyMatrix(SupervisedPlugin):
    """Fills :class:`~lightning_lance.ContinualMetrics` during `strategy.eval`.

    Attributes:
        trained: the experience that the rows belong to; set it before each `eval`.
    """

    def __init__(self, experiences: int) -> None:
        super().__init__()
        self.metrics = ContinualMetrics(experiences)
        self.trained: int | None = None

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.metrics.update(
            strategy.mb_output.detach().cpu(),
            strategy.mb_y.cpu(),
            trained=self.trained,
            evaluated=strategy.experience.current_experience,
        )


def _now(strategy: Any) -> float:
    if torch.device(strategy.device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class StepStart(SupervisedPlugin):
    """Give it before the method's plugin; see :class:`StepEnd`."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.times.append(_now(strategy))


class StepEnd(SupervisedPlugin):
    """Give it after the method's plugin: both together hold when each training step began and ended."""

    def __init__(self, start: StepStart) -> None:
        super().__init__()
        self.start = start
        self.times: list[float] = []

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.times.append(_now(strategy))

    def seconds(self, began: float, ended: float) -> tuple[list[float], float, float]:
        """Durations of the steps since the last call, from the first to the last of them, and before and after these.

        The second holds what a step waits for, such as its data, as the third does for the batches of a calibration.

        Args:
            began: when `strategy.train` was called.
            ended: when it returned.
        """
        starts, ends = self.start.times, self.times
        boundary = (starts[0] - began) + (ended - ends[-1])
        training = ends[-1] - starts[0]
        steps = [end - start for start, end in zip(starts, ends, strict=True)]
        self.start.times, self.times = [], []
        return steps, training, boundary


class MemoryProbe(SupervisedPlugin):
    """Measures the second training step of one experience, before it is run; LANCE has measured its first one.

    Give it as the first plugin, and the time of that step is not disturbed.

    Args:
        experience: the experience to measure in, counted in calls of `train`.
        method: what holds the method's state: its plugin, or anything that :func:`tensor_bytes` can walk. `None` where
            there is none.

    Attributes:
        kept: bytes that autograd keeps for backward: loss and penalties of the method included.
        state: bytes that the method holds beside model, gradients and optimiser.
    """

    def __init__(self, experience: int, method: Any = None) -> None:
        super().__init__()
        self.experience = experience
        self.method = method
        self.kept = 0
        self.state = 0
        self._steps = 0

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_counter != self.experience:
            return
        self._steps += 1
        if self._steps != 2:  # the first step of a run makes caches
            return

        def loss() -> Tensor:
            strategy.mb_output = strategy.forward()
            strategy.loss = strategy._make_empty_loss()
            strategy.loss += strategy.criterion()
            # Penalties and distillation are added here.
            strategy._before_backward()
            return strategy.loss

        report = _report(self.method)
        if report is None:
            with isolated(strategy.model):
                self.kept = measure_saved_bytes(loss, strategy.model).total
            strategy.mb_output = None
        else:
            self.kept = report.compressed.total
        self.state = tensor_bytes(self.method, strategy.model)


def _report(method: Any) -> Any:
    """What the steps of a plugin of ours keep, which hooks cannot see."""
    compression = method.session.compression if isinstance(method, LancePlugin) else None
    return None if compression is None else compression.report


def tensor_bytes(root: Any, model: nn.Module | None = None) -> int:
    """Bytes of all tensors, arrays and stored samples that can be reached from an object.

    Each storage counts once. A dataset counts as the samples that it holds.

    Args:
        root: an object, container, tensor, module or dataset.
        model: its parameters, gradients and buffers are left out.
    """
    seen: set[int] = set()
    if model is not None:
        for tensor in [*model.parameters(), *model.buffers()]:
            seen.add(tensor.untyped_storage().data_ptr())
    total = 0
    visited: dict[int, Any] = {}  # holds what it has seen, so that no id is used twice
    queue = [root]
    while queue:
        item = queue.pop()
        if item is None or id(item) in visited or isinstance(item, (str, bytes, int, float, type, torch.dtype)):
            continue
        visited[id(item)] = item
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        elif isinstance(item, np.ndarray):
            total += item.nbytes
        elif isinstance(item, AvalancheDataset):
            if len(item):
                values = [value for value in item[0] if isinstance(value, Tensor)]
                total += len(item) * sum(value.numel() * value.element_size() for value in values)
        elif isinstance(item, (torch.utils.data.DataLoader, torch.optim.Optimizer)):
            continue  # its dataset is counted where it belongs, and the optimiser's state is no method's
        elif isinstance(item, Mapping):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue += item
        elif hasattr(item, "__dict__") and not callable(getattr(item, "__next__", None)):
            queue += vars(item).values()
    return total
