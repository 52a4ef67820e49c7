"""The loader that goes on in mid-epoch, and benchmarks as data modules."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from lightning_lance import ConfigError
from lightning_lance.streams.datamodule import AvalancheDataModule
from lightning_lance.streams.loader import ResumableLoader
from lightning_lance.streams.randomness import random_state, set_random_state
from tests.avalanche.runs import BENCHMARKS, CLASSES, EXPERIENCES, WIDTH, points


class Numbers(Dataset[tuple[int, float]]):
    """Indices, and a random number of each source."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, float(torch.rand(())) + random.random() + np.random.rand()  # noqa: NPY002


def drawn(loader: ResumableLoader, epoch: int = 0) -> list[tuple[list[int], list[float]]]:
    loader.sampler.set_epoch(epoch)
    return [(indices.tolist(), values.tolist()) for indices, values in loader]


class TestLoader:
    @given(
        count=st.integers(1, 40),
        batch_size=st.integers(1, 9),
        world_size=st.integers(1, 3),
        shuffle=st.booleans(),
        drop_last=st.booleans(),
        seed=st.integers(-5, 2**70),
    )
    def test_shares_of_an_epoch(
        self, count: int, batch_size: int, world_size: int, shuffle: bool, drop_last: bool, seed: int
    ) -> None:
        loaders = [
            ResumableLoader(Numbers(count), batch_size, shuffle, seed, drop_last, rank, world_size)
            for rank in range(world_size)
        ]
        batches = [[indices for indices, _ in drawn(loader)] for loader in loaders]
        for loader, found in zip(loaders, batches, strict=True):
            assert len(loader) == len(found)
            assert all(len(batch) == batch_size for batch in found[: -1 if not drop_last else None])
        seen = [index for found in batches for batch in found for index in batch]
        if shuffle:
            assert len({len(found) for found in batches}) == 1  # every process takes as many steps
        else:
            assert len(seen) == len(set(seen))
        if not drop_last:
            assert set(seen) == set(range(count))
            if shuffle:
                assert len(seen) == -(-count // world_size) * world_size

    @given(count=st.integers(1, 30), batch_size=st.integers(1, 7), stop=st.integers(0, 40), epoch=st.integers(0, 3))
    def test_goes_on_where_it_was(self, count: int, batch_size: int, stop: int, epoch: int) -> None:
        whole = drawn(ResumableLoader(Numbers(count), batch_size, True, 7), epoch)
        stop = min(stop, len(whole))
        loader = ResumableLoader(Numbers(count), batch_size, True, 7)
        loader.sampler.set_epoch(epoch)
        first = [(a.tolist(), b.tolist()) for a, b in islice(loader, stop)]
        again = ResumableLoader(Numbers(count), batch_size, True, 7)
        if stop:
            again.load_state_dict(loader.state_dict())
        assert first + drawn(again, epoch) == whole
        # What follows is a whole epoch again.
        assert drawn(again, epoch + 1) == drawn(loader, epoch + 1)

    def test_a_state_of_an_earlier_epoch_is_no_position_in_this_one(self) -> None:
        loader = ResumableLoader(Numbers(10), 3, True)
        loader.load_state_dict({"epoch": 0, "batch": 4})
        assert len(drawn(loader, 1)) == 4

    def test_epochs_seeds_and_processes_differ(self) -> None:
        def order(**options: Any) -> list[int]:
            return [index for batch, _ in drawn(ResumableLoader(Numbers(64), 64, True, **options)) for index in batch]

        loader = ResumableLoader(Numbers(64), 64, True)
        assert drawn(loader, 0) != drawn(loader, 1)
        assert order(seed=0) == order(seed=0)
        assert order(seed=0) != order(seed=1)
        shares = [order(rank=rank, world_size=2) for rank in range(2)]
        assert set(shares[0]).isdisjoint(shares[1])

    def test_leaves_the_global_generators_alone(self) -> None:
        before = random_state()
        first = drawn(ResumableLoader(Numbers(20), 4, True))
        after = random_state()
        assert str(before) == str(after)
        assert torch.equal(before["torch"], after["torch"])
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)  # noqa: NPY002
        assert drawn(ResumableLoader(Numbers(20), 4, True)) == first
        values = [value for _, batch in first for value in batch]
        assert len(set(values)) == len(values)  # no batch repeats the random numbers of another

    def test_workers_draw_the_same(self) -> None:
        alone = drawn(ResumableLoader(Numbers(20), 4, True))
        assert drawn(ResumableLoader(Numbers(20), 4, True, num_workers=2)) == alone


def test_random_states_come_back_through_a_checkpoint(tmp_path: Any) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]  # noqa: NPY002

    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    wanted = draw()
    draw()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == wanted


class TestBenchmarks:
    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_batches(self, name: str) -> None:
        data = AvalancheDataModule(BENCHMARKS[name](), batch_size=5, eval_batch_size=4)
        assert data.num_experiences == EXPERIENCES
        for experience in range(EXPERIENCES):
            data.experience = experience
            found = [torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True)]
            inputs, classes, task_labels = found
            assert inputs.shape == (32, WIDTH)
            assert (classes.dtype, task_labels.dtype) == (torch.int64, torch.int64)
            task = experience if name in ("nc with tasks", "task-incremental", "tensors") else 0
            assert task_labels.unique().tolist() == [task]
            assert data.train_experience(experience).classes_in_this_experience
        tests = data.test_dataloader()
        assert len(tests) == (1 if name == "ni" else EXPERIENCES)
        assert data.test_experiences == ([0] * EXPERIENCES if name == "ni" else list(range(EXPERIENCES)))
        # All samples once, in the order of the experience.
        inputs = torch.cat([batch[0] for loader in tests for batch in loader])
        assert sorted(inputs.sum(1).tolist()) == sorted(points(6, 2)[0].sum(1).tolist())

    def test_evaluated(self) -> None:
        data = AvalancheDataModule(BENCHMARKS["nc"]())
        whole = data.test_dataloader()
        data.evaluated = [2, 0]
        first = [next(iter(loader))[0] for loader in data.test_dataloader()]
        assert [torch.equal(first[0], next(iter(whole[2]))[0]), torch.equal(first[1], next(iter(whole[0]))[0])] == [
            True,
            True,
        ]

    def test_validation_stream(self) -> None:
        from avalanche.benchmarks import benchmark_with_validation_stream

        plain = AvalancheDataModule(BENCHMARKS["nc"]())
        assert plain.val_dataloader() == []
        split = benchmark_with_validation_stream(BENCHMARKS["nc"](), validation_size=0.25)
        data = AvalancheDataModule(split, batch_size=8)
        data.experience = 1
        [loader] = data.val_dataloader()
        assert (len(loader.dataset), len(data.train_dataloader().dataset)) == (8, 24)

    def test_experiences_do_not_share_an_order(self) -> None:
        data = AvalancheDataModule(BENCHMARKS["nc"](), batch_size=32)
        orders = []
        for data.experience in range(EXPERIENCES):
            orders.append(data.train_dataloader()._batches(0))
        assert orders[0] != orders[1] != orders[2]

    def test_from_a_function(self) -> None:
        from tests.avalanche.runs import new_classes

        data = AvalancheDataModule(new_classes, {"augment": True})
        batches = [next(iter(data.train_dataloader()))[0] for _ in range(2)]
        assert torch.equal(*batches)

    @pytest.mark.parametrize(
        ("benchmark", "options", "wanted"),
        [
            (BENCHMARKS["nc"], {"arguments": {"augmnt": True}}, ["augmnt", "Allowed: augment"]),
            (BENCHMARKS["nc"](), {"arguments": {"augment": True}}, ["a benchmark was given"]),
            (3, {}, ["benchmark is a int", "train_stream"]),
            (lambda: None, {}, ["benchmark is a NoneType"]),
            (BENCHMARKS["nc"], {"batch_size": 0}, ["batch_size=0", "at least 1"]),
            (BENCHMARKS["nc"], {"num_workers": -1}, ["num_workers=-1", "at least 0"]),
        ],
    )
    def test_what_is_refused(self, benchmark: Callable[..., Any], options: dict[str, Any], wanted: list[str]) -> None:
        with pytest.raises(ConfigError) as error:
            AvalancheDataModule(benchmark, **options)
        for part in wanted:
            assert part in str(error.value)

    def test_uneven_streams_are_refused(self) -> None:
        from avalanche.benchmarks import tensors_benchmark

        part = (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
        made = tensors_benchmark(train_tensors=[part] * 3, test_tensors=[part] * 2, task_labels=[0, 0, 0])
        with pytest.raises(ConfigError, match="3 train and 2 test"):
            AvalancheDataModule(made)


def test_classes_are_counted_in_all() -> None:
    assert points(1, 0)[1].tolist() == list(range(CLASSES))
    assert isinstance(points(1, 0)[0], Tensor)
