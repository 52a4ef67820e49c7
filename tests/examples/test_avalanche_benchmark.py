"""Avalanche's own benchmarks on tiny data in their on-disk formats: every loader, network and recipe."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("avalanche")

from PIL import Image

from examples import avalanche_benchmark
from examples.avalanche_benchmark import RECIPES, main, make_benchmark, make_model

RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder: Path, train: int = 40, test: int = 20) -> None:
    """The four files of MNIST and Fashion-MNIST (Y. LeCun's idx format): big-endian sizes, then bytes."""
    folder.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        images, labels = pixels(count, 28, 28), np.arange(count, dtype=np.uint8) % 10
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def write_mnist(root: Path) -> None:
    write_idx(root / "MNIST" / "raw")


def write_fashion(root: Path) -> None:
    write_idx(root / "FashionMNIST" / "raw")


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": pixels(20, 3072), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))


def write_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 200), ("test", 100)):
        batch = {"data": pixels(count, 3072), "fine_labels": [i % 100 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))


def write_tiny_imagenet(root: Path) -> None:
    folder = root / "tiny-imagenet-200"
    names = [f"n{index:08d}" for index in range(200)]
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    lines = []
    for index, name in enumerate(names):
        (folder / "train" / name / "images").mkdir(parents=True)
        Image.fromarray(pixels(64, 64, 3)).save(folder / "train" / name / "images" / f"{name}_0.JPEG")
        Image.fromarray(pixels(64, 64, 3)).save(folder / "val" / "images" / f"val_{index}.JPEG")
        lines.append(f"val_{index}.JPEG\t{name}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


def write_core50(root: Path) -> None:
    """Eight sessions of four images each, and a test session; only run 0 of the scenario with new instances."""
    lists = root / "batches_filelists" / "NI_inc" / "run0"
    lists.mkdir(parents=True)
    paths, labels, lookup = [], [], []
    for session in range(9):
        (root / "core50_32x32" / f"s{session}").mkdir(parents=True)
        lines = []
        for index in range(4):
            path = f"s{session}/C_{index:02d}.png"
            Image.fromarray(pixels(32, 32, 3)).save(root / "core50_32x32" / path)
            lines.append(f"{path} {10 * index}")
            paths.append(path)
        name = "test_filelist.txt" if session == 8 else f"train_batch_{session:02d}_filelist.txt"
        (lists / name).write_text("\n".join(lines) + "\n")
        labels.append([10 * index for index in range(4)])
        lookup.append(list(range(4 * session, 4 * session + 4)))
    contents = {"paths": paths, "labels": {"ni": [labels]}, "LUP": {"ni": [lookup]}, "labels2names": {"ni": [[]]}}
    for name, content in contents.items():
        (root / f"{name}.pkl").write_bytes(pickle.dumps(content))
    # Made by Avalanche where it is missing, out of lists that are not here.
    (root / "NIC_v2_79_cat").mkdir()


WRITERS = {
    "SplitMNIST": write_mnist,
    "PermutedMNIST": write_mnist,
    "SplitFMNIST": write_fashion,
    "SplitCIFAR10": write_cifar10,
    "SplitCIFAR100": write_cifar100,
    "SplitTinyImageNet": write_tiny_imagenet,
    "CORe50": write_core50,
}


# Random pixels need every direction.
@pytest.mark.filterwarnings("ignore:(nearly full|.*directions are protected):lightning_lance.errors.LanceWarning")
@pytest.mark.parametrize("strategy", ["lance", "naive"])
@pytest.mark.parametrize("name", WRITERS)
def test_runs_on_files_in_the_benchmarks_format(
    name: str, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS[name](tmp_path)
    arguments = ["--benchmark", name, "--root", str(tmp_path), "--strategy", strategy, "--experiences", "2"]
    arguments += ["--epochs", "1", "--batch-size", "10", "--no-integrity-check", "--device", "cpu"]
    arguments += ["--width", "0.1"]
    if name == "CORe50":
        arguments += ["--batch-size", "2"]
    found = main([*arguments, "--output", str(tmp_path / "found.json")])
    count = 8 if name == "CORe50" else 2
    assert len(found["matrix"]) == count
    assert 0 <= found["ACC"] <= 1
    if name == "CORe50":
        assert [row[0] is not None for row in found["matrix"]] == [True] * 8
        assert found["BWT"] is None
    else:
        assert all(cell is not None for row in found["matrix"] for cell in row)
    assert found["kept_bytes"] > 0
    assert (found["state_bytes"] > 0) == (strategy == "lance")
    assert json.loads((tmp_path / "found.json").read_text())["matrix"] == found["matrix"]
    assert "ACC" in capsys.readouterr().out


def test_every_recipe_is_tested_and_its_network_takes_its_images() -> None:
    assert set(WRITERS) == set(RECIPES)
    shapes = {"SplitMNIST": (1, 28), "PermutedMNIST": (1, 28), "SplitFMNIST": (1, 28), "SplitTinyImageNet": (3, 64)}
    for name, recipe in RECIPES.items():
        channels, size = shapes.get(name, (3, 32))
        trunk, features = recipe.network(0.5)
        assert trunk(torch.randn(2, channels, size, size)).shape == (2, features)


def test_task_labels_and_heads(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    scenario = make_benchmark("SplitMNIST", tmp_path, seed=0)
    assert [e.task_label for e in scenario.train_stream] == list(range(5))
    assert {label for e in scenario.test_stream for label in e.dataset.targets} == {0, 1}
    assert hasattr(make_model(RECIPES["SplitMNIST"]), "classifier")
    single = make_model(RECIPES["CORe50"])
    assert single.output.weight.shape == (50, 2048)


def test_permutations_follow_the_seed(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    first, again, other = (
        make_benchmark("PermutedMNIST", tmp_path, seed, 2).train_stream[1].dataset[0][0] for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_foreign_cifar_files_are_refused_without_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path)
    check = avalanche_benchmark.cifar.check_integrity
    # No route out, whatever machine this runs on.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="SplitCIFAR10: its data is not whole in"):
        make_benchmark("SplitCIFAR10", tmp_path, seed=0)
    make_benchmark("SplitCIFAR10", tmp_path, seed=0, check=False)
    assert avalanche_benchmark.cifar.check_integrity is check
