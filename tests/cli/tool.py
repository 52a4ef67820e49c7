"""The tool as a user sees it: what it says, and the fit that its own should equal."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from lightning_lance.cli import main
from tests.cli.small import QUIET, SmallData, SmallModule


def refused(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """The one line with which the tool leaves."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("lightning-lance: error: ")]
    assert lines[-1:] == errors
    assert "Traceback" not in "".join(lines)
    assert len(errors[0]) < 500
    return errors[0].removeprefix("lightning-lance: error: ")


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The configuration that the tool prints."""
    with pytest.raises(SystemExit) as left:
        main([*args, "--print_config"])
    assert left.value.code == 0
    return capsys.readouterr().out


def fitted(*callbacks: Callback) -> SmallModule:
    """The small module after a fit in Python, from seed 7; without callbacks before one."""
    pl.seed_everything(7, workers=True)
    module = SmallModule()
    if callbacks:
        pl.Trainer(**QUIET, callbacks=list(callbacks)).fit(module, SmallData())
    return module
