"""A stored stream with one thing changed somewhere is loaded as a whole, or refused and nothing is changed."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lance import StateError
from lightning_lance.continual import ContinualConfig, ContinualSession
from tests.mutations import mutated


def stream(rule: str) -> ContinualSession:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    session = ContinualSession(options=ContinualConfig(heads=["2"], rule=rule))
    for index in range(2):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(index)) @ torch.randn(4, 12)
        session.begin_experience(model, [lambda x=x: model(x)])  # type: ignore[misc]
        session.end_experience(model, [lambda x=x: model(x)])  # type: ignore[misc]
    return session


STREAMS = {rule: stream(rule) for rule in ("threshold", "scaled")}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_all_or_nothing(data: Any) -> None:
    session = STREAMS[data.draw(st.sampled_from(sorted(STREAMS)))]
    before = session.state_dict()
    what, state = data.draw(mutated(session.state_dict()))
    note(what)
    memories, experience = session.memories, session.experience
    try:
        session.load_state_dict(state)
    except StateError:
        assert session.memories is memories
        assert session.experience == experience
    else:
        session.load_state_dict(before)
