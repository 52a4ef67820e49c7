"""The callback in a LightningCLI that a user wrote, which knows nothing of this package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_lance import ContinualCallback, LanceCallback, LanceConfig, is_swapped
from lightning_lance.subspaces.ranks import RankRules
from lightning_lance.trainer.callback import CallbackOptions
from tests.cli.small import QUIET, SmallData, SmallModule
from tests.cli.tool import fitted

TRAINER = [f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items()]
CLASS = "lightning_lance.LanceCallback"


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


def user_cli(*args: str, run: bool = False) -> LightningCLI:
    """What a user has in train.py; without `run` the classes are made and nothing is trained."""
    subcommand = ["fit"] if run else []
    return LightningCLI(SmallModule, SmallData, seed_everything_default=7, run=run, args=[*subcommand, *TRAINER, *args])


def callbacks(cli: LightningCLI) -> list[LanceCallback]:
    return [found for found in cli.trainer.callbacks if isinstance(found, LanceCallback)]


def written(cwd: Path, value: Any) -> str:
    path = cwd / "user.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": value}}, sort_keys=False))
    return f"--config={path}"


def entry(**options: Any) -> dict[str, Any]:
    return {"class_path": CLASS, "init_args": options} if options else {"class_path": CLASS}


RANKS = [
    "auto",
    8,
    0.7,
    1.0,
    {"batch": 8, "spatial": 0.9},
    {"batch": 0.5, "channel": "full", "token": 3},
    {"net.0": 4, "net.2": 0.8, "net.5": "full"},
    {"net.0": {"batch": 8, "channel": 0.97, "spatial": "full"}, "net.*": {"feature": "full"}, "net": "auto"},
]


class TestYaml:
    @pytest.mark.parametrize("rank", RANKS, ids=str)
    def test_ranks_arrive_as_written(self, cwd: Path, rank: Any) -> None:
        [callback] = callbacks(user_cli(written(cwd, [entry(rank=rank)])))
        assert callback.config == CallbackOptions(rank=rank)
        assert repr(callback.config.rank) == repr(rank)  # 8 is no 8.0, a mapping a dict
        for name in ("net.0", "net.2", "net.5"):
            assert callback.config.rules().for_layer(name) == RankRules(rank).for_layer(name)

    @pytest.mark.parametrize("layers", ["trainable", 2, "net.*", ["net.0", "net.2"]], ids=str)
    def test_layers_arrive_as_written(self, cwd: Path, layers: Any) -> None:
        [callback] = callbacks(user_cli(written(cwd, [entry(layers=layers)])))
        assert callback.config.layers == layers
        assert type(callback.config.layers) is type(layers)

    def test_every_option(self, cwd: Path) -> None:
        options = {
            "batch": "projected",
            "bits": 2,
            "freeze_norms": True,
            "memory_budget": "1MiB",
            "refresh": 4,
            "calibration_batches": 3,
            "verbose": False,
            "seed": 5,
        }
        [callback] = callbacks(user_cli(written(cwd, [entry(**options)])))
        for name in LanceConfig.__dataclass_fields__:
            assert getattr(callback.config, name) == options.get(name, getattr(LanceConfig(), name))
        assert not callback.verbose

    def test_one_callback_without_a_list(self, cwd: Path) -> None:
        [callback] = callbacks(user_cli(written(cwd, entry(rank=4))))
        assert callback.config.rank == 4

    def test_among_other_callbacks(self, cwd: Path) -> None:
        others = [{"class_path": "lightning.pytorch.callbacks.LambdaCallback"}]
        cli = user_cli(written(cwd, [*others, entry(rank=4), *others[:0]]), "--trainer.callbacks+=DeviceStatsMonitor")
        assert {type(found).__name__ for found in cli.trainer.callbacks} >= {"LambdaCallback", "DeviceStatsMonitor"}
        assert len(callbacks(cli)) == 1


class TestFlags:
    def test_appended(self) -> None:
        [callback] = callbacks(user_cli(f"--trainer.callbacks+={CLASS}", "--trainer.callbacks.rank=0.5"))
        assert callback.config.rank == 0.5

    def test_the_short_name(self) -> None:
        [callback] = callbacks(user_cli("--trainer.callbacks+=LanceCallback"))
        assert callback.config == CallbackOptions()

    def test_options_bind_to_the_last_one(self) -> None:
        cli = user_cli(
            "--trainer.callbacks+=LearningRateFinder",
            "--trainer.callbacks.max_lr=0.5",
            f"--trainer.callbacks+={CLASS}",
            "--trainer.callbacks.rank={net.0: 4, net.2: {batch: 8, spatial: 0.9}}",
            "--trainer.callbacks.layers=[net.0, net.2]",
        )
        [callback] = callbacks(cli)
        assert callback.config.rank == {"net.0": 4, "net.2": {"batch": 8, "spatial": 0.9}}
        assert callback.config.layers == ["net.0", "net.2"]

    def test_appended_to_a_file(self, cwd: Path) -> None:
        file = written(cwd, [{"class_path": "lightning.pytorch.callbacks.LambdaCallback"}])
        cli = user_cli(file, f"--trainer.callbacks+={CLASS}", "--trainer.callbacks.rank=6")
        assert "LambdaCallback" in {type(found).__name__ for found in cli.trainer.callbacks}
        assert callbacks(cli)[0].config.rank == 6

    def test_a_flag_over_a_file(self, cwd: Path) -> None:
        file = written(cwd, [entry(rank=0.5, layers=2)])
        [callback] = callbacks(user_cli(file, "--trainer.callbacks.rank=3"))
        assert (callback.config.rank, callback.config.layers) == (3, 2)

    def test_as_json(self) -> None:
        given = json.dumps(entry(rank={"batch": 2}))
        assert callbacks(user_cli(f"--trainer.callbacks+={given}"))[0].config.rank == {"batch": 2}

    @pytest.mark.parametrize("flags", [["rank=true"], ["rnk=4"], ["layers=0"], ["batch=both"]], ids=str)
    def test_bad_values_are_refused(self, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises((SystemExit, ValueError)) as refused:
            user_cli(f"--trainer.callbacks+={CLASS}", *(f"--trainer.callbacks.{flag}" for flag in flags))
        name = flags[0].partition("=")[0]
        assert name in capsys.readouterr().err + str(refused.value)


class TestContinual:
    CLASS = "lightning_lance.ContinualCallback"
    RANK: ClassVar = {"net.0": 4, "net.2": {"batch": 8, "spatial": 0.9}}

    def check(self, cli: LightningCLI) -> None:
        [callback] = callbacks(cli)
        assert isinstance(callback, ContinualCallback)
        assert callback.config.rank == self.RANK
        assert callback.config.calibration_batches == 2
        assert callback.stream.config is callback.config
        assert callback.stream.options.threshold == 0.8
        assert callback.stream.options.heads == ["net.5"]
        assert callback.config.bits == "auto"

    def test_in_a_file(self, cwd: Path) -> None:
        options = {"threshold": 0.8, "heads": ["net.5"], "rank": self.RANK, "calibration_batches": 2}
        self.check(user_cli(written(cwd, [{"class_path": self.CLASS, "init_args": options}])))

    def test_appended(self) -> None:
        flags = ["threshold=0.8", "heads=[net.5]", f"rank={json.dumps(self.RANK)}", "calibration_batches=2"]
        self.check(user_cli(f"--trainer.callbacks+={self.CLASS}", *(f"--trainer.callbacks.{flag}" for flag in flags)))

    def test_a_fit_is_an_experience(self, cwd: Path) -> None:
        options = {"rank": self.RANK, "calibration_batches": 2, "verbose": False}
        cli = user_cli(written(cwd, [{"class_path": self.CLASS, "init_args": options}]), run=True)
        [callback] = callbacks(cli)
        assert isinstance(callback, ContinualCallback)
        assert not is_swapped(cli.model)
        assert set(callback.capacity) == {"net.0", "net.2", "net.5"}
        assert all(found.protected > 0 for found in callback.capacity.values())


class TestRuns:
    def test_a_fit_equals_the_one_in_python(self, cwd: Path) -> None:
        rank = {"net.0": 4, "net.2": {"batch": 8, "spatial": 0.8}, "net.5": 0.9}
        options = {"rank": rank, "layers": ["net.0", "net.2", "net.5"], "calibration_batches": 2, "verbose": False}
        cli = user_cli(written(cwd, [entry(**options)]), run=True)
        assert not is_swapped(cli.model)
        [callback] = callbacks(cli)
        assert callback.report is not None
        cores = {layer.name: layer.core_shape for layer in callback.report.layers}
        assert cores["net.0"] == (4, 3, 4, 4)  # the rank is clipped to the size of a mode
        assert cores["net.2"][:2] == (8, 8)

        module = fitted(LanceCallback(**options))
        for name, weight in cli.model.state_dict().items():
            assert torch.equal(weight, module.state_dict()[name]), name

    def test_the_printed_config_loads_back_unchanged(self, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = written(cwd, [entry(rank={"net.0": {"batch": 4}}, layers=["net.0"])])
        with pytest.raises(SystemExit):
            user_cli(file, "--print_config")
        first = capsys.readouterr().out
        path = cwd / "again.yaml"
        path.write_text(first)
        with pytest.raises(SystemExit):
            LightningCLI(SmallModule, SmallData, run=False, args=[f"--config={path}", "--print_config"])
        assert capsys.readouterr().out == first
        assert yaml.safe_load(first)["trainer"]["callbacks"][0]["init_args"]["rank"] == {"net.0": {"batch": 4}}
