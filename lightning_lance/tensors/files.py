"""Files that are whole or not there: written aside, synced and renamed; checkpoints with a checksum of every byte."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SEAL = b"lightning-lance blake2b "
"""Begins the comment of a sealed archive; the checksum of all bytes before the comment follows."""

_DIGEST = 16
_COMMENT = len(SEAL) + 2 * _DIGEST
_BLOCK = 1 << 20


class DamagedFileError(Exception):
    """A file is not as it was written: its checksum is missing or differs."""


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path beside the given one to write to; what is there at the end takes the place of the file in one step.

    The content is synced before the file is renamed, and the folder after it: a crash at any moment leaves the earlier
    file or the new one, and on an error the earlier one stays.

    Args:
        path: the file; its folder must exist.
    """
    path = Path(path)
    aside = aside_of(path)
    try:
        yield aside
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def aside_of(path: Path) -> Path:
    """Where a file is written before it is renamed."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file, whole or not at all; text in UTF-8."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def save_sealed(path: str | Path, value: Any) -> None:
    """``torch.save`` of plain containers and tensors, whole or not at all, with a checksum of every byte.

    The checksum is the archive's comment, so that ``torch.load`` and Lightning read the file as any other.
    """
    with written_aside(path) as aside:
        torch.save(value, aside)
        with aside.open("r+b") as file:
            # The last two bytes of an archive without a comment are the comment's length.
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", _COMMENT))
            file.flush()
            file.seek(0)
            digest = _digest(file, file.seek(0, os.SEEK_END))
            file.seek(0, os.SEEK_END)
            file.write(SEAL + digest)


def is_sealed(path: str | Path) -> bool:
    """Whether a file was written by :func:`save_sealed` and every byte is as it was written.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END) - _COMMENT
        if length <= 0:
            return False
        file.seek(length)
        comment = file.read()
        return comment.startswith(SEAL) and comment[len(SEAL) :] == _digest(file, length)


def load_sealed(path: str | Path) -> Any:
    """Read what :func:`save_sealed` wrote, on the CPU, with torch's safe loading.

    Raises:
        DamagedFileError: a byte is not as it was written, or there is no checksum.
        OSError: the file cannot be read.
    """
    if not is_sealed(path):
        raise DamagedFileError(f"{path}: its checksum is missing or differs.")
    return torch.load(path, map_location="cpu", weights_only=True)


def _digest(file: Any, length: int) -> bytes:
    """Checksum of the first bytes of an open file, in hexadecimal digits."""
    found = hashlib.blake2b(digest_size=_DIGEST)
    file.seek(0)
    while length > 0:
        block = file.read(min(length, _BLOCK))
        found.update(block)
        length -= len(block)
        if not block:
            break
    return found.hexdigest().encode()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk; not every system can sync a folder."""
    folder = path.is_dir()
    with contextlib.suppress(OSError) if folder else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
