"""Long forms run with ``-m soak`` only; each test has a short form that runs with all others."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Not in addopts: a `-m` of the user's would take the place of the one there, and run them.
    if "soak" in str(config.getoption("-m") or ""):
        return
    left = [item for item in items if item.get_closest_marker("soak")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
