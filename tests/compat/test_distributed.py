"""Two processes on the CPU: DDP by Lightning's own strategies, and modules that FSDP2 shards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lightning_lance import LanceConfig, LanceSession
from tests.compat import distributed
from tests.compat.rows import write
from tests.swapped import COMPACT_MODES
from tests.trainers import seeded

pytestmark = [pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).resolve().parents[2]


def ranks(folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(distributed.WORLD)]


def assert_bit_equal(one: Any, other: Any) -> None:
    left, right = tree_leaves(one), tree_leaves(other)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def run(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.compat.distributed", str(folder), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def assert_ranks_agree(folder: Path, layers: tuple[str, ...] = ("net.0", "net.3", "net.7")) -> dict[str, Any]:
    """Both ranks have the same weights, subspaces and sample orders, bit for bit."""
    first, second = ranks(folder)
    assert first["swapped"]
    assert second["swapped"]
    assert first["layers"] == list(layers)
    for key in ("weights", "subspaces", "order"):
        assert_bit_equal(first[key], second[key])
    assert first["bytes"][1] < first["bytes"][0]
    assert not torch.equal(first["batches"][0], second["batches"][0])
    return first  # type: ignore[no-any-return]


def test_ddp_in_a_subprocess(tmp_path: Path) -> None:
    """Gram matrices are summed: one process that sees the batches of both ranks finds the same projections."""
    run(tmp_path, "ddp")
    first = assert_ranks_agree(tmp_path)
    model = seeded(distributed.network)
    session = LanceSession(model, LanceConfig(rank=COMPACT_MODES))
    session.start(observe=False)
    seen = [batch for rank in ranks(tmp_path) for batch in rank["batches"][:2]]
    session.calibrate([lambda batch=batch: model(batch) for batch in seen])
    expected = session.state_dict()["subspaces"]
    session.stop()
    assert {name.removeprefix("net.") for name in first["subspaces"]} == set(expected)
    compared = 0
    for name, subspace in expected.items():
        for ours, theirs in zip(tree_leaves(first["subspaces"][f"net.{name}"]), tree_leaves(subspace), strict=True):
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-3, atol=1e-3)
                compared += 1
    assert compared >= 2
    plain, kept = first["bytes"]
    note = "the subspaces are those of the batches of both"
    write("setup", "DDP, two processes", None, note, plain=plain, compressed=kept)


def test_the_published_preset_in_ddp(tmp_path: Path) -> None:
    """Forward passes before the first step, on the batches of each process; a factor of the batch mode for all."""
    run(tmp_path, "ddp", "published")
    first = assert_ranks_agree(tmp_path, ("net.0", "net.3"))  # not the classifier
    assert set(first["subspaces"]) == set(first["layers"])
    learned = [subspace["batch"][3] for subspace in first["subspaces"].values()]
    assert any(factor is not None and factor.shape[0] == distributed.BATCH for factor in learned)


def test_ddp_spawn(tmp_path: Path) -> None:
    distributed.fit(str(tmp_path), "ddp_spawn")
    plain, kept = assert_ranks_agree(tmp_path)["bytes"]
    write("setup", "DDP, two spawned processes", None, plain=plain, compressed=kept)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 cannot shard on a CPU: its streams lack record_event")
def test_fully_shard(tmp_path: Path) -> None:
    """With all of every mode two shards train what one process trains on the whole batch; FSDP2's classes come back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(distributed.sharded, (str(tmp_path), port), distributed.WORLD)
    both = ranks(tmp_path)
    expected = distributed.plain()
    for case in distributed.SHARDED:
        options, before = case
        first, second = (rank[case] for rank in both)
        assert first["swapped"] == (options != "default")
        assert_bit_equal(first["weights"], second["weights"])
        assert {"FSDPConv2d", "FSDPLinear"} <= set(first["restored"])
        assert not any("Lance" in name for name in first["restored"])
        assert before or first["restored"] == first["classes"]
        gaps = [float((first["weights"][name] - value).norm() / value.norm()) for name, value in expected.items()]
        assert max(gaps) < (1e-4 if options == "exact" else 0.2)
        assert options == "exact" or max(gaps) > 1e-4
    write("other", "FSDP2 (fully_shard), two processes", None, "begun before or after it is sharded, and restored")


def test_processes_agree_on_layers_that_compact_leaves_alone(tmp_path: Path) -> None:
    distributed.fit(str(tmp_path), "ddp_spawn", rank="compact")
    first, second = ranks(tmp_path)
    assert first["layers"] == second["layers"] == []
    assert first["subspaces"] == second["subspaces"] == {}
    assert_bit_equal(first["weights"], second["weights"])
    assert first["bytes"][1] < first["bytes"][0] / 3
