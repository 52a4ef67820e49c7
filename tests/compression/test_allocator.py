"""Freed memory of the process, counted by the system, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lightning_lance
from lightning_lance import ConfigError, LanceConfig, freed_memory
from lightning_lance.compression import allocator
from lightning_lance.compression.allocator import GROWN, Thresholds, usual

glibc = pytest.mark.skipif(allocator._malloc()[0] is None, reason="needs the allocator of glibc")

HELPERS = """
import ctypes
import torch
from lightning_lance import freed_memory

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name + ":"))

def rest(size=4, count=40):
    "MB that stay with the process of so many freed blocks of so many MB, below one that lives."
    before = status("VmRSS")
    blocks = [torch.ones(size << 18) for _ in range(count)]
    last = blocks.pop()
    del blocks
    return status("VmRSS") - before - size

def mapped(size=29):
    "Whether a block of so many MiB would come from the system and go back to it: a flag before the block says so."
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    block = library.malloc(ctypes.c_size_t(size << 20))
    flags = ctypes.c_size_t.from_address(block - 8).value
    library.free(ctypes.c_void_p(block))
    return bool(flags & 2)

torch.ones(30 << 18)  # once it is freed, the threshold is 30 MiB
"""


def surroundings(**more: str) -> dict[str, str]:
    root = str(Path(lightning_lance.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def process(script: str, **environment: str) -> list[str]:
    """Words that a script prints, in a process that starts in this environment."""
    found = subprocess.run(
        [sys.executable, "-c", HELPERS + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env=surroundings(**environment),
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


SERVER = """
import json, os, signal, sys
import lightning, lightning_lance, torch
for line in sys.stdin:
    if not (child := os.fork()):
        signal.alarm(300)
        exec(json.loads(line), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[[str], list[str]]]:
    """Words that a script prints, in a process that is forked from one that has imported all and done nothing yet."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings()
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        pipe, lines = server.stdin, server.stdout

        def run(script: str) -> list[str]:
            pipe.write(json.dumps(HELPERS + textwrap.dedent(script)) + "\n")
            pipe.flush()
            found: list[str] = []
            for line in lines:
                if line.startswith("exit "):
                    assert line == "exit 0\n"
                    return found
                found += line.split()
            raise AssertionError("the server has ended")

        yield run
        pipe.close()


@glibc
def test_freed_memory_goes_back_inside_of_the_block_and_stays_outside_of_it(forked: Callable[[str], list[str]]) -> None:
    inside, outside = forked(
        """
        with freed_memory():
            print(rest())
        print(rest())
        """
    )
    assert float(inside) < 8
    assert float(outside) > 140


@glibc
def test_freed_memory_is_kept_where_that_is_asked_for(forked: Callable[[str], list[str]]) -> None:
    stock, kept = forked(
        """
        print(rest(40, 5))
        with freed_memory("kept"):
            print(rest(40, 5))
        """
    )
    assert float(stock) < 8  # 40 MB are beyond what the threshold grows to
    assert float(kept) > 150


@glibc
def test_blocks_may_overlap_and_the_one_entered_last_counts(forked: Callable[[str], list[str]]) -> None:
    found = forked(
        """
        from lightning_lance.compression.allocator import hold, let_go
        one, other = hold("returned"), hold("returned")
        let_go(one)
        print(mapped())
        third = hold("kept")
        print(mapped(40))
        let_go(other)
        print(mapped(40))
        let_go(third)
        let_go(third)
        print(mapped(), mapped(40))
        try:
            with freed_memory():
                raise KeyError
        except KeyError:
            print(mapped())
        """
    )
    assert found == ["True", "False", "False", "False", "True", "False"]


FIT = """
import lightning as L
from torch import nn
from lightning_lance import ContinualCallback, LanceCallback

class Module(L.LightningModule):
    fails = False
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    def training_step(self, batch, batch_idx):
        print("in", mapped())
        assert not self.fails
        return self(batch[0]).square().mean()
    def forward(self, x):
        return self.net(x)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def fit(module, *callbacks):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 64)), 8)
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    L.Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **options).fit(module, data)
"""


@glibc
def test_a_fit_returns_memory_where_it_is_asked_to_and_no_longer(forked: Callable[[str], list[str]]) -> None:
    found = forked(
        FIT
        + textwrap.dedent(
            """
            module = Module()
            fit(module, LanceCallback(verbose=False))
            for callback in (LanceCallback, ContinualCallback):
                fit(module, callback(verbose=False, release_memory=True))
                print("after", mapped())
            module.fails = True
            try:
                fit(module, LanceCallback(verbose=False, release_memory=True))
            except AssertionError:
                print("after", mapped())
            """
        )
    )
    once = ["in", "True", "in", "True", "after", "False"]
    assert found == ["in", "False", "in", "False", *once, *once, "in", "True", "after", "False"]


@glibc
def test_the_peak_of_a_process_falls(forked: Callable[[str], list[str]]) -> None:
    script = """
    from torch import nn
    from lightning_lance import LanceConfig, LanceSession
    torch.manual_seed(0)
    blocks = [m for _ in range(8) for m in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks)
    images = torch.randn(32, 3, 64, 64)
    model(images[:2]).mean().backward()  # what torch loads and keeps for itself
    session = LanceSession(model, LanceConfig(release_memory={}))
    session.start()
    idle = status("VmRSS")
    for part in images.split(16):
        with session.step():
            loss = model(part).square().mean()
        loss.backward()
    print(status("VmHWM") - idle)
    session.stop()
    """
    off, on = (float(forked(script.format(choice))[0]) for choice in (False, True))
    assert on < 0.75 * off


def test_what_the_environment_asks_for_comes_back() -> None:
    assert usual({}) == GROWN
    assert usual({"MALLOC_MMAP_THRESHOLD_": "65536"}) == Thresholds(65536, 131072)
    assert usual({"MALLOC_TRIM_THRESHOLD_": "1"}) == Thresholds(131072, 1)
    tunables = "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=0x1000:glibc.malloc.trim_threshold=5"
    assert usual({"GLIBC_TUNABLES": tunables, "MALLOC_MMAP_THRESHOLD_": "7"}) == Thresholds(4096, 5)
    assert usual({"GLIBC_TUNABLES": "glibc.malloc.check=3", "MALLOC_MMAP_THRESHOLD_": "many"}) == GROWN
    assert usual({"MALLOC_TRIM_THRESHOLD_": str(2**40)}) == Thresholds(131072, 2**31 - 1)


@glibc
def test_a_process_whose_environment_returns_memory_goes_on_returning_it() -> None:
    script = """
    print(rest() < 8)
    with freed_memory("kept"):
        print(not mapped(20))
    print(mapped(31))  # more than what is free in the heap, which would be taken first
    """
    assert process(script, MALLOC_MMAP_THRESHOLD_="65536") == ["True"] * 3


@glibc
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_another_allocator_is_left_alone_with_a_line_that_names_it(tmp_path: Path) -> None:
    source, library = tmp_path / "own.c", tmp_path / "libowned.so"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n",
        encoding="utf-8",
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    found = process(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with freed_memory():
                print(rest() > 140)
        print(len(caught), caught[0].category.__name__, str(caught[0].message).replace(" ", "_"))
        """,
        LD_PRELOAD=str(library),
    )
    assert found[:3] == ["True", "1", "LanceWarning"]
    assert found[3].startswith(
        f"freed_memory_is_not_returned:_that_needs_the_allocator_of_glibc,_and_memory_comes_from_{library}"
    )


def test_on_other_systems_nothing_happens_but_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.warns(lightning_lance.LanceWarning, match="memory comes from the C library of darwin"), freed_memory():
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocator.let_go(["returned"])


def test_wrong_options() -> None:
    with (
        pytest.raises(ConfigError, match=r"policy='given' is not allowed\. Allowed: 'returned', 'kept'\."),
        freed_memory("given"),
    ):  # type: ignore[arg-type]
        pass
    with pytest.raises(ConfigError, match=r"release_memory=3 is not allowed\. Allowed: True, False\."):
        LanceConfig(release_memory=3)  # type: ignore[arg-type]
