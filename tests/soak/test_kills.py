"""A stream that is killed and started again and again ends with the numbers of one that was not, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.streams.test_runner import assert_same, in_process, server, uninterrupted  # noqa: F401

KINDS: list[dict[str, Any]] = [
    {"lance": {}},
    {"model": "own", "continual": True, "lance": {}},
    {"model": "single", "benchmark": "nc"},
    {"model": "growing", "benchmark": "class-incremental"},
    {"model": "task", "continual": True, "lance": {"threshold": 0.8}},
    {"model": "own", "augment": True},
]


@pytest.mark.usefixtures("one_thread")
class TestKilled:
    def test_at_drawn_batches(self, server: Any, uninterrupted: Any, cwd: Path) -> None:  # noqa: F811
        """Five batches of a continual stream, drawn once."""
        drawn = random.Random(5)
        kills = drawn.sample([(experience, step) for experience in range(3) for step in range(8)], 5)
        options = KINDS[1]
        for _ in kills:
            assert in_process(server, cwd / "killed", kills=kills, **options) == -signal.SIGKILL
        assert in_process(server, cwd / "killed", kills=kills, **options) == 0
        assert_same(cwd / "killed", uninterrupted(**options))

    @pytest.mark.soak
    def test_at_any_moment(self, server: Any, uninterrupted: Any, cwd: Path) -> None:  # noqa: F811
        """Sixty kills by the clock, so that they also hit evaluations, and files that are being written."""
        from tests.avalanche import runs

        drawn, killed, streams = random.Random(), 0, 0
        while killed < 60:
            options, root = KINDS[streams % len(KINDS)], cwd / f"killed {streams}"
            began = time.monotonic()
            wanted = uninterrupted(**options)
            lasts = max(time.monotonic() - began, 1.0)
            for _ in range(40):
                process = server.Process(target=runs.run, args=(root,), kwargs=options)
                process.start()
                process.join(drawn.uniform(0.0, lasts))
                process.kill()
                process.join()
                if process.exitcode == 0:
                    break
                killed += 1
            else:
                assert in_process(server, root, **options) == 0
            assert_same(root, wanted)
            streams += 1
        print(f"{killed} kills of {streams} streams, each ended bit-equal")  # noqa: T201
