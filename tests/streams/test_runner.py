"""Streams through a Lightning Trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from avalanche.models import MultiHeadClassifier
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from examples.streams.plateau import BestWeights
from lightning_lance import ConfigError, ContinualCallback, LanceWarning, StateError, is_swapped
from lightning_lance.continual import LayerMemory
from lightning_lance.streams.evaluation import Evaluation
from lightning_lance.streams.module import ContinualClassifier, TaskHeads, takes_task_labels
from lightning_lance.streams.runner import StreamRunner
from lightning_lance.trainer.metrics import continual_metrics
from tests.avalanche import runs
from tests.avalanche.runs import BENCHMARKS, EXPERIENCES, final, network, runner
from tests.mutations import same
from tests.processes import ROOT, in_process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a run that nothing has disturbed, made once for each set of options."""
    made: dict[str, Path] = {}

    def root(**options: Any) -> Path:
        key = repr(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted") / "run"
            assert in_process(runs.run, made[key], **options) == 0
        return made[key]

    return root


def assert_same(root: Path, other: Path) -> None:
    found, wanted = final(root), final(other)
    assert found.keys() == wanted.keys()
    for part, value in found.items():
        assert same(value, wanted[part]), part


class TestBenchmarks:
    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_every_kind_of_benchmark_and_head(self, cwd: Path, name: str) -> None:
        model = "task" if "task" in name or name == "tensors" else "growing"
        result = runner(cwd / "run", model, name, forward_transfer=True).run()
        assert result.matrix.shape == (EXPERIENCES, EXPERIENCES)
        assert not result.matrix.isnan().any()
        assert {"ACC", "BWT", "FWT"} <= set(result.summary)
        assert result.summary["learning_accuracy"] > 0.6  # it learns, so labels and data belong together
        if name == "ni":
            assert (result.matrix == result.matrix[:, :1]).all()

    def test_matrix_equals_counting_by_hand(self, cwd: Path) -> None:
        done = runner(cwd / "run", "own")
        result = done.run()
        module, stream = done.model.eval(), done.data.benchmark.test_stream
        for experience, found in enumerate(stream):
            samples = [found.dataset[index] for index in range(len(found.dataset))]
            x, y, t = (torch.stack([torch.as_tensor(sample[part]) for sample in samples]) for part in range(3))
            with torch.no_grad():
                right = (module(x, t).argmax(1) == y).double().mean()
            assert result.matrix[-1, experience] == right.float()
        assert result.summary["ACC"] == pytest.approx(float(result.matrix[-1].mean()))
        for index in range(EXPERIENCES):  # and every earlier row from its checkpoint
            weights = torch.load(cwd / "run" / f"experience_{index:03d}.ckpt", weights_only=True)["state_dict"]
            module.load_state_dict(weights)
            trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
            done.data.evaluated = None
            evaluation = Evaluation(module, EXPERIENCES)
            trainer.test(evaluation, datamodule=done.data, verbose=False)
            assert torch.equal(evaluation.correct / evaluation.total, result.matrix[index])

    def test_own_module_gets_its_labels(self, cwd: Path) -> None:
        done = runner(cwd / "run", "own")
        done.run()
        assert isinstance(done.model, runs.OwnModule)
        steps = 2 * 4
        assert done.model.seen == [0] * steps + [1] * steps + [2] * steps

    def test_without_forward_transfer(self, cwd: Path) -> None:
        result = runner(cwd / "run", forward_transfer=False).run()
        assert result.baseline.isnan().all()
        above = torch.ones(EXPERIENCES, EXPERIENCES).triu(1).bool()
        assert torch.equal(result.matrix.isnan(), above)
        assert "FWT" not in result.summary
        assert "BWT" in result.summary

    @pytest.mark.parametrize("model", ["growing", "task"])
    def test_untrained_heads_are_left_alone(self, cwd: Path, model: str) -> None:
        """Evaluation of experiences to come makes heads grow, and changes nothing that is trained."""
        results = [
            runner(cwd / str(forward), model, forward_transfer=forward, benchmark="nc with tasks").run()
            for forward in (False, True)
        ]
        # The heads of later tasks draw their first weights at other moments; what experience 0 learns is the same.
        assert results[0].matrix[0, 0] == results[1].matrix[0, 0]

    def test_mixed_precision(self, cwd: Path) -> None:
        result = runner(cwd / "run", "task", trainer={"precision": "bf16-mixed"}).run()
        assert result.summary["ACC"] > 0.6

    def test_own_prediction(self, cwd: Path) -> None:
        def always_one(module: nn.Module, inputs: Tensor, task_labels: Tensor) -> Tensor:
            return torch.ones(len(inputs), dtype=torch.int64)

        result = runner(cwd / "run", predict=always_one).run()
        assert (result.matrix == 0.5).all()


class TestLance:
    def test_compresses_and_restores(self, cwd: Path) -> None:
        done = runner(cwd / "run", lance={})
        result = done.run()
        assert not is_swapped(done.model)
        assert len(result.kept) == EXPERIENCES
        assert all(after <= before for before, after in result.kept)
        assert "instead of" in str(result)

    def test_every_experience_is_calibrated_anew(self, cwd: Path) -> None:
        done = runner(cwd / "run", lance={"rank": 0.7, "batch": "projected"})
        seen = []

        class Look(Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
                assert done.lance is not None
                if trainer.is_last_batch:
                    seen.append(done.lance.state_dict()["subspaces"])

        done.options["callbacks"] = [Look()]
        done.run()
        assert len(seen) == 2 * EXPERIENCES
        assert str(seen[0]) == str(seen[1])
        assert str(seen[1]) != str(seen[2])


class TestContinual:
    @pytest.mark.filterwarnings("ignore:nearly full")
    def test_nothing_is_forgotten(self, cwd: Path) -> None:
        """A harder stream than the others: the same classes, shuffled inputs."""
        plain = runner(cwd / "plain", "own", "shuffled").run()
        options = {"threshold": 0.95, "heads": ["heads"]}
        protected = runner(cwd / "lance", "own", "shuffled", lance=options, continual=True).run()
        assert plain.summary["BWT"] < -0.1
        assert protected.summary["BWT"] > -0.05
        assert protected.summary["ACC"] > plain.summary["ACC"]

    def test_weights_move_only_outside_of_what_is_protected(self, cwd: Path) -> None:
        done = runner(cwd / "run", "task", lance={"threshold": 0.8}, continual=True)
        done.run()
        states = [torch.load(cwd / "run" / f"experience_{index:03d}.ckpt", weights_only=True) for index in range(3)]
        for before, after in pairwise(states):
            stream = before["stream"]["lance"]["stream"]
            assert stream["experience"] == before["stream"]["experience"] + 1
            assert set(stream["memories"]) == {"network.trunk.0", "network.trunk.3"}  # the heads are not protected
            for name, (width, groups, _, state) in stream["memories"].items():
                memory = LayerMemory(width, groups)
                memory.load_state_dict(state)
                change = after["state_dict"][f"{name}.weight"] - before["state_dict"][f"{name}.weight"]
                assert change.norm() > 1e-3
                assert (change @ memory.protected[0]).norm() <= 1e-5 * change.norm()
                bias = f"{name}.bias"
                assert torch.equal(before["state_dict"][bias], after["state_dict"][bias])

    def test_a_shared_head_is_said_to_be_unprotected(self, cwd: Path) -> None:
        with pytest.warns(LanceWarning, match="network.head.*not protected"):
            runner(cwd / "run", "growing", "class-incremental", lance={}, continual=True).run()

    def test_two_processes_protect_the_same(self, cwd: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.avalanche.runs", str(cwd / "run")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        ranks = [torch.load(cwd / f"rank {rank}.pt", weights_only=True) for rank in range(2)]
        assert len(ranks[0]["stream"]["memories"]) == 2
        for part in ("stream", "weights", "correct", "total"):
            assert same(ranks[0][part], ranks[1][part]), part
        # Each test sample is counted once, by one of the two.
        assert torch.equal(ranks[0]["total"], final(cwd / "run")["total"])
        assert ranks[0]["total"].unique().tolist() == [12]
        assert [sum(pair) for pair in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)] == [32] * (2 * EXPERIENCES)


KILLS: dict[str, list[tuple[int, int]]] = {
    "before the first checkpoint": [(0, 1)],
    "in mid-experience": [(1, 5)],
    "at an epoch's first batch": [(1, 4)],
    "at the first batch": [(2, 0)],
    "at the last batch": [(2, 7)],
    "three times": [(0, 3), (0, 6), (1, 6)],
}


class TestKilled:
    """Ended with SIGKILL and started again, until it is done: the numbers of the uninterrupted run, bit for bit."""

    def check(self, cwd: Path, uninterrupted: Any, kills: list[tuple[int, int]], **options: Any) -> None:
        root = cwd / "killed"
        for _ in kills:
            assert in_process(runs.run, root, kills=kills, **options) == -signal.SIGKILL
        assert in_process(runs.run, root, kills=kills, **options) == 0
        assert_same(root, uninterrupted(**options))

    @pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS)
    def test_at_any_moment(self, cwd: Path, uninterrupted: Any, kills: list[tuple[int, int]]) -> None:
        self.check(cwd, uninterrupted, kills, lance={})

    @pytest.mark.parametrize(
        "options",
        [
            {"model": "single", "benchmark": "nc"},
            {"model": "growing", "benchmark": "class-incremental"},
            {"model": "own"},
            {"model": "own", "augment": True, "num_workers": 1, "lance": {"refresh": "epoch"}},
            {"model": "task", "trainer": {"accumulate_grad_batches": 2}},
            {"model": "task", "forward_transfer": False},
            {"model": "task", "continual": True, "lance": {"threshold": 0.8}},
            {"model": "own", "continual": True, "lance": {"threshold": 0.7, "reserved": 4, "heads": ["heads"]}},
        ],
        ids=lambda options: " ".join(map(str, options.values())),
    )
    def test_any_model(self, cwd: Path, uninterrupted: Any, options: dict[str, Any]) -> None:
        step = 3 if "trainer" in options else 6
        self.check(cwd, uninterrupted, [(1, step)], **options)

    def test_it_goes_on_from_within(self, cwd: Path) -> None:
        """Not from the experience's beginning: the batches before the checkpoint are not trained on again."""
        root = cwd / "killed"
        assert in_process(runs.run, root, kills=[(1, 6)]) == -signal.SIGKILL
        counted = []

        class Count(Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                counted.append((trainer.datamodule.experience, trainer.global_step))

        again = runner(root)
        again.options["callbacks"] = [Count()]
        again.run()
        assert counted == [(1, 5), (1, 6), (1, 7), *((2, step) for step in range(8))]

    def test_a_torn_checkpoint_is_passed_over(self, cwd: Path, uninterrupted: Any) -> None:
        root = cwd / "killed"
        assert in_process(runs.run, root, kills=[(1, 7)]) == -signal.SIGKILL
        [inside] = (root / "inside").rglob("*.ckpt")
        for path in (inside, root / "experience_000.ckpt"):
            path.write_bytes(path.read_bytes()[:2000])
        with pytest.warns(UserWarning, match="is damaged"):
            runner(root).run()
        assert_same(root, uninterrupted())

    def test_a_crash_between_the_files(self, cwd: Path, uninterrupted: Any) -> None:
        """The process dies after a boundary is written and before what is inside is removed."""
        root = cwd / "killed"
        assert in_process(runs.run, root, kills=[(1, 7)]) == -signal.SIGKILL
        left = {path: path.read_bytes() for path in (root / "inside").rglob("*.ckpt")}
        assert in_process(runs.run, root, kills=[(1, 7), (2, 0)]) == -signal.SIGKILL
        for path, content in left.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert in_process(runs.run, root) == 0
        assert_same(root, uninterrupted())

    def test_a_finished_stream_is_not_trained_again(self, uninterrupted: Any) -> None:
        root = uninterrupted()
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*.ckpt")}
        result = runner(root).run()
        assert result.as_dict() == final(root)["results"]
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*.ckpt")} == before


class TestStore:
    def test_an_error_in_training_reaches_the_user_and_the_stream_goes_on(self, cwd: Path) -> None:
        class Fail(Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                if trainer.datamodule.experience == 1:
                    raise RuntimeError("of the user")

        done = runner(cwd / "run", lance={})
        done.options["callbacks"] = [Fail()]
        with pytest.raises(RuntimeError, match="of the user"):
            done.run()
        assert not is_swapped(done.model)
        runner(cwd / "run", lance={}).run()
        runner(cwd / "other", lance={}).run()
        assert_same(cwd / "run", cwd / "other")

    def test_restart(self, cwd: Path) -> None:
        runner(cwd / "run").run()
        counted: list[int] = []

        class Count(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                counted.append(1)

        again = runner(cwd / "run", restart=True)
        again.options["callbacks"] = [Count()]
        again.run()
        assert len(counted) == 8 * EXPERIENCES

    def test_other_settings_are_refused(self, cwd: Path) -> None:
        runner(cwd / "run").run()
        with pytest.raises(StateError, match=r"test \[12, 12, 12\] there, \[36\] asked for.*restart=True"):
            runner(cwd / "run", benchmark="ni").run()

    def test_what_is_left(self, cwd: Path) -> None:
        done = runner(cwd / "run")
        result = done.run()
        names = sorted(path.name for path in (cwd / "run").iterdir())
        assert names == [
            *(f"experience_{index:03d}.ckpt" for index in range(3)),
            "results.json",
            "start.ckpt",
            "stream.json",
        ]
        result.plot()
        assert sorted(path.name for path in (cwd / "run" / "plots").iterdir()) == ["accuracy.png", "matrix.png"]

    def test_a_checkpoint_loads_as_lightning_loads_them(self, cwd: Path) -> None:
        done = runner(cwd / "run", "own")
        done.run()
        loaded = runs.OwnModule.load_from_checkpoint(cwd / "run" / "experience_002.ckpt")
        for name, value in done.model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name])

    def test_own_callbacks_begin_anew_in_each_experience(self, cwd: Path) -> None:
        class Once(Callback):
            def __init__(self) -> None:
                self.fits = 0

            def on_fit_start(self, *_: Any) -> None:
                self.fits += 1
                assert self.fits == 1

        done = runner(cwd / "run")
        once = Once()
        keep = ModelCheckpoint(dirpath=cwd / "mine", save_top_k=-1, filename="{epoch}")
        done.options["callbacks"] = [once, keep]
        done.run()
        assert once.fits == 0
        assert len(list((cwd / "mine").glob("*.ckpt"))) > 0


class Losses(Callback):
    """Losses of each epoch by experience, and the last of them."""

    def __init__(self, seen: list[list[float]]) -> None:
        self.seen = seen

    def __deepcopy__(self, memo: Any) -> Losses:
        return self

    def on_train_start(self, *_: Any) -> None:
        self.seen.append([])

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen[-1].append(float(trainer.callback_metrics["epoch_loss"]))


class TestPlateau:
    @staticmethod
    def plateau(cwd: Path, **options: Any) -> StreamRunner:
        done = runner(cwd / "run", lance={"heads": ["network.classifier"]}, continual=True, **options)
        done.model.lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.1, patience=0, threshold=10.0, threshold_mode="abs"
        )
        return done

    def test_a_scheduler_that_waits_for_a_loss_is_given_one(self, cwd: Path) -> None:
        rates: list[float] = []

        class Rates(Callback):
            def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

        done = self.plateau(cwd, trainer={"max_epochs": 3})
        done.options["callbacks"] = [Rates()]
        done.run()
        # No epoch is ten better than the last: a cut after the second, and each experience begins anew.
        assert rates == pytest.approx([0.05, 0.05, 0.005] * EXPERIENCES)

    def test_early_stops_and_best_weights_within_an_experience(self, cwd: Path) -> None:
        seen: list[list[float]] = []
        moved: list[float] = []

        class Moved(Callback):
            """How far a fit moves what is closed to it."""

            def __init__(self) -> None:
                self.before: dict[str, Tensor] = {}
                self.closed: dict[str, Tensor] = {}

            def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                self.before = {name: value.detach().clone() for name, value in module.state_dict().items()}

            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
                lance = next(found for found in trainer.callbacks if isinstance(found, ContinualCallback))
                known = {name: memory for name, memory in lance.stream.memories.items() if any(memory.counts)}
                self.closed = {f"{name}.weight": memory.closed()[0].clone() for name, memory in known.items()}

            def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                for name, closed in self.closed.items():
                    before = self.before[name]
                    moved.append(float(((module.state_dict()[name] - before) @ closed).norm() / before.norm()))

        done = self.plateau(cwd, trainer={"max_epochs": 8})
        stop = EarlyStopping("epoch_loss", patience=1, min_delta=0.05, check_on_train_epoch_end=True)
        done.options["callbacks"] = [Moved(), stop, BestWeights("epoch_loss"), Losses(seen)]
        result = done.run()
        assert len(seen) == EXPERIENCES
        assert any(len(losses) < 8 for losses in seen), "stops early"
        assert all(len(losses) >= 2 for losses in seen), "and begins anew in each experience"
        assert done._ends[-1] == 4 * sum(map(len, seen))
        assert moved
        assert max(moved) < 1e-5
        assert result.summary["ACC"] > 0.2


class TestLogging:
    def test_matrix_and_summaries_go_to_the_logger(self, cwd: Path) -> None:
        logger = CSVLogger(cwd, name="log")
        done = runner(cwd / "run", trainer={"logger": logger, "log_every_n_steps": 1})
        result = done.run()
        lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        header = lines[0].split(",")
        rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
        stream = [row for row in rows if row["stream/experience"]]
        assert [int(float(row["stream/experience"])) for row in stream] == [0, 1, 2]
        for experience, row in enumerate(stream):
            for column in range(EXPERIENCES):
                wanted = float(result.matrix[experience, column])
                assert float(row[f"stream/accuracy_{column}"]) == pytest.approx(wanted)
            seen = result.matrix.clone()
            seen[experience + 1 :] = torch.nan
            summary = continual_metrics(seen, result.baseline)
            assert float(row["stream/ACC"]) == pytest.approx(float(summary["ACC"]))
            assert bool(row["stream/BWT"]) == bool(row["stream/FWT"]) == (experience > 0)
        assert float(stream[-1]["stream/FWT"]) == pytest.approx(result.summary["FWT"])
        # Steps count on over the experiences.
        steps = [int(row["step"]) for row in rows if row["loss"]]
        assert steps == list(range(8 * EXPERIENCES))
        assert [int(row["step"]) for row in stream] == [8, 16, 24]

    def test_bars(self, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        done = runner(cwd / "run")
        done.progress = True
        done.run()
        text = capsys.readouterr().err
        assert "stream: 100%" in text
        for experience in range(EXPERIENCES):
            assert f"experience {experience}:" in text
        assert "ACC=" in text
        assert text.count("Epoch") == 0

    def test_no_bars(self, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        runner(cwd / "run").run()
        assert "%" not in capsys.readouterr().err


class TestOptions:
    @pytest.mark.parametrize("name", ["enable_progress_bar", "fast_dev_run", "default_root_dir"])
    def test_trainer_arguments_of_the_runner(self, cwd: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=name):
            runner(cwd / "run", trainer={name: True})

    def test_checkpoint_every(self, cwd: Path) -> None:
        done = runner(cwd / "run")
        with pytest.raises(ConfigError, match="checkpoint_every=0"):
            StreamRunner(done.model, done.data, cwd, checkpoint_every=0)

    def test_spawned_processes_are_refused(self, cwd: Path) -> None:
        with pytest.raises(StateError, match="ddp_spawn"):
            runner(cwd / "run", trainer={"strategy": "ddp_spawn", "devices": 2}).run()


class TestClassifier:
    def test_task_heads_take_the_place_of_the_classifier(self) -> None:
        module = ContinualClassifier(network(), task_heads="5")
        assert isinstance(module.network, TaskHeads)
        assert isinstance(module.network.classifier, MultiHeadClassifier)
        assert module.network.classifier.in_features == 16
        assert isinstance(module.network.trunk[5], nn.Identity)

    @pytest.mark.parametrize(("name", "why"), [("7", "is not there"), ("0.1", "is not there"), ("1", "is a ReLU")])
    def test_task_heads_must_name_a_linear_layer(self, name: str, why: str) -> None:
        with pytest.raises(ConfigError, match=why) as error:
            ContinualClassifier(network(), task_heads=name)
        assert "0, 3, 5" in str(error.value)

    def test_who_takes_task_labels(self) -> None:
        class WithLabels(nn.Module):
            def forward(self, x: Tensor, t: Tensor) -> Tensor: ...

        class WithMask(nn.Module):
            def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor: ...

        class WithOptional(nn.Module):
            def forward(self, x: Tensor, task_labels: Tensor | None = None) -> Tensor: ...

        class WithFlag(nn.Module):
            def forward(self, x: Tensor, *, deep: bool) -> Tensor: ...

        assert takes_task_labels(WithLabels())
        assert takes_task_labels(WithOptional())
        assert takes_task_labels(TaskHeads(network(), "5"))
        assert not takes_task_labels(WithMask())
        assert not takes_task_labels(WithFlag())
        assert not takes_task_labels(nn.Linear(2, 2))
