"""Continual-learning metrics against a slow reading of the definitions."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance import ConfigError, ContinualMetrics, continual_metrics

Cells = list[list[float | None]]


def mean(values: list[float | None]) -> float | None:
    if not values or any(value is None for value in values):
        return None
    return math.fsum(value for value in values if value is not None) / len(values)


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def oracle(cells: Cells, baseline: list[float | None]) -> dict[str, float | None]:
    """The definitions, one cell at a time; `None` is unknown."""
    last = max((i for i, row in enumerate(cells) if any(cell is not None for cell in row)), default=None)
    if last is None:
        return dict.fromkeys(("ACC", "BWT", "FWT", "forgetting", "learning_accuracy", "stream_accuracy"))
    forgotten: list[float | None] = []
    for j in range(last):
        known = [cells[i][j] for i in range(last) if cells[i][j] is not None]
        best = None if cells[j][j] is None else max(value for value in known if value is not None)
        forgotten.append(minus(best, cells[last][j]))
    return {
        "ACC": mean([cells[last][j] for j in range(last + 1)]),
        "BWT": mean([minus(cells[last][j], cells[j][j]) for j in range(last)]),
        "FWT": mean([minus(cells[j - 1][j], baseline[j]) for j in range(1, last + 1)]),
        "forgetting": mean(forgotten),
        "learning_accuracy": mean([cells[j][j] for j in range(last + 1)]),
        "stream_accuracy": mean([cells[i][j] for i in range(last + 1) for j in range(i + 1)]),
    }


def tensor(cells: Cells) -> Tensor:
    return torch.tensor([[math.nan if c is None else c for c in row] for row in cells], dtype=torch.float64)


def check(found: dict[str, Tensor], wanted: dict[str, float | None], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert found[name].isnan(), name
        else:
            assert found[name].item() == pytest.approx(value, abs=tolerance), name


accuracy = st.one_of(st.none(), st.floats(0, 1))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_the_definitions_also_where_cells_are_missing(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    holes = data.draw(st.booleans())
    cell = accuracy if holes else st.floats(0, 1)
    rows = data.draw(st.integers(0, size))
    cells: Cells = [data.draw(st.lists(cell, min_size=size, max_size=size)) for _ in range(rows)]
    cells += [[None] * size for _ in range(size - rows)]
    baseline = data.draw(st.lists(cell, min_size=size, max_size=size))
    check(continual_metrics(tensor(cells), tensor([baseline])[0]), oracle(cells, baseline))


def test_worked_example() -> None:
    matrix = torch.tensor([[0.9, 0.2, 0.4], [0.6, 0.8, 0.5], [0.7, 0.5, 0.9]], dtype=torch.float64)
    found = continual_metrics(matrix, torch.tensor([0.1, 0.1, 0.3]))
    wanted = {
        "ACC": 0.7,
        "BWT": -0.25,
        "FWT": 0.15,
        "forgetting": 0.25,
        "learning_accuracy": 2.6 / 3,
        "stream_accuracy": 4.4 / 6,
    }
    check(found, wanted, 1e-7)


def test_forgetting_counts_from_the_best_row_and_backward_transfer_from_its_own() -> None:
    matrix = torch.tensor([[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.6, 0.5, 0.5]])
    found = continual_metrics(matrix)
    assert found["forgetting"].item() == pytest.approx(0.15)
    assert found["BWT"].item() == pytest.approx(0.05)
    assert found["FWT"].isnan()


@pytest.fixture
def filled() -> tuple[ContinualMetrics, Cells, list[float | None]]:
    """Three experiences, evaluated in uneven batches; cell (0, 2) is never evaluated."""
    metrics = ContinualMetrics(3)
    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[int | None, int], list[int]] = {}
    for trained in (None, 0, 1, 2):
        for evaluated in range(3):
            for size in (5, 1, 8):
                if (trained, evaluated) == (0, 2):
                    continue
                scores = torch.randn(size, 4, generator=generator)
                target = torch.randint(4, (size,), generator=generator)
                given = scores if size != 8 else scores.argmax(1)
                metrics.update(given, target, trained=trained, evaluated=evaluated)
                cell = counts.setdefault((trained, evaluated), [0, 0])
                for row, label in zip(scores.tolist(), target.tolist(), strict=True):
                    cell[0] += row.index(max(row)) == label
                    cell[1] += 1
    cells: Cells = [
        [counts[i, j][0] / counts[i, j][1] if (i, j) in counts else None for j in range(3)] for i in range(3)
    ]
    return metrics, cells, [counts[None, j][0] / counts[None, j][1] for j in range(3)]


def test_batches_add_up_to_the_matrix(filled: tuple[ContinualMetrics, Cells, list[float | None]]) -> None:
    metrics, cells, baseline = filled
    torch.testing.assert_close(metrics.matrix.double(), tensor(cells), equal_nan=True)
    torch.testing.assert_close(metrics.baseline.double(), tensor([baseline])[0])
    check(metrics.compute(), oracle(cells, baseline), 1e-6)


def test_copies_carry_the_state_and_reset_clears_it(
    filled: tuple[ContinualMetrics, Cells, list[float | None]],
) -> None:
    metrics, cells, baseline = filled
    wanted = oracle(cells, baseline)
    fresh = ContinualMetrics(3)
    fresh.load_state_dict(copy.deepcopy(metrics.state_dict()))
    fresh.update(torch.empty(0, 4), torch.empty(0, dtype=torch.long), trained=2, evaluated=0)
    copies = [metrics.clone(), pickle.loads(pickle.dumps(metrics)), copy.deepcopy(metrics), fresh]
    metrics.reset()
    assert metrics.matrix.isnan().all()
    assert metrics.total.sum() == 0
    for other in copies:
        check(other.compute(), wanted, 1e-6)
        other.update(torch.tensor([1]), torch.tensor([1]), trained=0, evaluated=2)
        assert not other.matrix.isnan().any(), "a copy must stay usable"
        assert other.compute()["forgetting"].item() == pytest.approx(wanted["forgetting"], abs=1e-6)


def test_state_dict_is_plain_and_restored_inside_a_module(
    filled: tuple[ContinualMetrics, Cells, list[float | None]],
) -> None:
    metrics, cells, _ = filled
    holder = nn.ModuleDict({"metrics": metrics})
    torch.save(holder.state_dict(), "state.pt")
    other = nn.ModuleDict({"metrics": ContinualMetrics(3)})
    other.load_state_dict(torch.load("state.pt", weights_only=True))
    torch.testing.assert_close(other["metrics"].matrix.double(), tensor(cells), equal_nan=True)


def test_forward_adds_to_the_matrix() -> None:
    metrics = ContinualMetrics(1)
    first = metrics(torch.tensor([0, 1]), torch.tensor([0, 0]), trained=0, evaluated=0)
    assert first["ACC"].item() == 0.5
    metrics(torch.tensor([1, 1]), torch.tensor([1, 1]), trained=0, evaluated=0)
    assert metrics.compute()["ACC"].item() == 0.75


def _rank(rank: int, folder: str) -> dict[str, float]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    try:
        metrics = ContinualMetrics(2)
        # The ranks see different batches, and one cell only rank 1 has.
        metrics.update(torch.zeros(3 + rank).long(), torch.zeros(3 + rank).long(), trained=0, evaluated=0)
        metrics.update(torch.ones(2).long() * rank, torch.zeros(2).long(), trained=1, evaluated=0)
        if rank == 1:
            metrics.update(torch.zeros(5).long(), torch.tensor([0, 1, 1, 1, 1]), trained=1, evaluated=1)
        found = {name: value.item() for name, value in metrics.compute().items()}
        assert metrics.total.sum() == (5 if rank == 0 else 11), "synced counts must not leak into the local ones"
        return found
    finally:
        torch.distributed.barrier()  # gloo of torch 2.6 may wait for ever for a process that is gone
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_processes_sum_their_counts(tmp_path: Path) -> None:
    other = torch.multiprocessing.get_context("spawn").Process(target=_rank, args=(1, str(tmp_path)))
    other.start()
    found = _rank(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    assert found["ACC"] == pytest.approx((0.5 + 0.2) / 2)
    assert found["BWT"] == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2).long(), torch.zeros(2).long(), 3, 0), "trained=3.*0 to 2"),
        ((torch.zeros(2).long(), torch.zeros(2).long(), -1, 0), "trained=-1"),
        ((torch.zeros(2).long(), torch.zeros(2).long(), 0, 3), "evaluated=3"),
        ((torch.zeros(2).long(), torch.zeros(3).long(), 0, 0), r"shape \(2,\).*\(3,\)"),
        ((torch.zeros(2), torch.zeros(2).long(), 0, 0), "float32"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 0, 0), "class indices"),
    ],
)
def test_wrong_updates_are_refused_and_leave_no_trace(arguments: tuple[Tensor, Tensor, int, int], message: str) -> None:
    metrics = ContinualMetrics(3)
    preds, target, trained, evaluated = arguments
    with pytest.raises(ConfigError, match=message):
        metrics.update(preds, target, trained=trained, evaluated=evaluated)
    assert metrics.total.sum() == 0


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_a_stream_has_a_length(size: object) -> None:
    with pytest.raises(ConfigError, match="num_experiences"):
        ContinualMetrics(size)  # type: ignore[arg-type]


def test_wrong_matrices_are_refused() -> None:
    with pytest.raises(ConfigError, match="square"):
        continual_metrics(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="floating"):
        continual_metrics(torch.zeros(2, 2).long())
    with pytest.raises(ConfigError, match="baseline"):
        continual_metrics(torch.zeros(2, 2), torch.zeros(3))


def test_plot_writes_each_known_cell_where_it_belongs(
    filled: tuple[ContinualMetrics, Cells, list[float | None]],
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics, cells, _ = filled
    _, axis = metrics.plot()
    written = {text.get_position(): text.get_text() for text in axis.texts}
    wanted = {
        (column, row): f"{100 * value:.0f}"
        for row, line in enumerate(cells)
        for column, value in enumerate(line)
        if value is not None
    }
    assert written == wanted
    own = plt.figure().add_subplot()
    assert metrics.plot(torch.eye(2), ax=own) == (own.figure, own)
    assert {text.get_text() for text in own.texts} == {"0", "100"}
    plt.close("all")
