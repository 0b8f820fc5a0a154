"""Gathers and sums, on two real ranks and alone."""

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from simclr_pl.distributed import (
    all_reduce_sum,
    gather_rows,
    gather_uneven_rows,
    is_distributed,
    rank,
    world_size,
)


def rows_of(rank: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, 2, 3), different on each rank."""
    return (torch.arange(count * 6).reshape(count, 2, 3) + 1000 * rank).to(dtype)


def gather_even(dtype: torch.dtype) -> Tensor:
    return gather_rows(rows_of(rank(), 4, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_gather_rows_concatenates_in_rank_order(dtype: torch.dtype) -> None:
    expected = torch.cat([rows_of(0, 4, dtype), rows_of(1, 4, dtype)])
    for gathered in on_ranks(2, gather_even, dtype):
        assert gathered.dtype == dtype
        assert torch.equal(gathered, expected)


def gather_transposed() -> Tensor:
    return gather_rows(rows_of(rank(), 4)[:, 0].T)


def test_gather_rows_takes_rows_that_are_not_contiguous() -> None:
    expected = torch.cat([rows_of(r, 4)[:, 0].T for r in range(2)])
    for gathered in on_ranks(2, gather_transposed):
        assert torch.equal(gathered, expected)


def gather_uneven(counts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return gather_uneven_rows(rows_of(rank(), counts[rank()], dtype))


@pytest.mark.parametrize(
    ("counts", "dtype"),
    [
        ((3, 0), torch.float32),
        ((0, 5), torch.int64),
        ((2, 7), torch.float64),
        ((4, 4), torch.float32),
        ((0, 0), torch.float32),
        ((1, 0, 3), torch.int64),
    ],
)
def test_gather_uneven_rows_keeps_every_row_once(
    counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    expected = torch.cat([rows_of(r, n, dtype) for r, n in enumerate(counts)])
    for gathered in on_ranks(len(counts), gather_uneven, counts, dtype):
        assert gathered.dtype == dtype
        assert gathered.shape == expected.shape
        assert torch.equal(gathered, expected)


def sum_and_identity() -> tuple[Tensor, bool, tuple[bool, int, int]]:
    value = rows_of(rank(), 2)
    returned = all_reduce_sum(value)
    return value, returned is value, (is_distributed(), rank(), world_size())


def test_all_reduce_sum_sums_in_place_over_two_ranks() -> None:
    expected = rows_of(0, 2) + rows_of(1, 2)
    for r, (value, same, names) in enumerate(on_ranks(2, sum_and_identity)):
        assert torch.equal(value, expected)
        assert same
        assert names == (True, r, 2)


def gradient_flags() -> tuple[bool, bool, bool]:
    rows = torch.ones(3, 2, requires_grad=True)
    gathered = gather_rows(rows * 2), gather_uneven_rows((rows * 2)[: 1 + rank()])
    return (*(g.requires_grad for g in gathered), rows.requires_grad)


def test_gathers_carry_no_gradient_on_two_ranks() -> None:
    assert on_ranks(2, gradient_flags) == [(False, False, True)] * 2


def test_gathers_carry_no_gradient_in_a_single_process() -> None:
    assert gradient_flags() == (False, False, True)


@pytest.mark.parametrize("gather", [gather_rows, gather_uneven_rows])
@pytest.mark.parametrize("count", [0, 4])
def test_a_single_process_gathers_its_own_rows(gather: object, count: int) -> None:
    rows = rows_of(0, count)
    assert torch.equal(gather(rows), rows)  # type: ignore[operator]


def test_a_single_process_sums_to_its_own_value_and_is_rank_0_of_1() -> None:
    value, same, names = sum_and_identity()
    assert torch.equal(value, rows_of(0, 2))
    assert same
    assert names == (False, 0, 1)


def test_one_rank_with_a_group_is_a_single_process() -> None:
    ((value, same, names),) = on_ranks(1, sum_and_identity)
    assert torch.equal(value, rows_of(0, 2))
    assert same
    assert names == (False, 0, 1)
