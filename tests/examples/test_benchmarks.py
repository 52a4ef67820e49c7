"""The benchmark scripts at a tiny size: what they claim about a case is true of it, and they run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from examples.benchmarks import batch_mode, cases, kernels, memory, speed, tradeoff
from examples.benchmarks.cases import CASES, HEADLINE, Case, select
from examples.benchmarks.table import size
from examples.benchmarks.training_methods import METHODS, Lance, find
from examples.data.photographs import CLASSES, photograph_batch
from lightning_lance.tensors import native
from tests.oracles import relative_error

TINY = Case.parse("resnet18/conv-4/b4/32px/eval")


def test_photographs_are_drawn_from_the_seed_alone() -> None:
    images, labels = photograph_batch(24, 40, seed=3)
    torch.manual_seed(9)
    again, _ = photograph_batch(24, 40, seed=3)
    assert torch.equal(images, again)
    assert not torch.equal(images, photograph_batch(24, 40, seed=4)[0])
    assert images.shape == (24, 3, 40, 40)
    assert labels.min() >= 0
    assert labels.max() < CLASSES
    assert labels.unique().numel() > 4
    assert 0.3 < images.std() < 2.5


def test_photographs_are_smooth_as_noise_is_not() -> None:
    images, _ = photograph_batch(8, 64, seed=0)
    step = (images[..., 1:] - images[..., :-1]).square().mean()
    assert step < 0.2 * 2 * images.var()  # for white noise both sides of the comparison would be equal, less the 0.2


def test_names_of_cases_are_read_back() -> None:
    for name, case in CASES.items():
        assert Case.parse(name) == case
        assert case.name == name
    assert all(Case.parse(name).name == name for name in HEADLINE)
    assert {case.network for case in select(["*/b64*"])} == {case.network for case in CASES.values()}
    assert select([TINY.name]) == [TINY]
    with pytest.raises(ValueError, match="alexnet/conv-4/b8' names no case"):
        select(["alexnet/conv-4/b8"])


@pytest.mark.parametrize("name", ["resnet18/conv-4/b4/32px/eval", "efficientnet_lite0/pointwise-all/b2/32px/train"])
def test_only_the_named_layers_train(name: str) -> None:
    case = Case.parse(name)
    model = case.build()
    layers = case.layers(model)
    assert len(layers) == (4 if case.last else 32)
    trained = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for parameter in model.parameters():
        assert parameter.requires_grad == (id(parameter) in trained)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (case.norms == "train")
            assert module.momentum is not None
    assert model.training
    torch.testing.assert_close(case.build().state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_case_without_weights_has_the_norm_statistics_of_its_data() -> None:
    case = Case.parse("resnet18/conv-2/b16/64px/eval")
    model = case.build()
    with torch.no_grad():
        features = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(case.batches(1)[0][0])))))
        normed = model.bn1(model.conv1(case.batches(1)[0][0]))
    assert 0.5 < normed.std() < 2.0
    assert features.abs().mean() < 10


def test_every_parameter_trains_in_a_case_of_that_kind() -> None:
    pytest.importorskip("timm")
    for name in ("resnet18/every-all/b2/32px/train", "vit_tiny/every-all/b2", "swin_t/every-all/b2"):
        case = Case.parse(name)
        model = case.build()
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(module.training for module in model.modules())
        layers = case.layers(model)
        assert {type(layer) for layer in layers} == {nn.Conv2d, nn.Linear}
        assert all(layer in list(model.modules()) for layer in layers)


def test_blocks_of_the_networks_hold_their_layers() -> None:
    pytest.importorskip("timm")
    for name, network in cases.NETWORKS.items():
        model = Case(name, "every", None, 1).build()
        inside = {id(module) for block in network.block_modules(model) for module in block.modules()}
        layers = Case(name, "every", None, 1).layers(model)
        assert sum(id(layer) in inside for layer in layers) > 0.8 * len(layers), name


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_and_input_gradients_are_exact_where_nothing_is_rounded(name: str) -> None:
    case, (batch,) = TINY, TINY.batches(1)
    model, plain = case.build(), case.build()
    image = batch[0].clone().requires_grad_()
    expected = torch.autograd.grad(case.loss(plain, (image, batch[1])), image)[0]
    method = METHODS[name]()
    method.install(model, case)
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    method.calibrate([lambda: case.loss(model, batch)])
    found = torch.autograd.grad(method.loss(case, model, (image, batch[1])), image)[0]
    rounds = isinstance(method, Lance) and method.config.bits is not None
    gap = float((found - expected).norm() / expected.norm())
    assert gap <= (0.02 if rounds else 1e-4)
    memory.train(method, model, case, [batch])
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert moved == [parameter.requires_grad for parameter in plain.parameters()]


def test_rows_of_memory_hold_together() -> None:
    case = Case.parse("resnet18/conv-all/b4/32px/eval")
    names = ("plain", "checkpointing", "default", "two-bits", "compact")
    rows = {name: memory.measure(case, name, steps=2, passes=2) for name in names}
    assert rows["plain"].cosine == pytest.approx(1.0, abs=1e-6)
    assert rows["checkpointing"].cosine == pytest.approx(1.0, abs=1e-6)
    assert 0.3 < rows["compact"].cosine < rows["two-bits"].cosine < rows["default"].cosine < 0.99999
    assert rows["default"].cosine > 0.99
    assert rows["compact"].kept < rows["two-bits"].kept < rows["default"].kept < rows["checkpointing"].kept
    assert rows["default"].kept * 6 < rows["plain"].kept
    assert rows["compact"].formula < rows["plain"].formula < rows["plain"].kept
    assert rows["checkpointing"].formula is rows["default"].formula is None
    lines = memory.table(list(rows.values()))
    assert [len(line) for line in lines] == [len(memory.HEADER)] * 6


@pytest.mark.parametrize("method", ["hosvd", "asi"])
def test_baselines_count_the_linear_layers_that_they_have_changed(method: str) -> None:
    pytest.importorskip("timm")
    case = Case.parse("deit_tiny/linear-2/b2")
    row = memory.measure(case, method, steps=1, passes=1)
    plain = memory.measure(case, "plain", steps=1, passes=1)
    assert 0 < row.formula < plain.formula
    assert row.kept < plain.kept
    assert 0.1 < row.cosine < 1


def test_memory_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", TINY.name, "--methods", "plain", "--steps", "1", "--passes", "1", "--threads", "1"]
    [row] = memory.main([*arguments, "--json", str(tmp_path / "memory.json")])
    assert row.error is None
    assert row.peak >= row.kept > 0
    assert "plain" in capsys.readouterr().out
    written = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [(line["case"], line["method"], line["kept"]) for line in written] == [(TINY.name, "plain", row.kept)]
    document = tmp_path / "memory.md"
    assert memory.main(["--json", str(tmp_path / "memory.json"), "--write", str(document)]) == [row]
    lines = document.read_text().splitlines()
    assert lines[-1].startswith(f"| {TINY.name} | plain | {size(row.kept)} |")
    assert {line.count("|") for line in lines[-3:]} == {9}


def test_the_document_is_in_the_order_of_networks_layers_batches_and_methods() -> None:
    names = [
        "deit_tiny/linear-4/b16",
        "resnet18/conv-all/b16/eval",
        "resnet18/conv-4/b64/eval",
        "resnet18/conv-4/b16/eval",
    ]
    rows = [memory.Row(name, method, "stock", kept=1) for name in names for method in ("default", "plain")]
    found = [line.split(" | ")[:2] for line in memory.document(rows).splitlines() if "/b" in line and line[0] == "|"]
    assert [case.strip("| ") for case, _ in found[::2]] == names[::-1]
    assert [method for _, method in found[:2]] == ["plain", "ours"]


def test_a_method_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    broken = Case.parse("resnet18/conv-4/b0/32px/eval")  # a batch of no images
    [row] = memory.main(["--cases", broken.name, "--methods", "plain", "--json", str(tmp_path / "memory.json")])
    assert "non-empty list" in row.error
    assert row.kept is None
    assert row.error in memory.table([row])[1]


def test_speed_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    arguments = ["--pairs", "3", "--threads", "1", "--json", str(path), "--cases", TINY.name]
    threads = torch.get_num_threads()
    try:
        rows = speed.main([*arguments, "--methods", "default,compact"])
    finally:
        torch.set_num_threads(threads)
    assert [row.method for row in rows] == ["default", "compact"]
    assert rows[0].calibration_steps is rows[0].refresh_steps is None
    assert rows[1].calibration_steps is not None
    assert rows[1].refresh_steps is None  # maps of one pixel: compact leaves all layers alone
    assert all(row.quartiles[0] <= row.ratio <= row.quartiles[1] for row in rows)
    assert "ours" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_groups_give_a_gradient_as_noisy_as_cosines_do() -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.rand(24, 6, 10, dtype=torch.float64, generator=generator)
    grad = torch.randn(24, 3, 10, dtype=torch.float64, generator=generator)
    orders = [torch.randperm(24, generator=generator) for _ in range(80)]
    found = [batch_mode.noise(input, grad, basis(24, 5), orders) for basis in (batch_mode.cosines, batch_mode.groups)]
    assert found[1] == pytest.approx(found[0], rel=0.15)
    for basis in (batch_mode.cosines, batch_mode.groups):
        assert batch_mode.noise(input, grad, basis(24, 24), orders[:3]) < 1e-12  # the whole batch is exact
    assert batch_mode.speed(16, 1) > 0


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="unknown methods exakt; there are plain"):
        find(["plain", "exakt"])


def test_kernels_that_are_timed_together_compute_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "MAPS", ((3, 100), (2, 8, 5, 5)))
    monkeypatch.setattr(kernels, "POINTWISE", ((8, 5), (6, 9)))
    monkeypatch.setattr(kernels, "SQUARES", ((3, 4), (3, 9)))
    for group in (kernels.rounding, kernels.computed, kernels.flags, kernels.pointwise, kernels.small_maps):
        for name, _, other, ours in group():
            expected, found = other(), ours()
            if found.is_floating_point():
                assert relative_error(found, expected) < 1e-5, name
            else:
                assert torch.equal(found, expected)
    ratios = kernels.main(["--repeats", "1", "--json", str(tmp_path / "kernels.json")])
    assert len(ratios) == (8 if native._native is not None else 7)
    assert all(ratio > 0 for shapes in ratios.values() for ratio in shapes.values())


def test_a_run_of_the_tradeoff_that_refreshes_ends_with_other_subspaces() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(9 * tradeoff.BATCH) % 3
    inputs = torch.randn(len(labels), 2, 24, 24, generator=generator) + labels.view(-1, 1, 1, 1)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3872, 3)
        )

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    data = inputs, labels
    task = tradeoff.Task(build, ["2"], data, data, 2, optimizer, 0.1, train_mode=True)
    once, again = (tradeoff.run(task, f"published, energy .7{end}", 0, 2) for end in ("", ", refresh"))
    assert once.cosine_start == again.cosine_start < 0.999
    assert once.cosine_end != again.cosine_end
    plain, rounded = (tradeoff.run(task, setting, 0, 2) for setting in ("plain back-propagation", "default"))
    assert [plain.cosine_start, plain.cosine_end] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert 0.99 < rounded.cosine_end < 0.999999
    assert rounded.kept * 4 < plain.kept
    assert once.kept < plain.kept
