"""Every block of code in README.md and docs/ runs: Python as it is, YAML through the command line tool, commands up to
the point where they would begin to work. Commands in running text, `like this`, are checked too.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import nn

from lightning_lance import LanceCallback
from lightning_lance.compression import operators
from lightning_lance.continual.rules import RULES
from lightning_lance.layers import registry
from tests import trainers
from tests.cli.small import SmallData, SmallModule

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))]
COMMANDS = ("bash", "lightning-lance", "make", "pip", "python", "pytest", "git", "pre-commit", "cd")

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(NamedTuple):
    """A block of code: the line that it begins in, its language, and its text."""

    line: int
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """Fenced and indented blocks; these have no language."""
    found: list[Block] = []
    fence: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        mark = re.match(r"\s*```+\s*([\w-]*)", line)
        if mark and fence is None:
            fence, lines = (number, mark[1]), []
        elif mark and fence is not None:
            found.append(Block(fence[0], fence[1], textwrap.dedent("\n".join(lines)) + "\n"))
            fence = None
        elif fence is not None:
            lines.append(line)
        elif line.startswith("    ") and line.strip().split(" ")[0] in COMMANDS:
            found.append(Block(number, "", line.strip()))
        elif found and found[-1].text.endswith("\\"):
            found[-1] = found[-1]._replace(text=found[-1].text[:-1] + line.strip())
    return found


def commands(page: str) -> list[str]:
    """Commands in blocks and in running text, each once."""
    found = []
    for block in blocks(page):
        if block.language in ("", "bash", "sh", "shell", "console"):
            text = block.text.replace("\\\n", " ")
            found += [line.strip() for line in text.splitlines() if line.strip()]
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    for inline in re.findall(r"`([^`]+)`", prose):
        words = inline.split()
        if len(words) > 1 and words[0] in COMMANDS:
            found.append(" ".join(words))
    return list(dict.fromkeys(found))


@pytest.fixture
def registries() -> Iterator[None]:
    """Pages that add a layer, an operator or a rule leave no trace."""
    tables: list[dict[Any, Any]] = [registry._VARIANTS, operators._RULES, RULES]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def reader() -> dict[str, Any]:
    """What a reader has at hand: the names that pages use without defining them."""
    module, data, callback = SmallModule(), SmallData(), LanceCallback(verbose=False)
    trainers.make_trainer([callback], max_epochs=1, limit_train_batches=1).fit(module, data)
    images, labels = next(iter(data.train_dataloader()))
    return {
        "torch": torch,
        "nn": nn,
        "model": module,
        "datamodule": data,
        "loader": [(images, labels)] * 2,
        "batches": [images] * 2,
        "images": images,
        "labels": labels,
        "loss_fn": nn.functional.cross_entropy,
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.01),
        "callback": callback,
        "LanceCallback": LanceCallback,
    }


def with_code(language: str) -> list[str]:
    return [page for page in PAGES if any(block.language in language.split() for block in blocks(page))]


@pytest.mark.parametrize("page", with_code("python"))
def test_python_runs(page: str, registries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = reader()
    for block in blocks(page):
        if block.language == "python":
            if "LanceStrategy(" in block.text:
                names |= stream_of_two()
            code = compile("\n" * block.line + block.text, str(ROOT / page), "exec")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(code, names)


def stream_of_two() -> dict[str, Any]:
    """An Avalanche benchmark, and a model with a head for each experience."""
    pytest.importorskip("avalanche")
    from tests.avalanche import streams

    model = streams.MultiHead()
    return {
        "benchmark": streams.class_stream(),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the commands expect it: our examples, and a package of the reader's."""
    for name in ("examples", "tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_package.py").write_text(
        "from tests.cli.small import SmallModule as MyModule, SmallData as MyData\n", encoding="utf-8"
    )
    return tmp_path


@pytest.mark.parametrize("page", with_code("yaml"))
def test_yaml_is_a_configuration(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page):
        if block.language in ("yaml", "yml"):
            options = yaml.safe_load(block.text)
            path = folder / f"line{block.line}.yaml"
            path.write_text(block.text, encoding="utf-8")
            tool(["stream" if "stream" in options else "fit", "--config", str(path), "--print_config"])


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_accepted(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for code, name in re.findall(r"```python\n([^`]*?)```\s+Saved as `(\w+\.py)`", text):
        (folder / name).write_text(code, encoding="utf-8")
    refused = {command: why for command in commands(page) if (why := refusal(command)) is not None}
    assert not refused, f"{page}: {refused}\n{capsys.readouterr().err}"


def refusal(command: str) -> str | None:
    """Why a command does not work, or `None`."""
    try:
        check(command)
    except (Exception, pytest.fail.Exception) as error:
        return str(error)
    return None


def check(command: str) -> None:
    """Carry a command out up to the point where it would begin to work."""
    words = shlex.split(re.sub(r"\$\w+", "0", command.split(" > ")[0]), comments=True)
    while words and ("=" in words[0] or words[0] in ("nice", "do")):
        words.pop(0)
    if not words or words[0] in ("for", "done", "cd", "git", "bash"):
        return
    program, *arguments = words
    if any("…" in word or re.fullmatch(r"[A-Z]+|\.\.\.", word) for word in arguments):
        arguments = [word for word in arguments if word == "-m" or not word.startswith("-")][:2]
        complete = False
    else:
        complete = True
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in arguments:
            pattern = rf"\b{word.split('=')[0]}\b" if "=" in word else rf"^{word}:"
            assert re.search(pattern, makefile, re.M), f"the Makefile has no {word}"
    elif program == "pip":
        assert arguments[0] == "install"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extra in re.findall(r"\[([\w,-]+)\]", command):
            assert set(extra.split(",")) <= set(project["optional-dependencies"]), f"no such extra: {extra}"
    elif program == "lightning-lance":
        if complete:
            tool(arguments if {"--help", "--version", "--print_config"} & set(arguments) else dry(arguments))
    elif program == "python" and arguments[:1] == ["-m"]:
        if arguments[1] in ("pytest", "mkdocs"):
            return
        assert importlib.util.find_spec(arguments[1]) is not None, f"no module {arguments[1]}"
        module = importlib.import_module(arguments[1])
        if complete and hasattr(module, "parser"):
            leaves_well(lambda: module.parser().parse_args(arguments[2:]))
    elif program in ("python", "pytest"):
        for word in arguments:
            if word.endswith((".py", "/")) or "/" in word:
                assert (ROOT / word.split("::")[0]).exists(), f"no file {word}"
    elif program == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").exists()
    else:
        raise AssertionError(f"not known: {program}. Allowed: {', '.join(COMMANDS)}")


def dry(arguments: list[str]) -> list[str]:
    """The same command, which prints its configuration and does nothing else."""
    return [*arguments, "--help"] if arguments[0] == "results" else [*arguments, "--print_config"]


def tool(arguments: list[str]) -> None:
    pytest.importorskip("jsonargparse")
    if arguments[0] == "stream":
        pytest.importorskip("avalanche")
    from lightning_lance.cli import main

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaves_well(lambda: main(arguments))


def leaves_well(call: Callable[[], Any]) -> None:
    try:
        call()
    except SystemExit as error:
        if error.code:
            pytest.fail("its options are refused")


def test_there_is_code_to_run() -> None:
    """An empty list of pages would pass everything above."""
    assert len(with_code("python")) >= 5
    assert sum(len(commands(page)) for page in PAGES) >= 30
    with pytest.raises(AssertionError, match="no such extra"):
        check("pip install '.[nothing]'")
    with pytest.raises(AssertionError, match="the Makefile has no fly"):
        check("make fly")
    with pytest.raises(AssertionError, match="no module"):
        check("python -m examples.nothing")
