"""Options: what is taken as given, and how each wrong value is refused."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from lightning_lance.compression.config import LanceConfig
from lightning_lance.errors import ConfigError


def test_the_defaults_are_the_documented_ones() -> None:
    config = LanceConfig()
    assert (config.rank, config.batch, config.layers) == ("auto", "unbiased", "trainable")
    assert (config.bits, config.freeze_norms, config.memory_budget, config.refresh) == ("auto", False, None, None)
    assert config.kept_bits == (4, 4)
    assert config.calibration_batches == 8
    assert config.budget is None
    rules = config.rules().for_layer("any")
    assert (rules.batch, rules.channel, rules.spatial) == ("full", "full", "auto")
    whole = LanceConfig(rank=None).rules().for_layer("any")
    assert (whole.batch, whole.channel, whole.spatial) == ("full", "full", "full")
    compact = LanceConfig(rank="compact").rules().for_layer("any")
    assert (compact.batch, compact.channel, compact.spatial) == ("compact", "full", "compact")


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0.7, "batch": "projected", "bits": None},
        {"rank": 1, "batch": "projected"},
        {"rank": 2},
        {"rank": 1.0},
        {"rank": {"batch": 2, "channel": 1}},
        {"layers": 1},
        {"layers": "layer4.*"},
        {"layers": ["layer4", "fc"]},
        {"layers": ("fc",)},
        {"bits": 2, "freeze_norms": True},
        {"bits": 8, "rank": None},
        {"rank": "compact"},
        {"refresh": "epoch"},
        {"refresh": 1},
        {"calibration_batches": 1, "seed": -5},
    ],
    ids=str,
)
def test_allowed_values_are_kept_as_given(options: dict[str, Any]) -> None:
    config = LanceConfig(**options)
    for name, value in options.items():
        assert getattr(config, name) == value
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("rank", 0, "'auto', None, 'full', 'compact', an int of at least 1"),
        ("rank", 1.01, "a float in (0, 1]"),
        ("rank", float("nan"), "a float in (0, 1]"),
        ("rank", "fast", "'auto'"),
        ("rank", {"chanel": 3}, "batch, channel (or feature), spatial (or token)"),
        ("batch", "biased", "'unbiased', 'projected'"),
        ("batch", None, "'unbiased', 'projected'"),
        ("batch", True, "'unbiased', 'projected'"),
        ("layers", 0, "'trainable', an int of at least 1"),
        ("layers", -2, "an int of at least 1"),
        ("layers", True, "an int of at least 1"),
        ("layers", None, "'trainable'"),
        ("layers", 2.5, "'trainable'"),
        ("layers", [], "['layer4.*', 'fc']"),
        ("layers", [1], "a name pattern or a list of them"),
        ("layers", ["fc", 3], "['layer4.*', 'fc']"),
        ("layers", "", "name pattern"),
        ("bits", 3, "'auto', 2, 4, 8, None"),
        ("bits", True, "'auto', 2, 4, 8, None"),
        ("freeze_norms", "yes", "True, False"),
        ("freeze_norms", None, "True, False"),
        ("memory_budget", 0, "a positive int, or a string such as '4MiB'"),
        ("memory_budget", -4, "a positive int"),
        ("memory_budget", True, "a positive int"),
        ("memory_budget", "4 pages", "KiB, MiB, GiB"),
        ("memory_budget", "", "KiB, MiB, GiB"),
        ("memory_budget", "-4MiB", "KiB, MiB, GiB"),
        ("memory_budget", float("nan"), "a positive int"),
        ("refresh", 0, "None, 'epoch', or an int of at least 1"),
        ("refresh", -1, "None, 'epoch', or an int of at least 1"),
        ("refresh", "step", "None, 'epoch', or an int of at least 1"),
        ("refresh", True, "None, 'epoch', or an int of at least 1"),
        ("refresh", 1.5, "None, 'epoch', or an int of at least 1"),
        ("calibration_batches", 0, "an int of at least 1"),
        ("calibration_batches", True, "an int of at least 1"),
        ("calibration_batches", 2.0, "an int of at least 1"),
        ("calibration_batches", "8", "an int of at least 1"),
        ("seed", 1.5, "an int"),
        ("seed", None, "an int"),
        ("seed", True, "an int"),
        ("seed", "7", "an int"),
        ("seed", 2**63, "an int"),
    ],
)
def test_a_wrong_value_is_named_with_its_option_and_what_is_allowed(option: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LanceConfig(**{option: value})
    message = str(caught.value)
    assert message.startswith(option if isinstance(value, dict) else f"{option}={value!r} is not ")
    shown = next(iter(value)) if isinstance(value, dict) else value
    assert repr(shown) in message
    assert allowed in message.partition("Allowed")[2]


@pytest.mark.parametrize("rank", [1, {"batch": 1}, {"layer1": {"batch": 1}}, {"layer1": 1, "layer2": 0.5}])
def test_one_batch_column_cannot_be_unbiased(rank: Any) -> None:
    with pytest.raises(ConfigError, match=r"batch mode is 1 with batch='unbiased'.*at least 2, or batch='projected'"):
        LanceConfig(rank=rank)
    LanceConfig(rank=rank, batch="projected")


@pytest.mark.parametrize(
    ("given", "count"),
    [(1, 1), (4096, 4096), ("4096", 4096), ("4KiB", 4096), ("4 kib", 4096), ("1.5MB", 1_500_000), ("2 GiB", 2**31)],
)
def test_a_budget_is_a_count_of_bytes(given: int | str, count: int) -> None:
    assert LanceConfig(memory_budget=given).budget == count


def test_a_budget_needs_something_to_project() -> None:
    with pytest.raises(ConfigError, match=r"memory_budget=9 with rank=None"):
        LanceConfig(rank=None, memory_budget=9)


def test_options_cannot_be_changed_behind_the_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LanceConfig().rank = 0  # type: ignore[misc]
