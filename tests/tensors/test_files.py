"""Files: whole or not there, and any damage is recognised."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lance.tensors.files import (
    DamagedFileError,
    aside_of,
    is_sealed,
    load_sealed,
    save_sealed,
    write_whole,
    written_aside,
)

VALUE: dict[str, Any] = {"state_dict": {"w": torch.ones(500), "n": torch.arange(7)}, "stream": {"experience": 1}}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "a.ckpt"
    save_sealed(path, VALUE)
    return path


def test_a_sealed_file_is_an_ordinary_one(sealed: Path) -> None:
    assert is_sealed(sealed)
    for found in (load_sealed(sealed), torch.load(sealed, weights_only=True), torch.load(sealed, mmap=True)):
        assert torch.equal(found["state_dict"]["w"], VALUE["state_dict"]["w"])
        assert found["stream"] == VALUE["stream"]
    assert os.listdir(sealed.parent) == ["a.ckpt"]


def damage(content: bytes, kind: str, place: float, size: int, bit: int) -> bytes:
    """The content with one thing done to it somewhere, where that changes anything."""
    at = min(int(place * len(content)), len(content) - 1)
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
    if kind == "zeros":
        found = content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]
        return found if found != content else damage(content, "flip", place, size, bit)
    if kind == "cut":
        return content[:at]
    if kind == "repeated":
        return content[:at] + content[at : at + size] + content[at:]
    return content + bytes(size)


@given(
    kind=st.sampled_from(["flip", "flip", "zeros", "cut", "repeated", "longer"]),
    place=st.floats(0, 1),
    size=st.sampled_from([1, 16, 512, 4096]),
    bit=st.integers(0, 7),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_damage_is_recognised(sealed: Path, kind: str, place: float, size: int, bit: int) -> None:
    path = sealed.with_name("damaged.ckpt")
    path.write_bytes(damage(sealed.read_bytes(), kind, place, size, bit))
    try:
        assert not is_sealed(path)
        with pytest.raises(DamagedFileError, match=r"damaged\.ckpt"):
            load_sealed(path)
    finally:
        path.unlink()


def test_a_file_without_a_checksum_is_not_whole(cwd: Path) -> None:
    torch.save(VALUE, cwd / "plain.ckpt")
    (cwd / "empty.ckpt").touch()
    for name in ("plain.ckpt", "empty.ckpt"):
        with pytest.raises(DamagedFileError):
            load_sealed(cwd / name)


def test_what_was_there_stays_on_an_error(cwd: Path) -> None:
    path = cwd / "results.json"
    write_whole(path, "first")
    with contextlib.suppress(OSError), written_aside(path) as aside:
        aside.write_text("second, cut sho")
        raise OSError("disk full")
    assert path.read_text() == "first"
    with pytest.raises(TypeError):
        save_sealed(path, {"lambda": (value for value in ())})  # cannot be pickled
    assert path.read_text() == "first"
    assert os.listdir(cwd) == ["results.json"]
    write_whole(path, "second")
    assert path.read_text() == "second"


def test_nothing_is_synced_after_it_is_renamed(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content first, then the name, then the folder: else a power cut may leave a name without content."""
    order = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    def replaced(one: Any, other: Any) -> None:
        order.append("rename")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to see what a handle is")
    save_sealed(cwd / "a.ckpt", VALUE)
    assert order == ["file", "rename", "folder"]
    assert not aside_of(cwd / "a.ckpt").exists()
