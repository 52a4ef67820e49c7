"""A stream that is killed and started again and again ends with the numbers of one that was not, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.avalanche import runs
from tests.processes import in_process, started
from tests.streams.test_runner import assert_same, uninterrupted  # noqa: F401

KINDS: list[dict[str, Any]] = [
    {"lance": {}},
    {"model": "own", "continual": True, "lance": {}},
    {"model": "single", "benchmark": "nc"},
    {"model": "growing", "benchmark": "class-incremental"},
    {"model": "task", "continual": True, "lance": {"threshold": 0.8}},
    {"model": "own", "augment": True},
]


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.usefixtures("one_thread")
class TestKilled:
    def test_at_drawn_batches(self, uninterrupted: Any, cwd: Path) -> None:  # noqa: F811
        """Five batches of a continual stream, drawn once."""
        drawn = random.Random(5)
        kills = drawn.sample([(experience, step) for experience in range(3) for step in range(8)], 5)
        options = KINDS[1]
        for _ in kills:
            assert in_process(runs.run, cwd / "killed", kills=kills, **options) == -signal.SIGKILL
        assert in_process(runs.run, cwd / "killed", kills=kills, **options) == 0
        assert_same(cwd / "killed", uninterrupted(**options))

    @pytest.mark.parametrize(
        "points", [pytest.param(6, id="short"), pytest.param(None, id="long", marks=pytest.mark.soak)]
    )
    def test_at_single_operations_on_files(self, uninterrupted: Any, cwd: Path, points: int | None) -> None:  # noqa: F811
        """Before a file is opened, synced, renamed or removed: one of each kind, drawn; or every single one."""
        options = KINDS[4]
        assert in_process(runs.run_listed, cwd / "listed", cwd / "operations", **options) == 0
        operations = (cwd / "operations").read_text().splitlines()
        wanted = uninterrupted(**options)
        assert_same(cwd / "listed", wanted)
        chosen = list(range(len(operations)))
        if points is not None:
            kinds = [
                "open inside",
                "os.rename inside",
                "os.remove inside",
                "open .exp",
                "os.rename exp",
                "os.rename res",
            ]
            drawn = random.Random(1)
            chosen = [drawn.choice([n for n, what in enumerate(operations) if what.startswith(kind)]) for kind in kinds]
            assert len(set(chosen)) == points
        for number in chosen:
            root = cwd / f"killed {number}"
            assert in_process(runs.run_until, root, number, **options) == -signal.SIGKILL, operations[number]
            assert in_process(runs.run, root, **options) == 0, operations[number]
            assert_same(root, wanted)
            assert files(root) == files(wanted), operations[number]
            shutil.rmtree(root)
        print(f"killed before {len(chosen)} of {len(operations)} operations on files, each ended bit-equal")  # noqa: T201

    @pytest.mark.soak
    def test_at_any_moment(self, uninterrupted: Any, cwd: Path) -> None:  # noqa: F811
        """Sixty kills by the clock, so that they also hit evaluations, and files that are being written."""
        drawn, killed, streams = random.Random(), 0, 0
        while killed < 60:
            options, root = KINDS[streams % len(KINDS)], cwd / f"killed {streams}"
            began = time.monotonic()
            wanted = uninterrupted(**options)
            lasts = max(time.monotonic() - began, 1.0)
            for _ in range(40):
                process = started(runs.run, root, **options)
                process.join(drawn.uniform(0.0, lasts))
                process.kill()
                process.join()
                if process.exitcode == 0:
                    break
                killed += 1
            else:
                assert in_process(runs.run, root, **options) == 0
            assert_same(root, wanted)
            streams += 1
        print(f"{killed} kills of {streams} streams, each ended bit-equal")  # noqa: T201
