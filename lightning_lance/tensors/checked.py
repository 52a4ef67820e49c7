"""Stored states, read value by value: what is not as it should be is named with its place before anything is used."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_lance.errors import StateError

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""Dtypes of stored tensors of real numbers, by the names that they are stored under."""

LARGEST = (1 << 63) - 1
"""The largest int of 64 bits."""

_LONGEST = 60


class Stored:
    """A value inside of a stored state, with its place.

    Every method returns what it has checked, and raises StateError where the value is another: the message names the
    place inside of the state, what was found and what is allowed.

    Args:
        value: the value.
        place: where it is, such as ``"state['subspaces']['conv1']"``.
        advice: what to do about a bad one; ends every message.
    """

    def __init__(self, value: Any, place: str = "state", advice: str = "") -> None:
        self.value = value
        self.place = place
        self.advice = advice

    def refuse(self, allowed: str, found: str | None = None) -> NoReturn:
        """Raise StateError.

        Args:
            allowed: what the value may be.
            found: what it is; described by default.
        """
        text = f"{self.place} is {described(self.value) if found is None else found}. Allowed: {allowed}."
        raise StateError(f"{text} {self.advice}".rstrip())

    def _part(self, key: Any, value: Any) -> Stored:
        return Stored(value, f"{self.place}[{key!r}]", self.advice)

    def fields(self, *names: str) -> tuple[Stored, ...]:
        """The values of a dict under these keys, which must be there."""
        if not isinstance(self.value, dict):
            self.refuse(f"a dict with {', '.join(names)}")
        for name in names:
            if name not in self.value:
                self.refuse(f"a dict with {', '.join(names)}", f"a dict without {name!r}")
        return tuple(self._part(name, self.value[name]) for name in names)

    def named(self) -> Iterator[tuple[str, Stored]]:
        """Keys, which must be strings, and values of a dict."""
        if not isinstance(self.value, dict) or not all(isinstance(key, str) for key in self.value):
            self.refuse("a dict with names as keys")
        return iter([(key, self._part(key, value)) for key, value in self.value.items()])

    def items(self, length: int | None = None) -> list[Stored]:
        """The values of a list or tuple, of a length where one is given."""
        allowed = "a list" if length is None else f"a list of {length}"
        if not isinstance(self.value, (list, tuple)):
            self.refuse(allowed)
        if length is not None and len(self.value) != length:
            self.refuse(allowed, f"a list of {len(self.value)}")
        return [self._part(index, value) for index, value in enumerate(self.value)]

    def integer(self, low: int, high: int = LARGEST) -> int:
        """An int, not a bool, from ``low`` to ``high``."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(f"an int of at least {low}" if high == LARGEST else f"an int from {low} to {high}")
        return int(value)

    def integers(self, low: int, length: int | None = None) -> tuple[int, ...]:
        """A list of ints of at least ``low``."""
        return tuple(item.integer(low) for item in self.items(length))

    def number(self, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> float:
        """A finite number, not a bool, from ``low`` to ``high``."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.refuse(f"a number from {low:g} to {high:g}")
        return float(value)

    def real(self) -> float:
        """A number, not a bool, which may be NaN or infinite."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.refuse("a number")
        try:
            return float(self.value)
        except OverflowError:
            self.refuse("a number that a float can hold")

    def flag(self) -> bool:
        """A bool."""
        if not isinstance(self.value, bool):
            self.refuse("True, False")
        return bool(self.value)

    def text(self, allowed: Collection[str] | None = None) -> str:
        """A string, one of the allowed ones where these are given."""
        if not isinstance(self.value, str) or (allowed is not None and self.value not in allowed):
            self.refuse("a string" if allowed is None else ", ".join(map(repr, allowed)))
        return str(self.value)

    def version(self, expected: int) -> None:
        """Exactly this version."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value != expected:
            self.refuse(f"{expected}, which this version of the package reads", f"{described(self.value)}")

    def tensor(
        self,
        shape: Sequence[int | None],
        dtypes: Collection[torch.dtype] = tuple(FLOATS.values()),
        finite: bool = True,
    ) -> Tensor:
        """A dense tensor.

        Args:
            shape: its lengths; ``None`` for any.
            dtypes: what its dtype may be.
            finite: whether NaN and Inf are refused.
        """
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        lengths = ", ".join("any" if length is None else str(length) for length in shape)
        allowed = f"a dense tensor of shape ({lengths}) and of dtype {names}"
        found = self.value
        if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta or found.is_quantized:
            self.refuse(allowed)
        fits = len(found.shape) == len(shape) and all(
            wanted is None or length == wanted for length, wanted in zip(found.shape, shape, strict=True)
        )
        if found.dtype not in dtypes or not fits:
            self.refuse(allowed)
        if finite and not bool(found.isfinite().all()):
            self.refuse("finite numbers", f"{described(found)} with NaN or Inf")
        return found.detach()

    def orthonormal(self, basis: Tensor, zeros: bool = False, off: float | None = None) -> None:
        """Refuse columns ``(n, r)`` that are not orthonormal.

        Args:
            basis: the value or a part of it.
            zeros: allow columns of zeros.
            off: how far their inner products may be from 0 and 1; by default as far as their dtype can say.
        """
        wide = basis.double()
        gram = wide.T @ wide
        wanted = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        if zeros:
            wanted *= wide.any(0).to(wanted)
        found = float((gram - wanted).abs().max()) if gram.numel() else 0.0
        if basis.shape[1] > basis.shape[0] and not zeros:
            found = math.inf
        if not found <= (tolerance(basis.dtype) if off is None else off):
            self.refuse("orthonormal columns", f"{described(self.value)} with columns {found:.2g} off orthonormal ones")


def tolerance(dtype: torch.dtype) -> float:
    """How far inner products of stored orthonormal columns may be from 0 and 1."""
    return max(4 * torch.finfo(dtype).eps, 1e-4)


def described(value: Any) -> str:
    """What a value is, in a few words on one line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"a {type(value).__name__}"
