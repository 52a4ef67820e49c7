"""The command line tool `lightning-lance`."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_lance
from lightning_lance import LanceCallback, LanceConfig, LanceSession, StateError, is_swapped, measure_saved_bytes
from lightning_lance.cli import NEEDED, main
from lightning_lance.cli.app import LanceCLI, LanceTrainer
from lightning_lance.cli.messages import readable
from tests.cli.small import BATCH, QUIET, SmallData, SmallModule
from tests.cli.tool import fitted, printed, refused

OPTIONS = list(inspect.signature(LanceCallback).parameters)
# A value of each option that is not its default.
VALUES: dict[str, Any] = {
    "rank": {"batch": 8, "spatial": 0.8},
    "batch": "projected",
    "bits": 8,
    "layers": ["net.0", "net.2"],
    "freeze_norms": True,
    "memory_budget": "4MiB",
    "refresh": "epoch",
    "calibration_batches": 2,
    "verbose": False,
    "seed": 3,
    "skip": ["depthwise"],
    "calibration": "eval",
    "preset": "published",
    "forward_fn": "lightning_lance.trainer.passes.bare",
    "release_memory": True,
}


@pytest.fixture
def config(cwd: Path) -> Path:
    """A configuration of the small module that trains quietly."""
    content = {
        "seed_everything": 7,
        "trainer": QUIET,
        "model": {"class_path": "tests.cli.small.SmallModule"},
        "data": {"class_path": "tests.cli.small.SmallData"},
        "lance": {"verbose": False, "calibration_batches": 2},
    }
    path = cwd / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class TestSubcommands:
    @pytest.mark.parametrize(
        ("options", "projected", "by"),
        [
            ({"bits": 4}, [], "flag"),
            ({"rank": 0.8, "layers": 2, "bits": 8}, ["net.2", "net.5"], "flag"),
            ({"preset": "published"}, ["net.0", "net.2"], "flag"),
            ({"preset": "published"}, ["net.0", "net.2"], "file"),
        ],
        ids=lambda value: str(value),
    )
    def test_a_fit_equals_the_callback_in_python(
        self, config: Path, options: dict[str, Any], projected: list[str], by: str
    ) -> None:
        flags = [f"--lance.{name}={value}" for name, value in options.items()]
        if by == "file":
            content = yaml.safe_load(config.read_text())
            config.write_text(yaml.safe_dump({**content, "lance": {**content["lance"], **options}}))
            flags = []
        cli = LanceCLI(["fit", "--config", str(config), *flags])
        [found] = [found for found in cli.trainer.callbacks if isinstance(found, LanceCallback)]
        callback = LanceCallback(**options, calibration_batches=2, verbose=False)
        module = fitted(callback)
        assert cli.trainer.global_step == 128 // BATCH
        for one in (found, callback):
            assert one.report is not None
            assert one.report.ratio > 1
            assert [layer.name for layer in one.report.layers] == projected
        assert not is_swapped(cli.model)
        for name, weight in cli.model.state_dict().items():
            assert torch.equal(weight, module.state_dict()[name]), name

    @pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
    def test_evaluation_runs(self, config: Path, subcommand: str) -> None:
        cli = LanceCLI([subcommand, "--config", str(config)])
        assert not is_swapped(cli.model)
        if subcommand != "predict":
            assert {"validate": "val_loss", "test": "test_loss"}[subcommand] in cli.trainer.callback_metrics

    def test_a_run_writes_its_config(self, config: Path, cwd: Path) -> None:
        arguments = ["fit", "--config", str(config), "--trainer.default_root_dir", str(cwd / "run")]
        for _ in range(2):  # the second one overwrites
            main(arguments)
        written = yaml.safe_load((cwd / "run" / "config.yaml").read_text())
        assert written["lance"]["calibration_batches"] == 2
        assert set(OPTIONS) <= set(written["lance"])
        before = (cwd / "run" / "config.yaml").read_bytes()
        main(["fit", "--config", str(cwd / "run" / "config.yaml"), "--trainer.default_root_dir", str(cwd / "run")])
        assert (cwd / "run" / "config.yaml").read_bytes() == before

    @pytest.mark.parametrize("given", ["read", "theirs", "printed", "edited", "nothing"])
    def test_no_file_of_somebody_else_is_overwritten(
        self, config: Path, cwd: Path, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (cwd / "here").mkdir()
        monkeypatch.chdir(cwd / "here")
        path = cwd / "here" / "config.yaml"
        csv = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
        here = [csv, "--trainer.logger.save_dir=.", "--trainer.logger.name=", "--trainer.logger.version="]
        if given == "edited":
            main(["fit", "--config", str(config), *here])
            path.write_text(path.read_text().replace("seed_everything: 7", "seed_everything: 8"))
        elif given == "printed":
            path.write_text(printed(capsys, "fit", "--config", str(config)))
        elif given != "nothing":
            path.write_text({"read": "# mine\n" + config.read_text(), "theirs": "precious: 1\n"}[given])
        found = path.read_text() if path.exists() else None
        read = ["fit", "--config", str(path if given == "read" else config)]
        main([*read, "--trainer.logger=false"])
        assert (path.read_text() if path.exists() else None) == found
        assert not (cwd / "here" / "config_as_run.yaml").exists()
        main([*read, *here, "--lance.bits=2"])
        assert found is None or path.read_text() == found
        as_run = path if found is None else path.with_name("config_as_run.yaml")
        assert yaml.safe_load(as_run.read_bytes())["lance"]["bits"] == 2

    def test_classes_of_the_current_directory(self, config: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(cwd))])
        (cwd / "my_own_module.py").write_text("from tests.cli.small import SmallModule\nclass Mine(SmallModule): ...\n")
        main(["fit", "--config", str(config), "--model=my_own_module.Mine"])
        assert "my_own_module" in sys.modules

    def test_a_callback_in_the_trainer_section_is_refused(
        self, config: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = refused(capsys, "fit", "--config", str(config), "--trainer.callbacks+=lightning_lance.LanceCallback")
        assert "trainer.callbacks" in line
        assert "'lance'" in line


class TestOptions:
    def test_values_cover_every_option(self) -> None:
        assert set(VALUES) == set(OPTIONS)

    @pytest.mark.parametrize("alone", [True, False], ids=["preset", "all others"])
    def test_by_flag_and_by_yaml(self, config: Path, capsys: pytest.CaptureFixture[str], alone: bool) -> None:
        values = {name: value for name, value in VALUES.items() if (name == "preset") == alone}  # it contradicts some
        flags = [
            f"--lance.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
        ]
        text = printed(capsys, "fit", "--config", str(config), *flags)
        found = yaml.safe_load(text)["lance"]
        assert {name: found[name] for name in values} == values
        content = yaml.safe_load(config.read_text())
        content["lance"].update(values)
        config.write_text(yaml.safe_dump(content))
        assert printed(capsys, "fit", "--config", str(config)) == text

    def test_numbers_keep_their_type(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for given, type_ in (("8", int), ("0.25", float), ("1.0", float), ("{net.0: 4, net.2: {batch: 2}}", dict)):
            text = printed(capsys, "fit", "--config", str(config), f"--lance.rank={given}")
            assert type(yaml.safe_load(text)["lance"]["rank"]) is type_

    def test_help_explains_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main(["fit", "--help"])
        assert left.value.code == 0
        _, _, section = " ".join(capsys.readouterr().out.split()).partition("--lance CONFIG ")
        for name in OPTIONS:
            # The option, words of the docstring, its type.
            _, _, rest = section.partition(f"--lance.{name}")
            assert re.search(r"[a-z]+ [a-z]+ [a-z]+", rest.partition("(type: ")[0]), name

    @pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict", "profile"])
    def test_print_config_loads_back_unchanged(
        self, config: Path, cwd: Path, capsys: pytest.CaptureFixture[str], subcommand: str
    ) -> None:
        flags = ["--lance.rank={net.0: 4, net.2: {batch: 2, channel: full}}", "--lance.layers=[net.0, net.2]"]
        first = printed(capsys, subcommand, "--config", str(config), *flags)
        again = cwd / "again.yaml"
        again.write_text(first)
        assert printed(capsys, subcommand, "--config", str(again)) == first
        assert set(yaml.safe_load(first)["lance"]) == set(OPTIONS)


class TestMessages:
    @pytest.mark.parametrize(
        ("flag", "wanted"),
        [
            ("--lance.rank=true", ["lance.rank='true'", "'compact'", "int", "float"]),
            ("--lance.rank=[3]", ["lance.rank=", "[3]", "'compact'", "int"]),
            ("--lance.rank=1.5", ["lance.rank=1.5", "(0, 1]"]),
            ("--lance.rank={bach: 4}", ["bach", "batch", "channel", "spatial"]),
            ("--lance.batch=baised", ["lance.batch='baised'", "'unbiased'", "'projected'"]),
            ("--lance.preset=publish", ["lance.preset='publish'", "published"]),
            ("--lance={preset: published, rank: 8}", ["lance.rank=8 contradicts preset='published'", "rank=0.7"]),
            ("--lance.bits=3", ["lance.bits=3", "'auto'", "2, 4, 8", "None"]),
            ("--lance.refresh=0.5", ["lance.refresh=0.5", "'epoch'"]),
            ("--lance.calibration_batches=many", ["lance.calibration_batches='many'", "int"]),
            ("--lance.calibration_batches=0", ["lance.calibration_batches=0", "at least 1"]),
            ("--lance.layers=0", ["lance.layers=0", "at least 1"]),
            ("--lance.memory_budget=4XB", ["lance.memory_budget='4XB'", "'4MiB'"]),
            ("--lance.verbose=perhaps", ["lance.verbose=perhaps", "true, false"]),
            ("--lance.seed=x", ["lance.seed=", "x", "int"]),
            ("--lance.rnk=4", ["lance.rnk=4", "memory_budget, preset, rank"]),
            ("--trainer.max_epochs=x", ["trainer.max_epochs=x", "int, null"]),
            ("--trainer.max_epoks=1", ["trainer.max_epoks=1", "trainer.max_epochs"]),
            ("--model.widht=4", ["model.widht", "not an option"]),
            ("--model=tests.cli.small.Smal", ["model", "tests.cli.small.Smal"]),
            ("--config=missing.yaml", ["config", "missing.yaml"]),
        ],
    )
    def test_a_bad_flag(self, config: Path, capsys: pytest.CaptureFixture[str], flag: str, wanted: list[str]) -> None:
        line = refused(capsys, "fit", "--config", str(config), flag)
        for part in wanted:
            assert part in line
        assert len(line) < 400

    @pytest.mark.parametrize(
        ("section", "content", "wanted"),
        [
            ("lance", {"rnk": 3}, ["lance.rnk", "refresh"]),
            ("lance", {"rank": [3]}, ["lance.rank=[3]", "'compact'"]),
            ("lance", {"layers": {"a": 1}}, ["lance.layers={'a': 1}", "int"]),
            ("lnce", {"rank": 3}, ["lnce"]),
            ("trainer", {"max_epochs": "x"}, ["trainer.max_epochs=x", "int"]),
            ("trainer", {"callbacks": [{"class_path": "lightning_lance.LanceCallback", "init_args": {"rank": True}}]},
             ["trainer.callbacks.rank=True", "'compact'"]),
            ("trainer", {"callbacks": [{"class_path": "lightning_lance.LanceCallback", "init_args": {"rnk": 3}}]},
             ["trainer.callbacks.rnk", "rank, bits"]),
            ("trainer", {"callbacks": [{"class_path": "lightning_lance.LanceCallbak"}]},
             ["trainer.callbacks", "lightning_lance.LanceCallbak"]),
        ],
    )  # fmt: skip
    def test_a_bad_file(
        self, config: Path, capsys: pytest.CaptureFixture[str], section: str, content: dict[str, Any], wanted: list[str]
    ) -> None:
        found = yaml.safe_load(config.read_text())
        config.write_text(yaml.safe_dump({**found, section: content}))
        line = refused(capsys, "fit", "--config", str(config))
        for part in wanted:
            assert part in line
        assert len(line) < 400

    def test_subcommands_and_required_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(capsys, "fot")
        assert all(part in line for part in ("fot", "fit", "profile"))
        assert "model" in refused(capsys, "fit")

    def test_a_model_without_layers_to_compress(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(capsys, "fit", "--config", str(config), "--lance.layers=nt.*", code=1)
        assert "layers='nt.*'" in line
        assert "net.0" in line

    def test_other_errors_keep_their_traceback(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise ValueError("of the user")

        monkeypatch.setattr(SmallModule, "configure_optimizers", fail)
        with pytest.raises(ValueError, match="of the user"):
            main(["fit", "--config", str(config)])

    @pytest.mark.parametrize(
        ("types", "words"),
        [
            ("<class 'int'>, <class 'NoneType'>", "int, null"),
            ("typing.Literal['a', 'b'], <class 'bool'>", "'a', 'b', true, false"),
            ("<class 'str'>, dict[str, int | float]", "str, a mapping"),
            ("list[a.b.C], <class 'a.b.C'>", "list[a.b.C], a.b.C"),
        ],
    )
    def test_readable(self, types: str, words: str) -> None:
        assert readable(types) == words


class TestProfile:
    def test_table_json_and_plot(self, config: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(["profile", "--config", str(config), "--lance.bits=4", "--json=found.json", "--plot=found.png", "--top=2"])
        text = capsys.readouterr().out
        for part in ("kept by operation", "kept by module", "4 more", "net.3", "relu"):
            assert part in text
        assert (cwd / "found.png").stat().st_size > 1000
        found = json.loads((cwd / "found.json").read_text())
        assert found["plain"]["total"] > found["compressed"]["total"]
        for key in ("plain", "compressed"):
            assert sum(found[key]["by_op"].values()) == found[key]["total"]
            assert sum(found[key]["by_module"].values()) == found[key]["total"]

    @pytest.mark.parametrize(
        ("option", "steps"),
        [("rank=auto", 1), ('rank={"batch": 8}', 3), ("rank=compact", 2), ("preset=published", 1)],  # compact: all left
    )
    def test_gives_the_weights_back_and_writes_nothing(self, config: Path, cwd: Path, option: str, steps: int) -> None:
        before = sorted(cwd.rglob("*"))
        cli = LanceCLI(["profile", "--config", str(config), "--trainer.logger=true", f"--lance.{option}"])
        assert sorted(cwd.rglob("*")) == before
        assert cli.trainer.global_step == steps
        assert not is_swapped(cli.model)
        for name, weight in fitted().state_dict().items():
            assert torch.equal(weight, cli.model.state_dict()[name]), name

    @pytest.mark.parametrize("rank", ["auto", {"batch": 4}], ids=str)
    def test_equals_a_measurement_by_hand(self, config: Path, cwd: Path, rank: Any) -> None:
        given = rank if isinstance(rank, str) else json.dumps(rank)
        main(["profile", "--config", str(config), "--json=found.json", f"--lance.rank={given}", "--lance.bits=4"])
        found = json.loads((cwd / "found.json").read_text())
        module, data = SmallModule(), SmallData()
        batches = list(data.loader())
        images, labels = batches[0]
        loss = torch.nn.functional.cross_entropy
        plain = measure_saved_bytes(lambda: loss(module(images), labels), module)
        assert found["plain"]["total"] == plain.total
        assert found["plain"]["by_module"] == plain.by_module()
        if rank == "auto":
            assert found["plain"]["by_op"] == plain.by_op()
        session = LanceSession(module, LanceConfig(rank=rank, bits=4))
        session.start(observe=False)
        session.calibrate([lambda: module(images)])
        assert bool(session.layers) == (rank != "auto")
        with session.step():
            held = loss(module(images), labels)
        session.stop()
        held.backward()
        assert session.report is not None
        after = session.report.compressed
        assert after is not None
        assert after.total * 4 < plain.total
        assert found["compressed"]["by_op"] == after.by_op()
        assert found["compressed"]["by_module"] == after.by_module()

    def test_without_training_data(
        self, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SmallData, "train_dataloader", lambda self: [])
        line = refused(capsys, "profile", "--config", str(config), code=1)
        assert "training data" in line

    def test_needs_the_callback(self) -> None:
        with pytest.raises(StateError, match="LanceCallback"):
            LanceTrainer(**QUIET).profile(SmallModule())


@pytest.mark.parametrize("hidden", ["jsonargparse", "docstring_parser"])
def test_without_the_extra(hidden: str) -> None:
    """In a fresh process: the package does not import jsonargparse, and the tool says what to install."""
    script = f"""
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] == "{hidden}" else super().find_spec(name, *rest)

    @classmethod
    def find_distributions(cls, context):
        return [] if (context.name or "").replace("-", "_") == "{hidden}" else super().find_distributions(context)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
import lightning_lance
assert "jsonargparse" not in sys.modules, "imported"
from lightning_lance.cli import NEEDED, main
main(["--help"])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert "pip install 'lightning-lance[cli]'" in line


def test_the_extra_is_declared() -> None:
    assert f'cli = ["{NEEDED}"]' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_console_script_is_declared() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    scripts = re.search(r"\[project\.scripts\]\n(.*)\n", pyproject.read_text())
    assert scripts is not None
    assert scripts[1] == 'lightning-lance = "lightning_lance.cli:main"'


def test_version_is_told_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-lance {lightning_lance.__version__}\n"


def test_the_version_is_that_of_the_changelog_and_the_citation() -> None:
    root = Path(__file__).parents[2]
    assert f"## [{lightning_lance.__version__}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {lightning_lance.__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
