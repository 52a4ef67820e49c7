"""The memory of one layer: its states, a hundred experiences, and what it stores."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lance import CalibrationError, StateError
from lightning_lance.continual import FeatureMoments, LayerMemory, Stage, moments
from lightning_lance.ops.conv import geometry
from lightning_lance.ops.features import FeatureSide


def gram(width: int, rank: int) -> Tensor:
    rows = torch.randn(4 * rank, rank) @ torch.randn(rank, width)
    return rows.T @ rows


def experience(memory: LayerMemory, matrix: Tensor, threshold: float = 0.97, rank: Any = "full") -> None:
    memory.reserve(matrix, rank)
    memory.start()
    memory.protect(matrix, threshold)


def test_a_hundred_experiences_stay_orthonormal_in_float32() -> None:
    memory = LayerMemory(256)
    for _ in range(100):
        matrix = gram(256, 4)
        memory.reserve(matrix, 8)
        protected, reserved = memory.protected[0].double(), memory.reserved
        assert reserved is not None
        other = reserved[0].double()
        assert float((other.T @ other - torch.eye(other.shape[1])).abs().max()) < 1e-6
        if protected.numel() and other.numel():
            assert float((protected.T @ other).abs().max()) < 1e-6
        memory.start()
        before = memory.protected
        memory.protect(matrix, 0.97)
        after, before = memory.protected[0].double(), before[0].double()
        assert before.shape[1] <= after.shape[1] == memory.counts[0]
        if before.numel():
            assert float((before - after @ (after.T @ before)).abs().max()) < 1e-6
    protected = memory.protected[0].double()
    assert float((protected.T @ protected - torch.eye(protected.shape[1])).abs().max()) < 1e-6
    assert protected.shape[1] == memory.capacity().protected > 200
    assert memory.capacity().protected <= 256


@pytest.mark.parametrize(
    ("stage", "action", "allowed"),
    [
        ("empty", "start", "'calibrated'"),
        ("empty", "protect", "'training'"),
        ("calibrated", "reserve", "'empty' or 'consolidated'"),
        ("calibrated", "protect", "'training'"),
        ("training", "reserve", "'empty' or 'consolidated'"),
        ("training", "start", "'calibrated'"),
        ("consolidated", "start", "'calibrated'"),
        ("consolidated", "protect", "'training'"),
    ],
)
def test_a_wrong_step_names_the_allowed_states(stage: str, action: str, allowed: str) -> None:
    memory = LayerMemory(6, label="features.0")
    if stage != "empty":
        memory.reserve()
    if stage in ("training", "consolidated"):
        memory.start()
    if stage == "consolidated":
        memory.protect(gram(6, 2), 0.9)
    assert memory.stage.value == stage
    calls = {"reserve": memory.reserve, "start": memory.start, "protect": lambda: memory.protect(gram(6, 2), 0.9)}
    with pytest.raises(StateError, match=f"features.0: {action}.*{stage!r}, only in {allowed}"):
        calls[action]()
    assert memory.stage.value == stage


def test_abandoning_keeps_what_was_protected() -> None:
    memory = LayerMemory(6)
    memory.reserve()
    memory.abandon()
    assert memory.stage is Stage.EMPTY
    experience(memory, gram(6, 2))
    protected = memory.protected.clone()
    memory.reserve(gram(6, 2), 1)
    memory.start()
    memory.abandon()
    assert memory.stage is Stage.CONSOLIDATED
    assert memory.reserved is None
    assert torch.equal(memory.protected, protected)


def test_full_means_everything_outside() -> None:
    memory = LayerMemory(6)
    experience(memory, gram(6, 2), 0.99)
    assert memory.reserve() is None
    both = torch.cat([memory.protected[0], memory.basis()[0]], 1)
    assert both.shape == (6, 6)
    assert float((both.T @ both - torch.eye(6)).abs().max()) < 1e-6


def test_a_rank_needs_moments() -> None:
    with pytest.raises(StateError, match="needs the Gram matrix"):
        LayerMemory(6).reserve(rank=2)


def test_a_gram_matrix_of_another_width_is_refused() -> None:
    memory = LayerMemory(6, 2)
    memory.reserve()
    memory.start()
    with pytest.raises(StateError, match=r"shape \(5, 5\).*\(6, 6\).*2 groups"):
        memory.protect(torch.eye(5), 0.9)


def test_groups_have_bases_of_their_own_and_ranks_of_their_own() -> None:
    memory = LayerMemory(6, 2)
    grams = torch.stack([gram(6, 1), gram(6, 4)])
    memory.reserve()
    memory.start()
    assert memory.protect(grams, 0.999) == sum(memory.counts)
    assert memory.counts[0] == 1 < memory.counts[1]
    assert memory.protected.shape == (2, 6, memory.counts[1])
    assert not memory.protected[0, :, 1:].any()
    assert memory.capacity().width == 12
    assert memory.capacity().free == 12 - sum(memory.counts)


@pytest.mark.parametrize("stage", ["empty", "consolidated", "training"])
def test_the_state_passes_the_safe_unpickler_and_goes_on_alike(stage: str) -> None:
    first, second = LayerMemory(12), LayerMemory(12)
    if stage != "empty":
        experience(first, gram(12, 3))
    if stage == "training":
        first.reserve(gram(12, 3), 2)
        first.start()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    matrix = gram(12, 3)
    for memory in (first, second):
        assert memory.stage.value == stage
        if stage == "training":
            memory.protect(matrix, 0.97)
        else:
            experience(memory, matrix, rank=2)
    assert torch.equal(first.protected, second.protected)
    assert first.counts == second.counts


def test_a_state_of_another_layer_is_refused() -> None:
    with pytest.raises(StateError, match=r"shape \(1, 12, 0\).*Allowed: .* shape \(1, 6, 0\)"):
        LayerMemory(6).load_state_dict(LayerMemory(12).state_dict())


def conv_moments(groups: int, patch: bool = True, **options: Any) -> FeatureMoments:
    side = FeatureSide(groups, 4 // groups, (3, 3), patch)
    return FeatureMoments(side, geometry((3, 3), (1, 1), (1, 1), (1, 1), groups, "zeros"), "conv", **options)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batches", [1, 2, 9])
def test_moments_are_those_of_all_patches(groups: int, batches: int) -> None:
    found = conv_moments(groups)
    inputs = [torch.randn(2, 4, 3, 4) for _ in range(batches)]
    for input in inputs:
        found.update(input)
    patches = torch.cat([torch.nn.functional.unfold(x, 3, padding=1) for x in inputs]).double()
    rows = patches.transpose(1, 2).reshape(-1, groups, 36 // groups)
    for group, got in enumerate(found.groups()):
        expected = rows[:, group].T @ rows[:, group]
        whole = got.matrix @ got.matrix.T if got.is_root else got.matrix
        assert torch.allclose(whole.double(), expected, atol=1e-3)
        assert got.total == pytest.approx(float(expected.trace()), rel=1e-5)
    # Few vectors are kept as they are, many as their Gram matrix.
    assert found.groups()[0].is_root == (24 * batches < 36 // groups)


def test_an_unbatched_input_counts_as_a_batch_of_one() -> None:
    one, batched = conv_moments(1), conv_moments(1)
    input = torch.randn(4, 5, 5)
    one.update(input)
    batched.update(input[None])
    assert torch.equal(one.groups()[0].matrix, batched.groups()[0].matrix)


def test_moments_of_two_processes_sum_to_those_of_one() -> None:
    parts, whole = [conv_moments(2) for _ in range(2)], conv_moments(2)
    for part in parts:
        input = torch.randn(3, 4, 5, 5)
        part.update(input)
        whole.update(input)
    for mine, others in zip(parts[0].tensors(), parts[1].tensors(), strict=True):
        mine += others
    for got, expected in zip(parts[0].groups(), whole.groups(), strict=True):
        assert torch.allclose(got.matrix, expected.matrix, atol=1e-4)


def test_a_wide_side_is_sketched_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "EXACT_UP_TO", 128)
    sketched, width = FeatureMoments(FeatureSide(1, 512), None, "wide"), 512
    basis = torch.linalg.qr(torch.randn(width, 40)).Q
    rows = torch.randn(1000, 40) * 0.8 ** torch.arange(40) @ basis.T
    for part in rows.split(100):
        sketched.update(part)
    assert sum(tensor.numel() for tensor in sketched.tensors()) < width * width / 2
    memory = LayerMemory(width)
    memory.reserve()
    memory.start()
    memory.protect(sketched, 0.97)
    protected = memory.protected[0]
    held = float((rows @ protected).square().sum() / rows.square().sum())
    exact = LayerMemory(width)
    experience(exact, rows.T @ rows)
    assert held > 0.965
    assert abs(memory.capacity().protected - exact.capacity().protected) <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batches", [1, 20])
def test_bad_inputs_are_named(value: float, batches: int) -> None:
    found = conv_moments(1)
    for _ in range(batches):
        found.update(torch.full((1, 4, 2, 2), value))
    with pytest.raises(CalibrationError, match="conv received NaN or Inf"):
        found.groups()


@pytest.mark.parametrize("threshold", [0.8, 0.97, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_storing_what_is_free_protects_the_same(groups: int, threshold: float) -> None:
    stored, whole = (
        LayerMemory(24, groups, dtype=torch.float64),
        LayerMemory(24, groups, dtype=torch.float64, compact=False),
    )
    flipped = []
    for index in range(12):
        rows = torch.randn(groups, 200, 3, dtype=torch.float64) @ torch.randn(groups, 3, 24, dtype=torch.float64)
        matrix = rows.mT @ rows
        for memory in (stored, whole):
            memory.reserve(matrix, 2 if index % 2 else 0.9)
        assert stored.reserved is not None
        assert whole.reserved is not None
        # The same directions, up to signs.
        both = [reserved @ reserved.mT for reserved in (stored.reserved, whole.reserved)]
        torch.testing.assert_close(both[0], both[1], atol=1e-8, rtol=0)
        for memory in (stored, whole):
            memory.start()
            memory.protect(matrix, threshold)
        assert stored.counts == whole.counts
        both = [memory.protected @ memory.protected.mT for memory in (stored, whole)]
        torch.testing.assert_close(both[0], both[1], atol=1e-8, rtol=0)
        energies = groups * 12 * 8
        assert stored.capacity().bytes <= min(whole.capacity().bytes, groups * 24 * 12 * 8) + energies
        flipped.append(stored.free is not None)
        copied = LayerMemory(24, groups, dtype=torch.float64)
        copied.load_state_dict(stored.state_dict())
        assert torch.equal(copied.protected, stored.protected)
        stored = copied
    assert whole.free is None
    assert flipped == sorted(flipped)
    assert flipped[-1]
    assert not flipped[0]
