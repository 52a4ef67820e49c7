"""When an operation may keep less for backward than the stock one."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lance.errors import LanceError


def tracked(input: Tensor, *parameters: Tensor | None) -> bool:
    """Whether autograd will record an operation on these tensors, and they are of a kind that we know how to keep.

    Nested, sparse and functorch-wrapped tensors take the stock path, and so does everything without a gradient.
    """
    return (
        torch.is_grad_enabled()
        and (input.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in parameters))
        and input.layout is torch.strided
        and not input.is_nested
        and not torch._C._are_functorch_transforms_active()
    )


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
