"""Where freed memory goes: back to the system at once, or nowhere.

The C library of GNU systems maps a block above a threshold from the system and gives it back when it is freed; smaller
ones come from a heap with holes, whose freed parts stay with the process. The threshold begins at 128 KiB and grows to
the size of the largest mapped block that was freed, up to 32 MiB (``mallopt(3)``, ``M_MMAP_THRESHOLD``): after one
training step most activations lie in the heap, and the process never shrinks again. Setting the threshold ends its
growth.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from lightning_lance.errors import ConfigError, LanceWarning

KIB, MIB = 1 << 10, 1 << 20

_TRIM, _MMAP = -1, -3  # parameters of mallopt, see malloc.h


class Thresholds(NamedTuple):
    """What decides where freed memory goes.

    Attributes:
        mapped: blocks of at least so many bytes are mapped from the system, and given back when they are freed.
        trimmed: the free end of the heap is given back when it has grown to so many bytes.
    """

    mapped: int
    trimmed: int


POLICIES = {"returned": Thresholds(64 * KIB, 64 * KIB), "kept": Thresholds(1 << 30, (1 << 31) - 1)}

STOCK = Thresholds(128 * KIB, 128 * KIB)
GROWN = Thresholds(32 * MIB, 64 * MIB)
"""What the thresholds of a process grow to, once it has freed a block of 32 MiB or more."""

_lock = threading.Lock()
_policies: list[Any] = []  # in force, one in a list of its own: the innermost counts


@contextmanager
def freed_memory(policy: Literal["returned", "kept"] = "returned") -> Iterator[None]:
    """Decide, for the whole process, where freed memory goes inside of the block.

    Afterwards the thresholds are those that the environment sets (``MALLOC_MMAP_THRESHOLD_``,
    ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``); else 32 and 64 MiB, which those of a process that trains grow to by
    themselves. The growing itself cannot be switched on again. Blocks may be nested and overlap; the last one that was
    entered and not left counts.

    With another C library or allocator (musl, macOS, Windows, jemalloc, tcmalloc) nothing happens, and a
    :class:`~lightning_lance.LanceWarning` says so. The memory of accelerators has an allocator of its own.

    Args:
        policy: ``"returned"``: blocks of 64 KiB or more go back to the system at once, so that the peak of the process
            is that of its tensors; what was freed before goes back first. ``"kept"``: all of it stays with the process,
            which takes the most memory and spares the system the work of clearing pages.

    Raises:
        ConfigError: there is no such policy.

    Example:
        >>> from lightning_lance import freed_memory
        >>> with freed_memory("returned"):
        ...     pass  # train
    """
    held = hold(policy)
    try:
        yield
    finally:
        let_go(held)


def hold(policy: str) -> list[str]:
    """The first half of :func:`freed_memory`; :func:`let_go` takes what it returns."""
    if policy not in POLICIES:
        raise ConfigError(f"policy={policy!r} is not allowed. Allowed: {', '.join(map(repr, POLICIES))}.")
    held = [policy]
    library, other = _malloc()
    if library is None:
        warnings.warn(
            f"freed memory is not {policy}: that needs the allocator of glibc, and memory comes from {other} here. "
            "docs/allocators.md has what others offer.",
            LanceWarning,
            stacklevel=3,
        )
        return held
    with _lock:
        _policies.append(held)
        _apply(library)
    return held


def let_go(held: list[str]) -> None:
    """The second half of :func:`freed_memory`; does nothing the second time."""
    library, _ = _malloc()
    with _lock:
        if library is None or not any(entry is held for entry in _policies):
            return
        _policies[:] = [entry for entry in _policies if entry is not held]
        _apply(library)


def _apply(library: Any) -> None:
    policy = _policies[-1][0] if _policies else None
    thresholds = usual(os.environ) if policy is None else POLICIES[policy]
    library.mallopt(_MMAP, thresholds.mapped)
    library.mallopt(_TRIM, thresholds.trimmed)
    if policy != "kept":
        library.malloc_trim(0)


def usual(environment: Mapping[str, str]) -> Thresholds:
    """The thresholds of a process with this environment, once they have grown.

    Args:
        environment: names and values.
    """
    tunables = dict(
        part.split("=", 1) for part in environment.get("GLIBC_TUNABLES", "").split(":") if part.count("=") == 1
    )
    given = [
        _integer(tunables.get(f"glibc.malloc.{name}_threshold", environment.get(f"MALLOC_{name.upper()}_THRESHOLD_")))
        for name in ("mmap", "trim")
    ]
    if given == [None, None]:
        return GROWN
    return Thresholds(*(own if value is None else value for value, own in zip(given, STOCK, strict=True)))


def _integer(text: str | None) -> int | None:
    try:
        return None if text is None else min(int(text, 0), (1 << 31) - 1)  # mallopt takes an int
    except ValueError:
        return None


class _Place(ctypes.Structure):
    """``Dl_info``: where a symbol comes from."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _malloc() -> tuple[Any, str]:
    """The C library where its own ``malloc`` serves this process and has thresholds; otherwise what serves."""
    if not sys.platform.startswith("linux"):
        return None, f"the C library of {sys.platform}"
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return None, "another C library"
    files = []
    for symbol in (library.malloc, library.gnu_get_libc_version):
        place = _Place()
        library.dladdr(ctypes.cast(symbol, ctypes.c_void_p), ctypes.byref(place))
        files.append(place.file)
    if files[0] != files[1]:  # preloaded or linked before it
        return None, os.fsdecode(files[0] or b"elsewhere")
    return library, ""


__all__ = ["freed_memory"]
