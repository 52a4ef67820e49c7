"""The folder of a stream: damaged files, files of the user's, older versions, and which moments are stored."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from lightning_lance import LanceWarning, StateError
from lightning_lance.streams import store as stores
from lightning_lance.streams.store import InsideCheckpoint, StreamStore
from lightning_lance.tensors.files import is_sealed, save_sealed
from tests.avalanche.runs import final, runner
from tests.tensors.test_files import damage
from tests.trainers import Classifier, EpochLoader, fit, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before:UserWarning",
)

STREAM = {"version": stores.STREAM_STATE_VERSION}


def checkpoint(experience: int) -> dict[str, Any]:
    return {"stream": {**STREAM, "experience": experience}, "state_dict": {"w": torch.ones(300)}}


def filled(root: Path, experiences: int = 3) -> StreamStore:
    store = StreamStore(root)
    for experience in range(-1, experiences):
        store.save(experience, checkpoint(experience))
    return store


def digests(root: Path) -> dict[str, str]:
    """Relative path -> checksum, of every file below a folder."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


class TestDamage:
    @pytest.mark.parametrize("number", range(40))
    def test_the_last_whole_checkpoint_is_used(self, cwd: Path, number: int) -> None:
        drawn = random.Random(number)
        store = filled(cwd / "run")
        last = drawn.randrange(-1, 2)
        for experience in range(last + 1, 3):
            path = store.boundary(experience)
            kind = drawn.choice(["flip", "zeros", "cut", "repeated", "longer", "empty"])
            content = path.read_bytes()
            place, size, bit = drawn.random(), drawn.choice([1, 64, 4096]), drawn.randrange(8)
            path.write_bytes(b"" if kind == "empty" else damage(content, kind, place, size, bit))
        with pytest.warns(LanceWarning, match=r"is damaged \(.*\); an earlier checkpoint is used") as said:
            found = store.latest()
        assert found is not None
        assert found["stream"]["experience"] == last
        assert len(said) == 2 - last
        assert all("\n" not in str(line.message) for line in said)

    def test_a_folder_in_the_place_of_a_file_is_passed_over(self, cwd: Path) -> None:
        store = filled(cwd / "run")
        store.boundary(2).unlink()
        store.boundary(2).mkdir()
        found = store.latest()
        assert found is not None
        assert found["stream"]["experience"] == 1

    def test_a_stream_goes_on_and_ends_alike(self, cwd: Path) -> None:
        wanted = runner(cwd / "whole").run()
        runner(cwd / "run").run()
        for name in ("experience_001.ckpt", "experience_002.ckpt", "results.json", "stream.json"):
            path = cwd / "run" / name
            path.write_bytes(damage(path.read_bytes(), "flip", 0.4, 1, 3))
        with pytest.warns(LanceWarning, match="is damaged") as said:
            again = runner(cwd / "run").run()
        assert len([line for line in said if "is damaged" in str(line.message)]) == 2
        assert again.as_dict() == wanted.as_dict()
        for name, value in final(cwd / "run")["weights"].items():
            assert torch.equal(value, final(cwd / "whole")["weights"][name])
        assert {str(path.name) for path in (cwd / "run").iterdir()} == {p.name for p in (cwd / "whole").iterdir()}

    def test_results_that_were_lost_are_written_again(self, cwd: Path) -> None:
        wanted = runner(cwd / "run").run().as_dict()
        path = cwd / "run" / "results.json"
        path.write_bytes(path.read_bytes()[:20])
        runner(cwd / "run").run()
        assert json.loads(path.read_text()) == wanted


PRECIOUS = {
    "thesis.txt": "precious",
    "inside/thesis.txt": "precious",
    "inside/experience_001/notes.txt": "precious",
    "inside/experience_001/step=best.ckpt": "precious",
    "experience_of_mine.ckpt": "precious",
    "plots/mine.png": "precious",
    "config.yaml": "precious: true # and a comment\n",
}


def put(root: Path, files: dict[str, str]) -> dict[str, str]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return digests(root)


class TestFilesOfTheUser:
    def test_they_stay_as_they_are(self, cwd: Path) -> None:
        before = put(cwd / "run", PRECIOUS)
        runner(cwd / "run").run().plot()
        runner(cwd / "run", restart=True).run()
        after = digests(cwd / "run")
        assert {name: after.get(name) for name in before} == before

    @pytest.mark.parametrize("restart", [False, True])
    @pytest.mark.parametrize(
        "name",
        ["start.ckpt", "experience_000.ckpt", "results.json", "stream.json", "plots/matrix.png"],
    )
    def test_a_folder_where_one_would_be_overwritten_is_refused(self, cwd: Path, name: str, restart: bool) -> None:
        before = put(cwd / "run", {name: "precious"})
        with pytest.raises(StateError, match=rf"holds {name}, which this stream has not written.*Give an empty folder"):
            runner(cwd / "run", restart=restart).run()
        with pytest.raises(StateError, match=name):
            StreamStore(cwd / "run").save(-1, checkpoint(-1))
        assert digests(cwd / "run") == before

    def test_a_checkpoint_of_lightning_is_not_ours(self, cwd: Path) -> None:
        (cwd / "run").mkdir()
        trainer = fit(Classifier(), max_epochs=1)
        trainer.save_checkpoint(cwd / "run" / "start.ckpt")
        before = digests(cwd / "run")
        with pytest.raises(StateError, match=r"holds start\.ckpt, which this stream has not written"):
            runner(cwd / "run").run()
        assert digests(cwd / "run") == before

    def test_a_stream_that_has_lost_its_mark_goes_on(self, cwd: Path) -> None:
        wanted = runner(cwd / "run").run().as_dict()
        (cwd / "run" / "stream.json").unlink()
        assert runner(cwd / "run").run().as_dict() == wanted
        assert (cwd / "run" / "stream.json").is_file()


class TestVersions:
    def test_a_stream_of_an_older_version_is_refused_and_stays(self, cwd: Path) -> None:
        """As they were before checksums and marks: an ordinary archive."""
        root = cwd / "run"
        root.mkdir()
        torch.save({**checkpoint(0), "stream": {"version": 1, "experience": 0}}, root / "experience_000.ckpt")
        before = digests(root)
        for restart in (False, True):
            with pytest.raises(StateError, match=r"stream of version 1; this package reads version 2\. Go on with"):
                runner(root, restart=restart).run()
        assert digests(root) == before

    @pytest.mark.parametrize("version", [1, 3, None, "2", [2]])
    def test_a_sealed_one_of_another_version_is_refused(self, cwd: Path, version: Any) -> None:
        store = filled(cwd / "run", 1)
        save_sealed(store.boundary(1), {"stream": {"version": version, "experience": 1}})
        before = digests(cwd / "run")
        with pytest.raises(StateError, match="this package reads version 2"):
            runner(cwd / "run").run()
        assert digests(cwd / "run") == before


class Keep(Callback):
    """Copies each checkpoint within a fit, which keeps only the newest, and notes the end of each epoch."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.last: list[int] = []
        target.mkdir()

    def on_train_batch_start(self, *_: Any) -> None:
        self.copy()

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.copy()
        self.last.append(trainer.global_step)

    def copy(self) -> None:
        for path in self.source.glob("*.ckpt"):
            shutil.copy(path, self.target / path.name)


class Endless:
    """Does not say how many batches it has, nor where it is."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.loader = EpochLoader(count, batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(self.loader)


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "whole batches": (lambda: EpochLoader(40, 8), {}),
    "ragged": (lambda: EpochLoader(43, 8), {}),
    "limited": (lambda: EpochLoader(80, 8), {"limit_train_batches": 4}),
    "accumulated": (lambda: EpochLoader(43, 8), {"accumulate_grad_batches": 2}),
    "without a length": (lambda: Endless(29, 8), {}),
    "one batch": (lambda: EpochLoader(8, 8), {}),
}


class TestMoments:
    """Lightning leaves out an epoch after a checkpoint of the last batch of one: there are none."""

    @pytest.mark.parametrize("every", [1, 3])
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_checkpoint_within_leads_to_the_same_end(self, cwd: Path, kind: str, every: int) -> None:
        make, options = KINDS[kind]

        def trained(path: Path | None = None, callbacks: tuple[Callback, ...] = ()) -> tuple[dict[str, Any], int]:
            torch.manual_seed(0)
            module = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)))
            more = {"enable_checkpointing": bool(callbacks), "max_epochs": 3, **options}
            trainer = fit(module, callbacks, make(), None if path is None else str(path), **more)
            return weights(module), trainer.global_step

        keep = Keep(cwd / "inside", cwd / "kept")
        wanted, steps = trained(None, (keep, InsideCheckpoint(cwd / "inside", every)))
        found = sorted(keep.target.glob("*.ckpt"))
        assert bool(found) == (kind != "one batch")
        assert not {int(path.stem.partition("=")[2]) for path in found} & set(keep.last)
        for path in found:
            assert is_sealed(path)
            if kind == "without a length":  # Lightning would begin the epoch's data anew
                continue
            again, counted = trained(path)
            assert counted == steps, path.name
            for name, value in wanted.items():
                assert torch.equal(value, again[name]), (path.name, name)

    def test_a_plugin_of_the_user_that_writes_later_changes_nothing(self, cwd: Path) -> None:
        module = Classifier()
        within = InsideCheckpoint(cwd / "inside", 2)
        plugin = AsyncCheckpointIO()
        fit(module, [within], enable_checkpointing=True, plugins=[plugin], max_epochs=1)
        [path] = (cwd / "inside").iterdir()
        assert is_sealed(path)


def test_nothing_is_said_of_whole_files(cwd: Path) -> None:
    store = filled(cwd / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.latest() is not None
        assert store.inside(0) is None
