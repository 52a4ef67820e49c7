"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

SEED = 1234


def pytest_configure() -> None:
    """Use as many threads as `make test` asks for, also where OMP_NUM_THREADS came too late."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    # The same examples in every run, and no limit on time: a loaded machine must not fail a test.
    settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of the garbage collector's way: a full collection took half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed every global generator before each test, so that the order of tests does not matter."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the global generator is the point
    torch.manual_seed(SEED)
    yield SEED
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)  # Trainer(deterministic=True) leaves it on


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each test in its own directory: Lightning writes lightning_logs and checkpoints to the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny networks more threads only wait for each other, badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
