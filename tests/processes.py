"""Processes of their own that have imported everything already, so that one costs no start-up."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = ["tests.avalanche.runs", "tests.trainers"]


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        context.Process(target=int).start()  # the server begins with the first one
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def started(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A process that runs a function of a module, in the present folder."""
    process = _server().Process(target=_in_folder, args=(os.getcwd(), target, args, kwargs))
    process.start()
    return process


def in_process(target: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Exit code of a process that runs a function of a module, in the present folder."""
    process = started(target, *args, **kwargs)
    process.join(600)
    assert process.exitcode is not None
    return int(process.exitcode)


def _in_folder(folder: str, target: Callable[..., Any], args: Any, kwargs: Any) -> None:
    os.chdir(folder)
    target(*args, **kwargs)
