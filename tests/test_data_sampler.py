"""The order of the images: one for every rank count."""

from itertools import chain, product

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from simclr_pl.data.sampler import Draw, EvaluationSampler, KeyedSampler


def global_batches(count: int, batch: int, world: int, seed: int, epoch: int) -> list[list[int]]:
    """The ranks' slices of each step, concatenated in rank order."""
    steps: list[list[int]] = [[] for _ in range(count // batch)]
    for rank in range(world):
        sampler = KeyedSampler(count, batch, seed, rank, world)
        sampler.set_epoch(epoch)
        draws = list(sampler)
        assert len(draws) == len(sampler) == len(steps)
        for step, draw in zip(steps, draws, strict=True):
            assert draw.epoch == epoch
            assert draw.positions.dtype == np.int64
            assert len(draw.positions) == batch // world
            step.extend(draw.positions.tolist())
    return steps


def whole_epoch(count: int, batch: int, seed: int, epoch: int) -> list[int]:
    return list(chain.from_iterable(global_batches(count, batch, 1, seed, epoch)))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("count", "batch"), [(100, 20), (103, 20), (8, 8), (13, 4), (7, 8)])
def test_slices_of_the_ranks_concatenate_to_the_global_batches_of_one_rank(
    count: int, batch: int, world: int
) -> None:
    for epoch in (0, 1, 5):
        alone = global_batches(count, batch, 1, 3, epoch)
        assert global_batches(count, batch, world, 3, epoch) == alone


@pytest.mark.parametrize(("count", "batch"), [(100, 20), (103, 20), (8, 8), (13, 4), (7, 8)])
def test_an_epoch_repeats_no_image_and_drops_only_the_rest(count: int, batch: int) -> None:
    for epoch in range(3):
        drawn = whole_epoch(count, batch, 0, epoch)
        assert len(drawn) == len(set(drawn)) == count - count % batch
        assert set(drawn) <= set(range(count))


def test_what_is_dropped_changes_with_the_epoch() -> None:
    dropped = [set(range(11)) - set(global_batches(11, 10, 1, 0, e)[0]) for e in range(40)]
    assert {len(d) for d in dropped} == {1}
    assert len(set.union(*dropped)) > 8


def test_the_order_depends_on_epoch_and_seed_and_on_nothing_else() -> None:
    orders = [tuple(whole_epoch(60, 12, seed, epoch)) for seed in range(3) for epoch in range(5)]
    assert len(set(orders)) == 15
    assert all(order != tuple(range(60)) for order in orders)
    again = tuple(whole_epoch(60, 12, 2, 4))
    assert again == orders[-1]


def test_the_order_is_pinned_for_ever() -> None:
    # A change of these numbers breaks the resume of every earlier run.
    assert global_batches(10, 5, 1, 0, 0) == [[0, 1, 9, 4, 2], [3, 6, 8, 7, 5]]
    assert global_batches(10, 5, 1, 0, 1) == [[2, 1, 9, 5, 6], [3, 4, 8, 0, 7]]


def test_iterating_again_without_set_epoch_repeats_the_epoch() -> None:
    sampler = KeyedSampler(30, 10, 0, 0, 1)
    first, again = ([d.positions.tolist() for d in sampler] for _ in range(2))
    assert first == again
    sampler.set_epoch(1)
    assert [d.positions.tolist() for d in sampler] != first
    assert [d.epoch for d in sampler] == [1, 1, 1]
    sampler.set_epoch(0)
    assert [d.positions.tolist() for d in sampler] == first


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_goes_on_at_any_step_with_its_length_unchanged(world: int) -> None:
    for rank in range(world):
        sampler = KeyedSampler(33, 4, 7, rank, world)
        sampler.set_epoch(3)
        whole = [(d.epoch, d.step, d.positions.tolist()) for d in sampler]
        for sampler.first_step in range(9):
            rest = [(d.epoch, d.step, d.positions.tolist()) for d in sampler]
            assert rest == whole[sampler.first_step :]
            assert len(sampler) == len(whole) == 8


@pytest.mark.parametrize("sampler", [KeyedSampler(9, 4, 0, 1, 2), EvaluationSampler(9, 4, 1, 2)])
def test_samplers_are_distributed_samplers_so_that_lightning_keeps_them(sampler: object) -> None:
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.rank, sampler.num_replicas, sampler.epoch) == (1, 2, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_evaluation_covers_every_image_once_in_equal_batches(world: int) -> None:
    counts = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 100)
    for count, batch in product(counts, (1, 2, 3, 8, 64)):
        ranks = [EvaluationSampler(count, batch, rank, world) for rank in range(world)]
        draws: list[list[Draw]] = [list(sampler) for sampler in ranks]
        sizes = [[len(draw.positions) for draw in rank] for rank in draws]
        assert all(rank == sizes[0] for rank in sizes), (count, batch)
        assert all(len(sampler) == len(sizes[0]) for sampler in ranks), (count, batch)
        assert all(size == batch for size in sizes[0][:-1]), (count, batch)
        assert all(1 <= size <= batch for size in sizes[0]), (count, batch)
        positions = [p for rank in draws for draw in rank for p in draw.positions.tolist()]
        assert sorted(p for p in positions if p != -1) == list(range(count)), (count, batch)
        assert positions.count(-1) == sum(map(sum, sizes)) - count < world, (count, batch)
        assert all(draw.positions.dtype == np.int64 for rank in draws for draw in rank)


def test_evaluation_is_the_same_in_every_epoch() -> None:
    sampler = EvaluationSampler(10, 4, 0, 2)
    first = [(d.epoch, d.positions.tolist()) for d in sampler]
    sampler.set_epoch(7)
    assert [(d.epoch, d.positions.tolist()) for d in sampler] == first
