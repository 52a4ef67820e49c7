"""The subcommand ``results``: tables in Markdown of what the runs in a folder have recorded."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lightning_lance.cli import PROGRAM
from lightning_lance.errors import ConfigError, StateError
from lightning_lance.tensors.units import format_bytes

DESCRIPTION = """Make tables in Markdown of the runs in a folder: of JSON files that examples.recording.RunRecord has
written, and of streams, which are folders with results.json and config.yaml."""

FINETUNE = ("set", "network", "last", "method")
"""What makes runs the same but for their seed: a row of a table, the first one the table."""

STREAM = ("benchmark", "network", "method")

PUBLISHED_KEYS = {
    "set",
    "network",
    "last",
    "method",
    "source",
    "accuracy",
    "memory",
    "flops",
    "ACC",
    "BWT",
    "benchmark",
}
"""What an entry of a file of published numbers may hold."""

TUNED_COLUMNS = (
    "network",
    "last layers",
    "method",
    "accuracy",
    "inputs",
    "kept of them",
    "all kept",
    "peak",
    "forward",
    "weight gradient",
    "input gradient",
    "s/step",
    "seeds",
)
STREAM_COLUMNS = ("network", "method", "ACC", "BWT", "all kept", "plainly", "s/step", "seeds")

ABOUT = {
    ("inputs",): "Inputs: bytes of the inputs of the trained layers beside the classifier, for a batch.",
    ("kept of them",): "Kept of them: cores and factors, by formula.",
    ("all kept",): "All kept: what autograd keeps for the backward pass of a batch, measured.",
    ("peak",): "Peak: above the process with model and data.",
    ("forward", "weight gradient", "input gradient"): (
        "Operations: of a step, two for a multiply-add, as torch.utils.flop_counter counts."
    ),
    ("ACC",): "ACC: mean final accuracy.",
    ("BWT",): "BWT: mean change of an experience's accuracy since it was learned.",
}
"""What columns are, said below tables that have one of them."""

ORDER = ("plain", "published", "lance")
"""Methods in tables; others follow by name."""


@dataclass
class Group:
    """Runs that differ in their seeds only.

    Attributes:
        key: values of :data:`FINETUNE` or :data:`STREAM`.
        runs: their records.
    """

    key: tuple[Any, ...]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def values(self, *names: str) -> list[float]:
        """A number of each run that has it; several names lead into the record."""
        found = []
        for run in self.runs:
            value: Any = run
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                found.append(float(value))
        return found

    def median(self, *names: str) -> float | None:
        """Median of the runs, ``None`` where none has the number."""
        found = self.values(*names)
        return statistics.median(found) if found else None


def read_runs(folder: Path) -> tuple[list[Group], list[Group]]:
    """The runs below a folder: fine-tuning and streams.

    Args:
        folder: searched with all folders in it.

    Raises:
        ConfigError: there is no such folder.
        StateError: it holds no run, or a file of one cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"folder={str(folder)!r} is not a folder. Give the one that runs were written to.")
    tuned: list[dict[str, Any]] = []
    streams: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("*.json")):
        found = _json(path)
        if not isinstance(found, dict):
            continue
        if found.get("kind") == "finetune":
            tuned.append(found)
        elif path.name == "results.json" and "matrix" in found:
            streams.append(_stream(path, found))
    if not tuned and not streams:
        raise StateError(
            f"{folder} holds no run. Runs are JSON files that examples.recording.RunRecord writes, and folders of "
            "lightning-lance stream."
        )
    return _grouped(tuned, FINETUNE), _grouped(streams, STREAM)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read ({error}). Remove it, or run what it is of again.") from error


def _stream(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """A stream as a record: what its configuration says it is, and the medians over its experiences."""
    import yaml

    from lightning_lance.cli.saving import saved_config

    written = saved_config(path.parent)
    try:
        config: Any = (None if written is None else yaml.safe_load(written.read_text(encoding="utf-8"))) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StateError(f"{written} cannot be read ({' '.join(str(error).split())}). Remove or mend it.") from error
    records = [_json(each) for each in sorted((path.parent / "records").glob("experience_*.json"))]
    model = (config.get("model") or {}).get("init_args") or {}
    lance = config.get("lance") or {}
    method = "plain" if config.get("plain") else lance.get("preset") or "lance"
    kept = [values[-1] for values in found.get("kept_bytes", []) if values]
    plain = [values[0] for values in found.get("kept_bytes", []) if len(values) > 1]
    recorded = {
        name: statistics.median(each[name] for each in records)
        for name in ("step_seconds", "peak_bytes")
        if records and all(name in each for each in records)
    }
    whole = all(row[index] is not None for index, row in enumerate(found["matrix"]))
    return {
        "benchmark": _last((config.get("data") or {}).get("benchmark"), path.parent.name),
        "network": _network(model.get("network")),
        "method": method,
        "seed": config.get("seed_everything"),
        "whole": whole,
        "experiences": len(found["matrix"]),
        "kept": statistics.median(kept) if kept else None,
        "kept_plain": statistics.median(plain) if plain else None,
        **recorded,
        **found["summary"],
    }


def _last(name: Any, otherwise: str) -> str:
    return name.rpartition(".")[2] if isinstance(name, str) else otherwise


def _network(given: Any) -> str:
    """Name of the innermost network of a configuration, which is the trunk where there are heads."""
    if isinstance(given, str):
        return _last(given, "")
    if not isinstance(given, dict):
        return ""
    inner = (given.get("init_args") or {}).get("trunk")
    return _network(inner) if inner is not None else _last(given.get("class_path"), "")


def _grouped(runs: Iterable[dict[str, Any]], names: Sequence[str]) -> list[Group]:
    groups: dict[tuple[Any, ...], Group] = {}
    for run in runs:
        key = tuple(run.get(name) for name in names)
        groups.setdefault(key, Group(key)).runs.append(run)
    return sorted(groups.values(), key=lambda group: (*map(str, group.key[:-1]), _place(group.key[-1])))


def _place(method: Any) -> tuple[int, str]:
    return (ORDER.index(method) if method in ORDER else len(ORDER), str(method))


def read_published(path: Path) -> list[dict[str, Any]]:
    """Published numbers from a YAML or JSON file: a list of entries, each with its source.

    Raises:
        ConfigError: the file is not there or not of that form; the message names the entry.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"published={str(path)!r} cannot be read ({error}). Give a YAML or JSON file.") from error
    if not isinstance(found, list):
        raise ConfigError(f"published={str(path)!r} is not a list. Allowed: a list of entries, each with a source.")
    for number, entry in enumerate(found, start=1):
        if not isinstance(entry, dict) or not entry.get("source"):
            raise ConfigError(f"published={str(path)!r}, entry {number}, has no source. Name where the number is from.")
        wrong = sorted(set(map(str, entry)) - PUBLISHED_KEYS)
        if wrong:
            raise ConfigError(
                f"published={str(path)!r}, entry {number}, has {', '.join(wrong)}. Allowed: "
                f"{', '.join(sorted(PUBLISHED_KEYS))}."
            )
    return found


def tables(folder: Path, published: Sequence[dict[str, Any]] = (), without: Sequence[str] = ()) -> str:
    """All tables of a folder, in Markdown.

    Args:
        folder: of the runs.
        published: entries of :func:`read_published`, shown below our rows and named as published.
        without: names of columns to leave out.
    """
    tuned, streams = read_runs(folder)
    parts = []
    for name in dict.fromkeys(group.key[0] for group in tuned):
        rows = [_tuned_row(group) for group in tuned if group.key[0] == name]
        rows += [_published_tuned(entry) for entry in published if entry.get("set") == name]
        parts.append(f"### {name}\n\n{_without(without, TUNED_COLUMNS, rows)}")
    for name in dict.fromkeys(group.key[0] for group in streams):
        rows = [_stream_row(group) for group in streams if group.key[0] == name]
        rows += [_published_stream(entry) for entry in published if entry.get("benchmark") == name]
        parts.append(f"### {name}\n\n{_without(without, STREAM_COLUMNS, rows)}")
    columns = {*(TUNED_COLUMNS if tuned else ()), *(STREAM_COLUMNS if streams else ())} - set(without)
    return "\n\n".join([*parts, _notes(tuned, columns)]) + "\n"


def _tuned_row(group: Group) -> list[str]:
    _, network, last, method = group.key
    flops = [_flops(group.median("flops", name)) for name in ("forward", "weight_gradient", "input_gradient")]
    return [
        str(network),
        str(last),
        str(method),
        percent(group.values("accuracy")),
        *(_bytes(group.median(name)) for name in ("input_bytes", "formula_bytes", "kept_bytes", "peak_bytes")),
        *flops,
        _seconds(group.median("step_seconds")),
        str(len(group.runs)),
    ]


def _stream_row(group: Group) -> list[str]:
    _, network, method = group.key
    partial = sum(not run["whole"] for run in group.runs)
    return [
        str(network),
        str(method),
        percent(group.values("ACC")),
        percent(group.values("BWT")),
        _bytes(group.median("kept")),
        _bytes(group.median("kept_plain")),
        _seconds(group.median("step_seconds")),
        f"{len(group.runs)}" + (f" ({partial} not at its end)" if partial else ""),
    ]


def _published_tuned(entry: dict[str, Any]) -> list[str]:
    told = [str(entry.get(name, "")) for name in ("network", "last")]
    values = [str(entry.get(name, "")) for name in ("accuracy", "memory", "flops")]
    return [*told, _label(entry), values[0], "", values[1], "", "", values[2], "", "", "", ""]


def _published_stream(entry: dict[str, Any]) -> list[str]:
    values = [str(entry.get(name, "")) for name in ("ACC", "BWT", "memory")]
    return [str(entry.get("network", "")), _label(entry), *values, "", "", ""]


def _label(entry: dict[str, Any]) -> str:
    return f"{entry.get('method', '')} (published number: {entry['source']})".strip()


def _notes(tuned: Sequence[Group], columns: set[str]) -> str:
    """What the columns are, and where the numbers are from."""
    lines = ["Accuracies in percent: mean ± sample standard deviation over the seeds; the rest are medians over them."]
    about = " ".join(text for names, text in ABOUT.items() if columns.intersection(names))
    if about:
        lines.append(about)
    runs = [run for group in tuned for run in group.runs]
    devices = sorted({run["device"] for run in runs if run.get("device")})
    packages = sorted({f"{name} {text}" for run in runs for name, text in (run.get("versions") or {}).items()})
    settings = sorted(
        {f"{run['epochs']} epochs of batches of {run['batch_size']}" for run in runs if run.get("epochs")}
    )
    for title, found in (("Trained", settings), ("On", devices), ("With", packages)):
        if found:
            lines.append(f"{title}: {'; '.join(found)}.")
    return "\n".join(f"- {line}" for line in lines)


def percent(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of fractions, in percent; nothing where there are none."""
    if not values:
        return ""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def _bytes(count: float | None) -> str:
    return "" if count is None else format_bytes(round(count))


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _flops(count: float | None) -> str:
    if count is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _without(names: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kept = [index for index, name in enumerate(header) if name not in names]
    return markdown([header[index] for index in kept], [[row[index] for index in kept] for row in rows])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a bar in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{PROGRAM}: error: {message}. See {PROGRAM} results --help.\n")
        raise SystemExit(2)


def run(args: list[str]) -> None:
    """Parse the arguments after ``results``, and print the tables or write them to a file."""
    parser = _Parser(prog=f"{PROGRAM} results", description=DESCRIPTION)
    parser.add_argument("folder", type=Path, help="folder of the runs, searched with all folders in it")
    parser.add_argument("--published", type=Path, help="YAML or JSON file of published numbers to put beside")
    parser.add_argument("--output", type=Path, help="file to write to; standard output by default")
    given = parser.parse_args(args)
    text = tables(given.folder, [] if given.published is None else read_published(given.published))
    if given.output is None:
        sys.stdout.write(text)
        return
    if not given.output.absolute().parent.is_dir():
        raise ConfigError(f"output={str(given.output)!r} is not allowed: there is no such folder. Make it first.")
    given.output.write_text(text, encoding="utf-8")
