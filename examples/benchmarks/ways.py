"""Ways to train a whole network in less memory, and a training loop for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.benchmarks.workloads import Batch, Workload, loss
from lightning_lance import LanceConfig, LanceSession, measure_saved_bytes

LEARNING_RATE = 0.01
COMPILED_BUDGET = 0.5


@dataclass(frozen=True)
class Way:
    """What is changed of plain training.

    Attributes:
        title: for people.
        options: of `LanceConfig`; `None`: plain training keeps what it keeps.
        parts: micro-batches that a batch is cut into; gradients add up, the optimiser steps once.
        checkpointing: every block runs its forward pass again in the backward pass.
        autocast: bfloat16 where autocast takes it.
        compiled: `torch.compile`, told to keep this part of the activations and to compute the rest again.
        settling: steps until everything is found and compiled.
    """

    title: str
    options: Mapping[str, Any] | None = None
    parts: int = 1
    checkpointing: bool = False
    autocast: bool = False
    compiled: float | None = None
    settling: int = 1

    @property
    def ours(self) -> bool:
        """Whether this package is in it."""
        return self.options is not None


WAYS = {
    "plain": Way("plain"),
    "half": Way("micro-batches of 1/2", parts=2),
    "quarter": Way("micro-batches of 1/4", parts=4),
    "eighth": Way("micro-batches of 1/8", parts=8),
    "checkpointing": Way("checkpointing by block", checkpointing=True),
    "compile": Way(f"torch.compile, memory budget {COMPILED_BUDGET}", compiled=COMPILED_BUDGET, settling=2),
    "bf16": Way("bf16 autocast", autocast=True),
    "bf16-half": Way("bf16, micro-batches of 1/2", parts=2, autocast=True),
    "bf16-quarter": Way("bf16, micro-batches of 1/4", parts=4, autocast=True),
    "bf16-eighth": Way("bf16, micro-batches of 1/8", parts=8, autocast=True),
    "default": Way("ours", {}),
    "two-bits": Way("ours, 2 bits", {"bits": 2}),
    "ours-half": Way("ours, micro-batches of 1/2", {}, parts=2),
    "ours-quarter": Way("ours, micro-batches of 1/4", {}, parts=4),
    "ours-eighth": Way("ours, micro-batches of 1/8", {}, parts=8),
    "ours-bf16": Way("ours and bf16", {}, autocast=True),
    "ours-bf16-half": Way("ours and bf16, micro-batches of 1/2", {}, parts=2, autocast=True),
    "ours-bf16-quarter": Way("ours and bf16, micro-batches of 1/4", {}, parts=4, autocast=True),
    "ours-bf16-eighth": Way("ours and bf16, micro-batches of 1/8", {}, parts=8, autocast=True),
    "ours-checkpointing": Way("ours and checkpointing", {}, checkpointing=True),
}


class Training:
    """Trains one network in one way with SGD.

    Args:
        workload: the network and its batches.
        way: what is changed of plain training.
        device: where to train.
    """

    def __init__(self, workload: Workload, way: Way, device: torch.device | str = "cpu") -> None:
        self.workload, self.way = workload, way
        self.device = torch.device(device)
        self.model = workload.build().to(self.device)
        self.run: Callable[[Tensor], Tensor] = self.model
        self.session: LanceSession | None = None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def batches(self, count: int) -> list[Batch]:
        """The first batches of the workload, on the device."""
        return [(inputs.to(self.device), labels.to(self.device)) for inputs, labels in self.workload.batches(count)]

    def warm(self, batch: Batch) -> None:
        """A plain pass over two samples, and one in half precision, which some products of ours are in too.

        Libraries load, and compile, what they need for either, which is nobody's peak.
        """
        some = [tensor[:2] for tensor in batch]
        for half in (False, True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                found = loss(self.run, some)
            found.backward()
        self.forget()

    def install(self) -> None:
        """Change what the way changes."""
        if self.way.checkpointing:
            checkpoint_blocks(self.workload.blocks(self.model))
        if self.way.options is not None:
            self.session = LanceSession(self.model, LanceConfig(**self.way.options))
            self.session.start()
        if self.way.compiled is not None:
            import torch._functorch.config as functorch

            functorch.activation_memory_budget = self.way.compiled
            self.run = torch.compile(self.model)

    def step(self, batch: Batch) -> None:
        """One step of the optimiser."""
        self.forget()
        self.backward(batch)
        self.optimizer.step()

    def backward(self, batch: Batch) -> None:
        """Add up the gradients of the parts of a batch."""
        parts = self.parts(batch)
        for inputs, labels in parts:
            self._backward(self.around(), inputs, labels, len(parts))

    def around(self) -> AbstractContextManager[Any]:
        """What a forward pass with its loss runs in."""
        return nullcontext() if self.session is None else self.session.step()

    def parts(self, batch: Batch) -> list[tuple[Tensor, ...]]:
        """The micro-batches of a batch."""
        return list(zip(*(tensor.chunk(self.way.parts) for tensor in batch), strict=True))

    def _backward(self, step: AbstractContextManager[Any], inputs: Tensor, labels: Tensor, parts: int) -> None:
        with step:
            found = self.loss((inputs, labels)) / parts
        found.backward()

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Of one part of a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.way.autocast):
            return loss(self.run, batch)

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def kept(self, batch: Batch) -> int:
        """Bytes that autograd keeps of one part of a batch, after some steps."""
        if self.session is not None:
            assert self.session.report is not None
            compressed = self.session.report.compressed
            assert compressed is not None
            return compressed.total
        return measure_saved_bytes(lambda: self.loss(self.parts(batch)[0]), self.model).total

    def cosine(self, batch: Batch) -> float:
        """Cosine of the gradient of all parameters to that of plain training, at the initial weights."""
        plain = Training(self.workload, WAYS["plain"], self.device)
        with torch.no_grad():
            for own, initial in zip(_tensors(self.model), _tensors(plain.model), strict=True):
                own.copy_(initial)
        found = []
        for training in (self, plain):
            training.forget()
            training.backward(batch)
            found.append(
                torch.cat([p.grad.double().flatten() for p in training.model.parameters() if p.grad is not None])
            )
        one, other = found
        return float(one @ other / (one.norm() * other.norm()))


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Let these modules keep their inputs alone, and run again in the backward pass."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def find(names: Sequence[str], table: Mapping[str, Any], what: str) -> list[str]:
    """Checked names.

    Raises:
        ValueError: one is not in the table.
    """
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; there are {', '.join(table)}")
    return list(names)
