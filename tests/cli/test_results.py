"""The subcommand `lightning-lance results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lance.cli import main
from lightning_lance.cli.results import tables
from tests.cli.tool import refused


def record(seed: int, accuracy: float, method: str = "lance", **others: Any) -> dict[str, Any]:
    found = {
        "kind": "finetune",
        "set": "birds",
        "network": "resnet18",
        "last": 2,
        "method": method,
        "seed": seed,
        "accuracy": accuracy,
        "input_bytes": 4_000_000,
        "formula_bytes": 40_000,
        "kept_bytes": 5_000_000 + seed,
        "peak_bytes": 9_000_000,
        "flops": {"forward": 2.5e9, "weight_gradient": 7e6, "input_gradient": 400},
        "step_seconds": 0.25,
        "epochs": 3,
        "batch_size": 32,
        "device": "cpu, 1 threads",
        "versions": {"torch": "2.14.1"},
    }
    return {**found, **others}


def write(folder: Path, *records: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for found in records:
        path = folder / f"{found['set']}_{found['last']}_{found['method']}_{found['seed']}.json"
        path.write_text(json.dumps(found))


def write_stream(folder: Path, acc: float, seed: int, whole: bool = True, **config: Any) -> None:
    folder.mkdir(parents=True)
    matrix = [[0.9, None], [0.8, 0.7 if whole else None]]
    content = {
        "summary": {"ACC": acc, "BWT": -0.01},
        "matrix": matrix,
        "kept_bytes": [[2000.0, 500.0], [2000.0, 300.0]],
    }
    (folder / "results.json").write_text(json.dumps(content))
    network = {"class_path": "heads.MultiHead", "init_args": {"trunk": "models.Small"}}
    given = {
        "seed_everything": seed,
        "data": {"benchmark": "streams.images.split_birds"},
        "model": {"class_path": "C", "init_args": {"network": network}},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    (folder / "records").mkdir()
    for index, seconds in enumerate((0.1, 0.3)):
        text = json.dumps({"kind": "experience", "step_seconds": seconds, "peak_bytes": 5})
        (folder / "records" / f"experience_{index:03d}.json").write_text(text)


def rows(text: str, title: str) -> list[list[str]]:
    """Cells of the table below a title, without its header."""
    lines = text.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    assert set(lines[1]) <= {"|", "-", " "}
    assert len({line.count("|") for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_mean_and_deviation_over_seeds(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        cwd / "runs", record(0, 0.5), record(1, 0.6), record(2, 0.7), record(0, 0.8, "plain", formula_bytes=4_000_000)
    )
    write(cwd / "runs" / "more", record(0, 0.25, last=4))
    main(["results", str(cwd / "runs")])
    text = capsys.readouterr().out
    plain, lance, four = rows(text, "birds")
    assert lance[:4] == ["resnet18", "2", "lance", "60.0 ± 10.0"]
    assert lance[4:8] == ["4 MB", "40 KB", "5 MB", "9 MB"]
    assert lance[8:] == ["2.5 G", "7 M", "400", "0.250", "3"]
    assert plain[2:4] == ["plain", "80.0"]
    assert four[1:4] == ["4", "lance", "25.0"]
    assert "3 epochs of batches of 32" in text
    assert "cpu, 1 threads" in text
    assert "torch 2.14.1" in text


def test_streams(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_stream(cwd / "runs" / "a", 0.5, 0)
    write_stream(cwd / "runs" / "b", 0.7, 1)
    write_stream(cwd / "runs" / "c", 0.4, 0, plain=True, whole=False)
    write_stream(cwd / "runs" / "d", 0.3, 0, lance={"preset": "published"})
    main(["results", str(cwd / "runs")])
    plain, published, lance = rows(capsys.readouterr().out, "split_birds")
    assert lance == ["Small", "lance", "60.0 ± 14.1", "-1.0 ± 0.0", "400 B", "2 KB", "0.200", "2"]
    assert plain[1:3] == ["plain", "40.0"]
    assert plain[-1] == "1 (1 not at its end)"
    assert published[1:3] == ["published", "30.0"]


def test_notes_are_of_the_columns_that_are_shown(cwd: Path) -> None:
    titles = ["Inputs", "Kept of them", "All kept", "Peak", "Operations", "ACC", "BWT"]

    def noted(folder: str, *without: str) -> list[str]:
        notes = tables(cwd / folder, without=without).rpartition("\n\n")[2]
        return [title for title in titles if f" {title}: " in notes]

    write(cwd / "tuned", record(0, 0.5))
    write_stream(cwd / "streams", 0.5, 0)
    assert noted(".") == titles
    assert noted("tuned") == titles[:5]
    assert noted("streams") == ["All kept", "ACC", "BWT"]
    assert noted("tuned", "peak", "inputs", "forward") == ["Kept of them", "All kept", "Operations"]
    assert noted("streams", "all kept", "ACC", "BWT") == []
    assert "Operations" not in noted("tuned", "forward", "weight gradient", "input gradient")


def test_published_numbers_are_named_as_such_and_never_averaged(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(cwd / "runs", record(0, 0.5))
    write_stream(cwd / "runs" / "a", 0.5, 0)
    entries = [
        {"set": "birds", "network": "resnet18", "last": 2, "method": "lance", "accuracy": 61.2, "source": "a paper"},
        {"benchmark": "split_birds", "method": "LANCE", "ACC": 71.5, "source": "table 2"},
        {"set": "others", "accuracy": 1.0, "source": "a paper"},
    ]
    (cwd / "known.yaml").write_text(yaml.safe_dump(entries))
    main(["results", "runs", "--published", "known.yaml", "--output", "out.md"])
    assert capsys.readouterr().out == ""
    text = (cwd / "out.md").read_text()
    ours, theirs = rows(text, "birds")
    assert ours[3] == "50.0"
    assert theirs[2:4] == ["lance (published number: a paper)", "61.2"]
    assert rows(text, "split_birds")[1][1:3] == ["LANCE (published number: table 2)", "71.5"]
    assert "others" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1", "is not a list"),
        ("[{set: birds, accuracy: 1}]", "entry 1, has no source. Name where the number is from."),
        ("[{source: x, acuracy: 1}]", "entry 1, has acuracy. Allowed: ACC, BWT, accuracy"),
        ("[", "cannot be read"),
    ],
)
def test_published_files_that_are_refused(
    content: str, message: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(cwd / "runs", record(0, 0.5))
    (cwd / "known.yaml").write_text(content)
    with pytest.raises(SystemExit) as left:
        main(["results", "runs", "--published", "known.yaml"])
    assert left.value.code == 2
    assert message in capsys.readouterr().err  # in several lines where YAML itself has several


def test_folders_that_are_refused(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, message in (
        (["nowhere"], 2, "folder='nowhere' is not a folder"),
        ([], 2, "required: folder"),
        (["."], 1, "holds no run. Runs are JSON files"),
    ):
        assert message in refused(capsys, "results", *arguments, code=code)
    (cwd / "cut.json").write_text('{"kind": ')
    assert "cut.json cannot be read" in refused(capsys, "results", ".", code=1)
    (cwd / "cut.json").unlink()
    write(cwd, record(0, 0.5))
    assert "there is no such folder" in refused(capsys, "results", ".", "--output", "no/where.md", code=2)


def test_it_must_come_first(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "empty.yaml").write_text("{}")
    assert "options before results are not read" in refused(capsys, "--config", "empty.yaml", "results")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Make tables in Markdown" in " ".join(capsys.readouterr().out.split())
