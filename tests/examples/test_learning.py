"""The learning suite in a tiny form: real networks, data and sessions, a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from examples.benchmarks import learning
from examples.benchmarks.learning import Item, Result, Row, check_checkpointing, items, main, read, rows, run
from examples.benchmarks.tasks import TASKS
from examples.benchmarks.tasks.task import EXPLAINED, OVERLAP

SMALL = ["mlp", "digits_cnn", "conv1d", "lstm", "autoencoder"]


@pytest.mark.parametrize("task", [*SMALL, "unet", "text"])
def test_checkpointing_ends_with_the_weights_of_plain_training(task: str) -> None:
    plain, again = (run(Item(task, setting, 0, 3)) for setting in ("plain", "checkpointing"))
    assert plain.weights == again.weights
    assert plain.score == again.score
    assert run(Item(task, "plain", 1, 3)).weights != plain.weights


@pytest.mark.parametrize("setting", ["default", "two-bits", "compact", "published"])
def test_a_setting_trains_and_keeps_less(setting: str) -> None:
    item = Item("digits_cnn", setting, 0, 30)
    found, plain = run(item), run(replace(item, setting="plain"))
    assert found.score is not None
    assert found.score > 15  # of ten classes
    assert found.weights != plain.weights
    kept, whole = (run(replace(i, seed=None, steps=10)).kept for i in (item, replace(item, setting="plain")))
    assert kept is not None
    assert whole is not None
    assert kept < whole


@pytest.mark.parametrize("task", list(TASKS))
def test_names_and_data_of_a_task_fit_its_network(task: str) -> None:
    made = TASKS[task]
    if task.endswith("last4"):
        pytest.skip("the front of the network takes a minute")
    torch.manual_seed(0)
    model = made.build().eval()
    names = {name for name, _ in model.named_modules()}
    assert set(made.segments) <= names
    assert isinstance(made.layers, str) or set(made.layers) <= names
    data = made.data()
    assert len(data.test[1]) >= 300
    assert all(torch.equal(a, b) for a, b in zip(data.train, made.data().train, strict=True))
    with torch.no_grad():
        assert made.measure.loss(model(data.test[0][:4]), data.test[1][:4]).isfinite()


def test_the_command_goes_on_where_it_was_cut_and_writes(tmp_path: Path) -> None:
    results, page = tmp_path / "results.jsonl", tmp_path / "docs" / "learning.md"
    page.parent.mkdir()
    which = ["--tasks", "digits_cnn", "--settings", "plain", "default", "--quick", "--json", str(results)]
    main([*which, "--seeds", "0", "--jobs", "1"])
    first = results.read_text(encoding="utf-8").splitlines()
    assert len(first) == 4  # each setting once for memory and once for its score
    main([*which, "--seeds", "0", "1", "--jobs", "2"])
    assert results.read_text(encoding="utf-8").splitlines()[:4] == first
    assert len(read(results)) == 6
    found = main([*which[-2:], "--write", str(page)])
    assert [(row.setting, len(row.scores)) for row in found] == [("plain", 2), ("default", 2)]
    text = page.read_text(encoding="utf-8")
    assert TASKS["digits_cnn"].title in text
    assert all(f"{sum(row.scores.values()) / 2:.2f}" in text for row in found)
    assert (page.parent / "img" / "learning.png").stat().st_size > 5000


def test_the_last_of_two_results_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    item = {"task": "mlp", "setting": "plain", "seed": 0, "steps": None}
    path.write_text("".join(json.dumps({"item": item, "score": score}) + "\n" for score in (1.0, 2.0)))
    assert read(path) == {Item("mlp", "plain", 0): Result(Item("mlp", "plain", 0), 2.0)}


def test_other_weights_under_checkpointing_are_an_error() -> None:
    one, two = Item("mlp", "plain", 0), Item("mlp", "checkpointing", 0)
    check_checkpointing({one: Result(one, weights="a"), two: Result(two, weights="a")})
    with pytest.raises(RuntimeError, match="other weights than plain"):
        check_checkpointing({one: Result(one, weights="a"), two: Result(two, weights="b")})


def test_what_misses_is_told() -> None:
    plain = {0: 90.0, 1: 90.1, 2: 89.9}  # standard error .06

    def row(setting: str, less: float, task: str = "mlp") -> Row:
        return Row(task, setting, {s: v - less for s, v in plain.items()}, plain, 1, 2, 1, 2, 1.0)

    assert not row("default", 0.29).misses
    assert row("default", 0.31).misses
    assert row("two-bits", 0.31).misses
    assert not row("default", -2.0).misses
    assert not row("compact", 3.0).misses  # from scratch
    assert not row("compact", 0.49, "lite0_last4").misses
    assert row("compact", 0.51, "lite0_last4").misses
    wide = replace(row("default", 0.9), plain={0: 90.0, 1: 92.0, 2: 88.0})  # standard error 1.15
    assert not replace(wide, scores={s: v - 0.9 for s, v in wide.plain.items()}).misses
    assert "✗" in learning.document([row("default", 0.31)], "x.png").split("MLP", 1)[1]


def test_seeds_come_after_settings() -> None:
    found = [item for item in items(["lstm", "text"], ["plain", "default"], None, quick=False) if item.seed is not None]
    assert [item.seed for item in found] == sorted(item.seed or 0 for item in found)
    assert len(found) == 2 * (TASKS["lstm"].seeds + TASKS["text"].seeds)
    assert rows({}) == []


def test_scores_of_dense_outputs() -> None:
    kinds = torch.tensor([[[0, 1], [1, 1]]])
    right = torch.nn.functional.one_hot(kinds, 2).permute(0, 3, 1, 2).float()
    assert OVERLAP.score(right, kinds) == 100.0
    assert OVERLAP.score(right.flip(1), kinds) == 0.0
    half = right.clone()
    half[0, :, 0, 1] = torch.tensor([1.0, 0.0])  # 1 of 2 and 2 of 3 in common
    assert OVERLAP.score(half, kinds) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    targets = torch.randn(100, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert EXPLAINED.score(targets, targets) == 100.0
    assert EXPLAINED.score(targets.mean(0, keepdim=True).expand_as(targets), targets) == pytest.approx(0.0, abs=1e-4)
