"""Fixtures of the tests of the command line tool."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-lance"])
