"""Saving a strategy between experiences and going on in a new process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.training import Naive

from lightning_lance.avalanche import LanceStrategy, maybe_load_checkpoint, save_checkpoint
from tests.avalanche.streams import MultiHead, accuracies, class_stream, settings
from tests.processes import in_process

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore:.*nearly full"),
]


def run(reserved: Any, stop: int, result: str) -> None:
    """Experiences up to one, from where the checkpoint in the present folder is, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stream, model = class_stream(), MultiHead()
    strategy = LanceStrategy(reserved=reserved, threshold=0.9, **settings(model))
    strategy, first = maybe_load_checkpoint(strategy, "stream.pt", unique_objects=stream)
    matrix = []
    for experience in stream.train_stream[first:stop]:
        strategy.train(experience)
        matrix.append(accuracies(strategy.eval(stream.test_stream)))
        save_checkpoint(strategy, "stream.pt")
    parts = [strategy.model, strategy.optimizer, strategy.lance.session]
    torch.save([*(part.state_dict() for part in parts), matrix, torch.get_rng_state()], result)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("reserved", ["full", 8])
def test_a_resumed_stream_is_the_uninterrupted_one(tmp_path: Path, reserved: Any) -> None:
    ends = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        stream = class_stream()
        strategy = LanceStrategy(reserved=reserved, threshold=0.9, **settings(MultiHead()))
        for experience in stream.train_stream[:2]:
            strategy.train(experience)
            strategy.eval(stream.test_stream)
        if interrupted:
            save_checkpoint(strategy, tmp_path / "stream.pt")
            torch.manual_seed(99)  # another process
            strategy = LanceStrategy(reserved=reserved, threshold=0.9, **settings(MultiHead()))
            strategy, first = maybe_load_checkpoint(strategy, tmp_path / "stream.pt", unique_objects=stream)
            assert first == 2
        strategy.train(stream.train_stream[2])
        ends.append((strategy, accuracies(strategy.eval(stream.test_stream))))
    (expected, accuracy), (found, resumed_accuracy) = ends
    same(found.model.state_dict(), expected.model.state_dict())
    for index, state in expected.optimizer.state_dict()["state"].items():
        same(found.optimizer.state_dict()["state"][index], state)
    for name, memory in expected.lance.session.memories.items():
        assert torch.equal(found.lance.session.memories[name].protected, memory.protected)
    assert resumed_accuracy == accuracy
    assert found.lance.session.experience == 3


def test_a_stream_resumed_in_another_process_is_the_uninterrupted_one(cwd: Path) -> None:
    ends = []
    for stops in ([3], [2, 3]):
        for stop in stops:
            assert in_process(run, "full", stop, "end.pt") == 0
        ends.append(torch.load("end.pt", weights_only=True))
        Path("stream.pt").unlink()
    expected, found = ends
    same(found[0], expected[0])
    assert found[3] == expected[3][2:]
    assert torch.equal(found[4], expected[4])


def test_any_strategy_can_be_saved_and_torch_optim_is_as_before(tmp_path: Path) -> None:
    names = set(vars(torch.optim))
    stream = class_stream()
    strategy = Naive(**settings(MultiHead()))
    strategy.train(next(iter(stream.train_stream)))
    save_checkpoint(strategy, tmp_path / "naive.pt")
    assert set(vars(torch.optim)) == names
    other, index = maybe_load_checkpoint(Naive(**settings(MultiHead())), tmp_path / "naive.pt")
    assert set(vars(torch.optim)) == names
    assert index == 1
    for key, value in strategy.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[key], value)
    assert accuracies(other.eval(stream.test_stream))[0] > 0.5


def test_a_missing_file_starts_from_the_beginning(tmp_path: Path) -> None:
    strategy = LanceStrategy(**settings(MultiHead()))
    assert maybe_load_checkpoint(strategy, tmp_path / "none.pt") == (strategy, 0)


def test_a_failed_save_leaves_the_earlier_file(tmp_path: Path) -> None:
    strategy = LanceStrategy(threshold=0.9, **settings(MultiHead()))
    strategy.train(next(iter(class_stream().train_stream)))
    file = tmp_path / "stream.pt"
    save_checkpoint(strategy, file)
    before = file.read_bytes()
    strategy.unpicklable = (_ for _ in ())
    with pytest.raises(TypeError, match="generator"):
        save_checkpoint(strategy, file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["stream.pt"]
