"""The subcommand `lightning-lance stream`."""

from __future__ import annotations

import inspect
import json
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_lance import ContinualCallback, LanceWarning
from lightning_lance.cli import main
from lightning_lance.cli.saving import saved_config
from lightning_lance.cli.stream import StreamCLI
from lightning_lance.streams import AvalancheDataModule, StreamRunner
from tests.avalanche.runs import KillAt
from tests.cli.tool import printed, refused
from tests.processes import in_process

LANCE = [name for name in inspect.signature(ContinualCallback).parameters if name != "options"]
OPTIONS = {
    "lance": [*LANCE, "rank", "batch", "layers", "memory_budget", "calibration_batches"],
    "data": list(inspect.signature(AvalancheDataModule).parameters),
    "stream": ["root", "forward_transfer", "checkpoint_every", "restart", "progress"],
}
# A value of each option of ours that is not its default.
VALUES: dict[str, Any] = {
    "lance.threshold": 0.5,
    "lance.threshold_growth": 0.01,
    "lance.reserved": 4,
    "lance.compress_first": False,
    "lance.feature_side": "channel",
    "lance.heads": ["network.0"],
    "lance.rank": {"batch": 4},
    "lance.layers": ["network.0", "network.3"],
    "lance.calibration_batches": 3,
    "data.batch_size": 16,
    "data.eval_batch_size": 5,
    "data.num_workers": 1,
    "data.drop_last": True,
    "data.seed": 4,
    "stream.forward_transfer": False,
    "stream.checkpoint_every": 7,
    "stream.restart": True,
    "plain": True,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*task-aware|.*nearly full")


@pytest.fixture
def config(cwd: Path) -> Path:
    """Three experiences of 32 points, two epochs each."""
    content = {
        "seed_everything": 3,
        "stream": {"root": str(cwd / "run"), "checkpoint_every": 2, "progress": False},
        "data": {"benchmark": "tests.avalanche.runs.tasks", "batch_size": 8},
        "model": {
            "class_path": "lightning_lance.streams.ContinualClassifier",
            "init_args": {"network": "tests.avalanche.runs.network", "task_heads": "5"},
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_model_summary": False},
        "lance": {"calibration_batches": 2, "verbose": False},
    }
    path = cwd / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def final(root: Path) -> dict[str, Any]:
    return torch.load(root / "experience_002.ckpt", weights_only=True)


class TestRun:
    def test_table_plots_and_files(self, config: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(["stream", "--config", str(config)])
        text = capsys.readouterr().out
        results = json.loads((cwd / "run" / "results.json").read_text())
        assert f"ACC {results['summary']['ACC']:.3f}" in text
        assert text.count("accuracy (%) on each experience") == 1
        for row in (results["baseline"], *results["matrix"]):
            assert "  ".join(f"{100 * value:.1f}".rjust(5) for value in row) in text
        for name in ("matrix", "accuracy"):
            assert (cwd / "run" / "plots" / f"{name}.png").stat().st_size > 1000
            assert f"{name}.png" in text

    @pytest.mark.parametrize(("name", "value"), [("threshold", 0.8), ("preset", "published")])
    def test_equals_the_runner_in_python(self, config: Path, cwd: Path, name: str, value: Any) -> None:
        cli = StreamCLI(["--config", str(config), f"--lance.{name}={value}"])
        kept = cli.run().kept
        if name == "preset":  # its first experience is not compressed
            assert kept[0][0] == kept[0][1] == kept[1][0] > kept[1][1]
        import lightning.pytorch as pl

        from tests.avalanche import runs

        pl.seed_everything(3, verbose=False)
        model = runs.ContinualClassifier(runs.network(), task_heads="5")
        trainer = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_model_summary": False}
        lance = ContinualCallback(calibration_batches=2, verbose=False, **{name: value})
        data = AvalancheDataModule(runs.tasks, batch_size=8)
        StreamRunner(model, data, cwd / "python", trainer, lance, checkpoint_every=2, progress=False).run()
        assert (cwd / "python" / "results.json").read_text() == (cwd / "run" / "results.json").read_text()
        wanted = final(cwd / "python")["state_dict"]
        for key, weight in final(cwd / "run")["state_dict"].items():
            assert torch.equal(weight, wanted[key]), key

    def test_plain_trains_without_lance(self, config: Path, cwd: Path) -> None:
        cli = StreamCLI(["--config", str(config), "--plain=true"])
        cli.run()
        assert cli.runner.lance is None
        assert final(cwd / "run")["stream"]["lance"] is None

    def test_says_nothing_of_its_own_making(self, config: Path) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            main(["stream", "--config", str(config)])
        texts = [str(found.message) for found in caught if issubclass(found.category, UserWarning)]
        assert [text for text in texts if "zero" in text or "val_dataloader" in text] == []
        assert [found for found in caught if issubclass(found.category, LanceWarning)] == []

    @pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
    def test_an_optimiser_has_its_own_defaults(self, config: Path, optimizer: str) -> None:
        """Not those of the module's default one, which the parser would keep for any other."""
        name = f"torch.optim.{optimizer}"
        cli = StreamCLI(["--config", str(config), f"--model.optimizer={name}", "--model.optimizer.lr=0.02"])
        made = cli.model.configure_optimizers()
        wanted = getattr(torch.optim, optimizer)([torch.zeros(1)], lr=0.02)
        for key, value in wanted.defaults.items():
            assert made.defaults[key] == value, key


class TestResume:
    def test_a_killed_command_ends_with_the_same_numbers(self, config: Path, cwd: Path) -> None:
        command = ["stream", "--config", str(config), "--trainer.callbacks+=tests.cli.test_stream.KillOnce"]
        assert in_process(main, command) == -signal.SIGKILL
        assert list((cwd / "run" / "inside" / "experience_001").glob("step=*.ckpt"))
        for root in ("run", "whole"):
            assert in_process(main, [*command, f"--stream.root={cwd / root}"]) == 0
        found, wanted = final(cwd / "run"), final(cwd / "whole")
        for name, value in wanted["state_dict"].items():
            assert torch.equal(value, found["state_dict"][name]), name
        assert (cwd / "run" / "results.json").read_text() == (cwd / "whole" / "results.json").read_text()

    def test_other_options_are_refused(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(["stream", "--config", str(config)])
        before = capsys.readouterr().out
        for flag, wanted in (
            ("--plain=true", ["plain=false there, true asked for"]),
            ("--lance.rank={batch: 2}", ['lance.rank="auto" there', '{"batch": 2} asked for']),
            ("--trainer.max_epochs=3", ["trainer.max_epochs=2 there, 3"]),
        ):
            line = refused(capsys, "stream", "--config", str(config), flag, code=1)
            for part in [*wanted, "--stream.restart=true"]:
                assert part in line
        main(["stream", "--config", str(config), "--stream.checkpoint_every=5"])  # changes no result
        assert capsys.readouterr().out == before
        main(["stream", "--config", str(config), "--plain=true", "--stream.restart=true"])
        assert "autograd keeps" not in capsys.readouterr().out

    def test_a_mistake_before_any_training_leaves_nothing_to_go_on_from(
        self, config: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "lance.layers='nothing'" in refused(
            capsys, "stream", "--config", str(config), "--lance.layers=nothing", code=1
        )
        assert (cwd / "run" / "start.ckpt").is_file()
        main(["stream", "--config", str(config)])
        assert "ACC" in capsys.readouterr().out


class TestConfigFile:
    """The options as run lie in the folder; a file of the user's is never written to."""

    def test_it_holds_the_options_and_loads_back(self, config: Path, cwd: Path) -> None:
        main(["stream", "--config", str(config), "--lance.threshold=0.9"])
        path = cwd / "run" / "config.yaml"
        content, changed = path.read_bytes(), path.stat().st_mtime_ns
        assert yaml.safe_load(content)["lance"]["threshold"] == 0.9
        assert saved_config(path.parent) == path
        main(["stream", "--config", str(path)])
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, changed)
        main(["stream", "--config", str(path), "--lance.threshold=0.8", "--stream.restart=true"])
        assert yaml.safe_load(path.read_bytes())["lance"]["threshold"] == 0.8

    def test_the_one_given_in_the_same_folder_stays(self, config: Path, cwd: Path) -> None:
        own = cwd / "run" / "config.yaml"
        own.parent.mkdir()
        own.write_text("# mine\n" + config.read_text())
        content = own.read_bytes()
        for _ in range(2):
            main(["stream", "--config", str(own)])
        assert own.read_bytes() == content
        beside = yaml.safe_load((cwd / "run" / "config_as_run.yaml").read_bytes())
        assert beside["data"]["batch_size"] == 8
        assert beside["lance"]["threshold"] == "auto"  # defaults too
        assert saved_config(own.parent) == own.with_name("config_as_run.yaml")

    @pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "edited"])
    def test_a_damaged_or_edited_one_does_not_stop_the_stream(self, config: Path, cwd: Path, damage: str) -> None:
        main(["stream", "--config", str(config)])
        path = cwd / "run" / "config.yaml"
        whole = path.read_bytes()
        left = {
            "empty": b"",
            "cut": whole[:200],
            "zeros": whole[:50] + bytes(100) + whole[150:],
            "edited": whole.replace(b"seed_everything: 3", b"seed_everything: 4"),
        }[damage]
        assert left != whole
        path.write_bytes(left)
        main(["stream", "--config", str(config)])
        assert path.read_bytes() == left
        assert yaml.safe_load((cwd / "run" / "config_as_run.yaml").read_bytes())["seed_everything"] == 3
        assert saved_config(path.parent) == path.with_name("config_as_run.yaml")

    def test_where_both_are_the_users_it_is_said(self, config: Path, cwd: Path) -> None:
        (cwd / "run").mkdir()
        for name in ("config.yaml", "config_as_run.yaml"):
            (cwd / "run" / name).write_text("mine: [")
        with pytest.warns(LanceWarning, match="are not as this command wrote them"):
            main(["stream", "--config", str(config)])
        for name in ("config.yaml", "config_as_run.yaml"):
            assert (cwd / "run" / name).read_text() == "mine: ["

    def test_other_options_are_refused_whatever_became_of_the_file(
        self, config: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(["stream", "--config", str(config)])
        (cwd / "run" / "config.yaml").unlink()
        line = refused(capsys, "stream", "--config", str(config), "--lance.threshold=0.5", code=1)
        assert 'lance.threshold="auto" there, 0.5 asked for' in line

    def test_a_folder_of_the_users_is_refused_in_one_line(
        self, config: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (cwd / "run").mkdir()
        (cwd / "run" / "results.json").write_text("{}")
        line = refused(capsys, "stream", "--config", str(config), code=1)
        assert "holds results.json, which this stream has not written" in line
        assert [path.name for path in (cwd / "run").iterdir()] == ["results.json"]


class TestOptions:
    def test_by_flag_and_by_yaml_and_printed(self, config: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in VALUES.items()]
        text = printed(capsys, "stream", "--config", str(config), *flags)
        content = yaml.safe_load(config.read_text())
        for name, value in VALUES.items():
            group, _, key = name.rpartition(".")
            found = yaml.safe_load(text)
            assert (found[group] if group else found)[key] == value, name
            (content[group] if group else content)[key] = value
        config.write_text(yaml.safe_dump(content))
        assert printed(capsys, "stream", "--config", str(config)) == text
        # What is printed loads back unchanged.
        again = cwd / "again.yaml"
        again.write_text(text)
        assert printed(capsys, "stream", "--config", str(again)) == text

    def test_a_printed_optimiser_loads_back_unchanged(
        self, config: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = printed(capsys, "stream", "--config", str(config), "--model.optimizer=torch.optim.AdamW")
        assert yaml.safe_load(text)["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.01
        again = cwd / "again.yaml"
        again.write_text(text)
        assert printed(capsys, "stream", "--config", str(again)) == text

    def test_help_explains_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["stream", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for group, names in OPTIONS.items():
            for name in names:
                # "--x X, --x+ X", from Python 3.13 on "--x, --x+ X"
                found = re.search(rf" --{group}\.{name},? (?:--\S+ )?\S+ (.*?)type: ", text)
                assert found, (group, name)
                assert re.search(r"[a-z]+ [a-z]+", found[1]), (group, name)


class TestMessages:
    @pytest.mark.parametrize(
        ("flag", "wanted"),
        [
            ("--lance.threshold=1.5", ["lance.threshold=1.5", "(0, 1]"]),
            ("--lance.threshold=x", ["lance.threshold='x'", "a fraction in (0, 1]"]),
            ("--lance.reserved=some", ["lance.reserved='some'", "'full'"]),
            ("--lance.feature_side=patches", ["lance.feature_side='patches'", "'patch', 'channel'"]),
            ("--lance.rank=1.5", ["lance.rank=1.5", "(0, 1]"]),
            ("--lance.refresh=epoch", ["lance.refresh='epoch'", "Leave it out"]),
            ("--lance.rnk=4", ["lance.rnk=4", "lance.rank"]),
            ("--data.benchmark=avalanche.benchmarks.SplitMNISTX", ["data.benchmark=avalanche.benchmarks.SplitMNISTX"]),
            ("--data.arguments={sed: 0}", ["data.arguments={'sed': 0}", "augment"]),
            ("--data.batch_size=0", ["data.batch_size=0", "at least 1"]),
            ("--data.class_path=A", ["data.class_path", "benchmark, drop_last"]),
            ("--stream.checkpoint_every=0", ["stream.checkpoint_every=0", "at least 1"]),
            ("--model.task_heads=fc", ["task_heads='fc'", "one of 0, 3, 5"]),
            ("--trainer.max_epochs=-3", ["trainer", "max_epochs", "-3", "non-negative"]),
            ("--trainer.accelerator=abacus", ["trainer", "accelerator='abacus'", "cpu"]),
            ("--trainer.max_epochs=x", ["trainer.max_epochs=x", "int"]),
            ("--config=missing.yaml", ["missing.yaml"]),
        ],
    )
    def test_a_bad_flag(self, config: Path, capsys: pytest.CaptureFixture[str], flag: str, wanted: list[str]) -> None:
        line = refused(capsys, "stream", "--config", str(config), flag)
        for part in wanted:
            assert part in line

    def test_a_pattern_that_matches_nothing(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(capsys, "stream", "--config", str(config), "--lance.heads=nothing.*", code=1)
        assert "lance.heads='nothing.*'" in line
        assert "network" in line


class KillOnce(KillAt):
    """As the command line takes it: in the middle of the second experience."""

    def __init__(self) -> None:
        super().__init__(1, 5, Path("killed"))
