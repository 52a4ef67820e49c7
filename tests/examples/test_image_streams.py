"""The paper's streams on tiny sets in their on-disk format: data, network, training, configurations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn

pytest.importorskip("avalanche")

from examples.models.reduced_resnet import ReducedResNet18
from examples.streams.images import five_datasets, normalization, split_cifar100, split_mini_imagenet
from examples.streams.plateau import BestWeights
from lightning_lance.cli import main
from tests.examples.tiny_sets import (
    WRITERS,
    accept_tiny_files,
    write_cifar100,
    write_mini_imagenet,
    write_not_mnist,
)

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
FIVE = ("cifar10", "mnist", "svhn", "fashion_mnist", "not_mnist")

pytestmark = pytest.mark.filterwarnings("ignore:.*nearly full|.*directions are protected|.*epoch has only|.*task-aware")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-lance"])
    accept_tiny_files(monkeypatch)


def labels_of(experience: Any) -> set[int]:
    return {experience.dataset[index][1] for index in range(len(experience.dataset))}


def test_split_cifar100(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    found = split_cifar100(str(tmp_path), seed=3, validation=0.5)
    assert [len(stream) for stream in (found.train_stream, found.valid_stream, found.test_stream)] == [10, 10, 10]
    assert [len(e.dataset) for e in (found.train_stream[0], found.valid_stream[0], found.test_stream[0])] == [
        10,
        10,
        10,
    ]
    image, _label, task = found.train_stream[4].dataset[0]
    assert image.shape == (3, 32, 32)
    assert task == 4
    assert labels_of(found.test_stream[4]) == set(range(10))
    other = split_cifar100(str(tmp_path), seed=4, validation=0.5)
    assert not torch.equal(other.test_stream[0].dataset[0][0], found.test_stream[0].dataset[0][0])
    with pytest.raises(ValueError, match=r"experiences=7 is not allowed\. Allowed: a divisor of the 100 classes"):
        split_cifar100(str(tmp_path), experiences=7)
    with pytest.raises(ValueError, match=r"validation=0\.0 is not allowed"):
        split_cifar100(str(tmp_path), validation=0.0)


def test_no_image_is_in_two_parts_and_each_has_its_own_classes(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    found = split_cifar100(str(tmp_path), validation=0.5)
    seen: list[bytes] = []
    for stream in (found.train_stream, found.valid_stream, found.test_stream):
        for experience in stream:
            seen += [experience.dataset[i][0].numpy().tobytes() for i in range(len(experience.dataset))]
    assert len(seen) == len(set(seen)) == 300


def test_split_mini_imagenet(tmp_path: Path) -> None:
    write_mini_imagenet(tmp_path)
    found = split_mini_imagenet(str(tmp_path), validation=0.2)
    assert len(found.train_stream) == 20
    assert [len(e.dataset) for e in (found.train_stream[0], found.valid_stream[0], found.test_stream[0])] == [
        40,
        10,
        10,
    ]
    assert found.train_stream[0].dataset[0][0].shape == (3, 84, 84)
    assert labels_of(found.train_stream[19]) == set(range(5))


def test_five_datasets(tmp_path: Path) -> None:
    for name in FIVE:
        WRITERS[name](tmp_path)
    found = five_datasets(str(tmp_path), validation=0.3)
    assert [len(e.dataset) for e in found.test_stream] == [20, 20, 20, 20, 10]
    for task, experience in enumerate(found.train_stream):
        image, _, label = experience.dataset[0]
        assert image.shape == (3, 32, 32)
        assert label == task
        assert abs(float(torch.stack([experience.dataset[i][0] for i in range(10)]).mean())) < 0.3
    elsewhere = tmp_path / "letters"
    write_not_mnist(elsewhere)
    assert len(five_datasets(str(tmp_path), validation=0.3, letters=str(elsewhere)).train_stream) == 5


def test_normalization() -> None:
    data = [(torch.full((3, 4, 4), float(index)) * torch.tensor([1.0, 2.0, 0.0])[:, None, None], 0) for index in (1, 3)]
    mean, std = normalization(data)
    assert torch.equal(mean, torch.tensor([2.0, 4.0, 0.0]))
    assert std[1] == 2 * std[0]
    assert std[2] > 0


@pytest.mark.parametrize(("size", "stride", "pool"), [(32, 1, 1), (84, 2, 3)])
def test_reduced_resnet(size: int, stride: int, pool: int) -> None:
    trunk = ReducedResNet18(stride=stride, pool=pool)
    assert trunk(torch.randn(2, 3, size, size)).shape == (2, trunk.features)
    convolutions = [module for module in trunk.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 20
    assert [convolutions[index].out_channels for index in (0, -1)] == [20, 160]


class Scripted(L.LightningModule):
    """Its weight is the number of steps, its loss what a list says."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.losses = losses

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.weight

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.losses[self.current_epoch])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize(("losses", "best"), [([3.0, 1.0, 2.0], 2.0), ([3.0, 2.0, 1.0], 3.0), ([1.0, 2.0, 2.0], 1.0)])
def test_best_weights(losses: list[float], best: float) -> None:
    module, keep = Scripted(losses), BestWeights()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options: dict[str, Any] = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0}
    data = torch.utils.data.DataLoader([0.0])  # type: ignore[arg-type]
    L.Trainer(callbacks=[keep], **options, **quiet).fit(module, data, data)
    assert float(module.weight.detach()) == best
    assert keep.best == min(losses)
    resumed = BestWeights()
    resumed.load_state_dict(keep.state_dict())
    assert resumed.best == keep.best
    with pytest.raises(ValueError, match=r"monitor='loss' is not logged\. Allowed: one of what is: val_loss"):
        L.Trainer(callbacks=[BestWeights("loss")], **options, **quiet).fit(Scripted(losses), data, data)


@pytest.mark.parametrize("name", ["split_cifar100", "split_miniimagenet", "five_datasets"])
def test_config(name: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--data.arguments.root={cwd / 'data'}", "--data.batch_size=8", "--data.arguments.validation=0.3"]
    (cwd / "data").mkdir()
    if name == "five_datasets":
        for each in FIVE:
            WRITERS[each](cwd / "data")
        flags += ["--data.arguments.letters=null"]
    elif name == "split_cifar100":
        write_cifar100(cwd / "data")
        flags += ["--data.arguments.experiences=2", "--data.arguments.validation=0.5"]
        flags += ["--model.network.trunk.width=0.1", "--model.network.features=205"]
    else:
        for split in ("train", "test"):
            write_mini_imagenet(cwd / "data" / split, per_class=3)
        flags += ["--data.arguments.experiences=2", "--data.arguments.size=32"]
        flags += ["--model.network.trunk.width=4", "--model.network.features=288"]
    flags += ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    flags += ["--trainer.limit_test_batches=2", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    flags += ["--lance.calibration_batches=1", "--stream.progress=false", "--stream.forward_transfer=false"]
    main(["stream", "--config", str(CONFIGS / f"{name}.yaml"), *flags])
    assert "ACC" in capsys.readouterr().out
    root = cwd / "runs" / name / "seed0"
    found = json.loads((root / "results.json").read_text())
    count = 5 if name == "five_datasets" else 2
    assert len(found["matrix"]) == count
    assert all(0 <= found["matrix"][row][row] <= 1 for row in range(count))
    records = [json.loads(path.read_text()) for path in sorted((root / "records").glob("*.json"))]
    assert [record["experience"] for record in records] == list(range(count))
    assert all(record["flops"]["forward"] > 0 and record["kept_bytes"] > 0 for record in records)


def test_recipes_of_the_issue() -> None:
    growth = {"split_cifar100": 0.003, "split_miniimagenet": 0.0003, "five_datasets": 0.0}
    for name, value in growth.items():
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        assert config["lance"]["threshold_growth"] == value
        assert config["data"]["batch_size"] == 64
        assert config["data"]["arguments"]["validation"] == 0.05
    trainer = yaml.safe_load((CONFIGS / "recipe" / "stream.yaml").read_text())
    assert trainer["max_epochs"] == 200
