"""Stored states with one thing changed somewhere, drawn by hypothesis."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_lance import StateError

EXAMPLES = int(os.environ.get("MUTATIONS", "200"))
"""Changes that are drawn in each test; a long run asks for more."""

DELETED = object()

OTHERS: list[Any] = [
    *[None, True, False, -1, 0, 1, 2, 7, 10**9, 10**400, 0.5, -0.5, 1e30, float("nan"), float("inf")],
    *["", "bogus", "full", "float32", "float64", b"bytes", [], {}, (), [1, 2], [-3], {"a": 1}, [[1], [2]]],
    *[torch.zeros(()), torch.ones(3), torch.eye(3), torch.full((2, 2), float("nan")), torch.arange(4)],
]
"""Replacements of any value."""


def of_tensor(tensor: Tensor) -> list[Any]:
    """The tensor, damaged in some way."""
    flat = tensor.reshape(-1)
    found: list[Any] = [
        tensor.to(torch.float16),
        tensor.to(torch.float64) if tensor.dtype != torch.float64 else tensor.to(torch.float32),
        tensor.to(torch.int64),
        tensor.to(torch.complex64),
        tensor.to("meta"),
        tensor.unsqueeze(0),
        tensor.tolist(),
        torch.zeros_like(tensor),
        -tensor,
        tensor * 1e20,
        tensor * 1.01,
        tensor + 1.0,
    ]
    if tensor.dim() and tensor.numel():
        found += [tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor[..., :-1], tensor.to_sparse()]
        found += [torch.cat([tensor, tensor[..., :1]], -1), tensor.mT if tensor.dim() > 1 else tensor.flip(0)]
    for value in (float("nan"), float("inf"), 1e30, -1.0):
        if tensor.numel():
            one = flat.clone()
            one[len(one) // 2] = value
            found.append(one.reshape(tensor.shape))
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is, from the outside in; the whole state is the empty path."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return value
    key, parent = path[0], copy.copy(state)
    items = list(parent) if isinstance(parent, tuple) else parent
    if len(path) == 1 and value is DELETED:
        del items[key]
    else:
        items[key] = changed(state[key], path[1:], value)
    return tuple(items) if isinstance(parent, tuple) else items


@st.composite
def mutated(draw: st.DrawFn, state: Any) -> tuple[str, Any]:
    """A state with one change, and what was done."""
    path = draw(st.sampled_from(list(places(state))))
    value = at(state, path)
    kinds = ["other"] * 2
    if path:
        kinds.append("deleted")
    if isinstance(value, Tensor):
        kinds += ["tensor"] * 6
    if isinstance(value, (list, dict)) and value:
        kinds.append("container")
    kind = draw(st.sampled_from(kinds))
    if kind == "deleted":
        new = DELETED
    elif kind == "tensor":
        new = draw(st.sampled_from(of_tensor(value)))
    elif kind == "container" and isinstance(value, list):
        new = draw(st.sampled_from([value[:-1], [*value, value[0]], value[::-1], tuple(value), dict(enumerate(value))]))
    elif kind == "container":
        new = draw(st.sampled_from([{**value, "more": 1}, {**value, 3: 1}, list(value), list(value.items())]))
    else:
        new = draw(st.sampled_from(OTHERS))
    said = "deleted" if new is DELETED else f"{type(new).__name__} {new!r:.60}"
    return f"{path}: {said}", changed(state, path, new)


def refusal(load: Any, *args: Any) -> str | None:
    """The message of the StateError that a call raises, which is one line; ``None`` where it accepts the state."""
    try:
        load(*args)
    except StateError as error:
        text = str(error)
    else:
        return None
    assert "\n" not in text
    return text


def same(one: Any, other: Any) -> bool:
    """Bit-equal states; NaN is equal to NaN."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
