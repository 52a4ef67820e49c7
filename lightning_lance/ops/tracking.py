"""When a layer that keeps a projection cannot run."""

from __future__ import annotations

import torch

from lightning_lance.errors import LanceError


def refuse_transforms(name: str) -> None:
    """For layers that keep a projection: its gradient rule is one of autograd, which torch.func does not take.

    Raises:
        LanceError: a transform of :mod:`torch.func`, such as ``grad`` or ``vmap``, is running.
    """
    if torch._C._are_functorch_transforms_active():
        raise LanceError(
            f"{name or 'the model'}: a torch.func transform (grad, jacrev, ...) reached a layer that keeps only a "
            "projection of its input for autograd. Allowed: loss.backward() and torch.autograd.grad. Call "
            "restore(model) before transforming it, or leave this layer out (layers=...)."
        )
