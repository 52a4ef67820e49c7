"""Byte counts as text."""

from __future__ import annotations

import re

from lightning_lance.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(value: int | str, name: str = "memory_budget") -> int:
    """``"4MiB"``, ``"500 kB"`` or a plain count -> bytes; ``name`` is what to call the value in a message.

    Raises:
        ConfigError: not a positive number of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if isinstance(value, bool) or match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(
            f"{name}={value!r} is not a number of bytes. Allowed: a positive int, or a string such as '4MiB' "
            "or '500kB' (units B, kB, MB, GB, KiB, MiB, GiB)."
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """``1234567`` -> ``'1.23 MB'`` (decimal units)."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":  # what rounds to 1000 belongs to the next unit
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
