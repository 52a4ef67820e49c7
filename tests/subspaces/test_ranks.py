"""The ``rank`` argument: what each form means, and how a wrong one is refused."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lance.errors import ConfigError, LanceError
from lightning_lance.subspaces.ranks import (
    AUTO,
    COMPACT,
    ModeRanks,
    RankRules,
    closest,
    compact_batch_rank,
    matches,
    worthwhile,
)

WHOLE = ModeRanks("full", "full", "full")


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ("auto", AUTO),
        (None, WHOLE),
        ("full", WHOLE),
        ("compact", COMPACT),
        (3, ModeRanks(3, 3, 3)),
        (0.7, ModeRanks(0.7, 0.7, 0.7)),
        (1.0, ModeRanks(1.0, 1.0, 1.0)),
        ({"batch": 4}, ModeRanks(4, "full", "full")),
        ({"batch": "compact", "channel": "compact", "spatial": "compact"}, ModeRanks("compact", "full", "compact")),
        ({"feature": 0.97, "token": "compact"}, ModeRanks("full", 0.97, "compact")),
        (OrderedDict(spatial=2), ModeRanks("full", "full", 2)),
    ],
)
def test_a_rule_for_every_layer(rank: Any, expected: ModeRanks) -> None:
    rules = RankRules(rank)
    assert rules.for_layer("any.layer") == expected
    assert rules.patterns == {}


def test_rules_by_layer_pattern_take_the_first_that_matches() -> None:
    rules = RankRules({"layer4.0": {"channel": 0.9}, "layer4": 0.7, "fc": "full", "head*": "compact", "tail": None})
    assert rules.for_layer("layer4.0.conv1") == ModeRanks("full", 0.9, "full")
    assert rules.for_layer("layer4.1.conv1") == ModeRanks(0.7, 0.7, 0.7)
    assert rules.for_layer("fc") == ModeRanks("full", "full", "full")
    assert rules.for_layer("head2") == COMPACT
    assert rules.for_layer("tail") == rules.for_layer("layer1.0") == WHOLE
    assert len(rules.all_rules()) == 6


def test_only_rules_that_project_need_a_swap() -> None:
    assert not WHOLE.projects
    assert all(RankRules(rank).default.projects for rank in ("compact", 3, 1.0, {"batch": 4}, {"spatial": 0.9}))
    assert COMPACT.spatial_rank == 0.9
    assert ModeRanks(spatial=0.5).spatial_rank == 0.5


@pytest.mark.parametrize(
    "rank",
    [
        *[0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "0.7", "half", b"auto", 3j, [4], (0.7,)],
        *[{1, 2}, np.array([1, 2]), torch.ones(2), np.bool_(True), object],
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", ["rank", "rank['batch']", "rank['layer1.*']"])
def test_a_wrong_value_is_named_with_its_place_and_what_is_allowed(rank: Any, place: str) -> None:
    given = {"rank": rank, "rank['batch']": {"batch": rank}, "rank['layer1.*']": {"layer1.*": rank}}[place]
    with pytest.raises(ConfigError) as caught:
        RankRules(given)
    message = str(caught.value)
    assert message.startswith(f"{place}={rank!r} is not a rank")
    whole = "'auto', None, " if place == "rank" else ""
    assert f"Allowed: {whole}'full', 'compact', an int of at least 1" in message
    assert isinstance(caught.value, LanceError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ({}, r"rank=\{\} is empty"),
        ({"batch": 4, "depth": 2}, r"unknown mode 'depth'\. Allowed: batch, channel"),
        ({"chanel": 4}, r"unknown mode 'chanel'\. Allowed modes: batch, channel"),
        ({"Batch": 4}, "unknown mode 'Batch'"),
        ({"spatial": 4, "token": 2}, "names the spatial mode twice"),
        ({"layer1": {"chan": 2}}, r"rank\['layer1'\] has the unknown mode 'chan'"),
        ({"layer1": {}}, r"rank\['layer1'\]"),
        ({"batch": {"batch": 4}}, r"rank\['batch'\]="),
        ({0: 4}, "0"),
        ({None: 4}, "None"),
        ({"batch": 4, 3: 2}, "unknown mode 3"),
    ],
)
def test_a_wrong_mapping_is_refused(rank: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankRules(rank)


def test_numbers_of_numpy_become_python_numbers_that_safe_loading_accepts() -> None:
    found = RankRules({"batch": np.int64(4), "spatial": np.float64(0.75)}).default
    assert (type(found.batch), type(found.spatial)) == (int, float)
    assert (found.batch, found.spatial) == (4, 0.75)


@given(size=st.integers(1, 4096))
def test_compact_batch_rank_is_a_sixth_and_at_least_four(size: int) -> None:
    assert compact_batch_rank(size) == (math.ceil(size / 6) if size > 24 else 4)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("layer4.0.conv1", "layer4", True),
        ("layer4.0.conv1", "layer4.*", True),
        ("layer4.0.conv1", "layer4.0.conv1", True),
        ("layer4.0.conv1", "*.conv1", True),
        ("layer4.0.conv1", "layer", False),
        ("layer4.0.conv1", "layer4.0.conv", False),
        ("layer4.0.conv1", "conv1", False),
        ("layer40.conv1", "layer4", False),
        ("layer4", "layer4.*", False),
        ("blocks.10", "blocks.1", False),
        ("blocks.1", "blocks.[0-3]", True),
        ("Layer1", "layer1", False),
        ("fc", "*", True),
        ("", "*", True),
        ("fc", "", False),
    ],
)
def test_patterns_match_names_and_containers(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_closest_names_what_was_probably_meant() -> None:
    names = ["layer1.conv", "layer4.conv", "fc"]
    assert "layer4.conv" in closest("layer4.con", names)
    assert closest("zzz", names) == "layer1.conv, layer4.conv, fc"
    assert closest("zzz", []) == "none"


@pytest.mark.parametrize(
    ("size", "rank", "work", "expected"),
    [
        (56, 28, 9, True),  # a depthwise convolution: half of the mode is worth it
        (56, 29, 9, False),
        (14, 7, 9, True),
        (7, 6, 512, True),  # a wide layer pays for any of it
        (112, 61, 64, False),  # 61 / 3 of 64 is more than a quarter
        (112, 61, 9 * 64, True),
    ],
)
def test_where_truncating_is_worthwhile(size: int, rank: int, work: float, expected: bool) -> None:
    assert worthwhile(size, rank, work) is expected
