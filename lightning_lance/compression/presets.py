"""Presets: one name for the values of many options, and what a preset does not allow beside itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_lance.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """Values of options by name.

    Attributes:
        compression: of :class:`~lightning_lance.LanceConfig`.
        stream: those of them that are others in a stream of experiences.
        protection: of :class:`~lightning_lance.continual.ContinualConfig`.
        usual: of either, where no other value is given.
    """

    compression: Mapping[str, Any]
    stream: Mapping[str, Any]
    protection: Mapping[str, Any]
    usual: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    # Apolinario & Roy, LANCE, arXiv 2509.21617; docs/experiments.md compares it with the defaults.
    "published": Preset(
        compression={
            "rank": 0.7,
            "bits": None,
            "batch": "learned",
            "skip": ("depthwise", "classifier"),
            "freeze_norms": True,
            "memory_budget": None,
            "refresh": None,
            "calibration": "eval",
        },
        stream={"rank": {"batch": 0.98, "spatial": 0.98}},
        protection={
            "rule": "threshold",
            "compress_first": False,
            "reserved": "threshold",
            "damping": 0.0,
            "freeze_above": 1.0,
        },
        usual={"calibration_batches": 100, "threshold": 0.97},
    ),
}


def preset_named(name: str | None) -> Preset | None:
    """The preset of a name; ``None`` for none.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset={name!r} is not allowed. Allowed: None, {', '.join(map(repr, PRESETS))}.")
    return PRESETS[name]


def settle(config: Any, name: str, values: Mapping[str, Any], also: Mapping[str, Any] | None = None) -> None:
    """Give the options of a frozen dataclass the values of a preset, in place.

    Args:
        config: the options; one that has its default counts as not given.
        name: of the preset.
        values: option -> value.
        also: option -> another value that is right where it is given.

    Raises:
        ConfigError: an option was given another value.
    """
    defaults = {option.name: option.default for option in fields(config)}
    for option, value in values.items():
        given = getattr(config, option)
        if given == defaults[option]:
            object.__setattr__(config, option, value)
        elif given != value and given != (also or {}).get(option, value):
            raise ConfigError(
                f"{option}={given!r} contradicts preset={name!r}, which has {option}={value!r}. Leave out one of them."
            )
