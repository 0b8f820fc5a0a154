"""The plan of tiles, and what its sums hold."""

import pytest
import torch

from simclr_pl.loss_tiles import PairTiles, Tile, _plan

SIZES = [1, 2, 255, 256, 257, 511, 700]
BUDGETS = [0, 1, 40_000, 256 * 300, 256 * 900, 10**9]


def times_covered(plan: list[Tile], n: int, total: int, first: int) -> torch.Tensor:
    """How often a plan serves each pair (own row, any row), mirrored or not."""
    covered = torch.zeros(n, total, dtype=torch.int64)
    for tile in plan:
        covered[tile.rows, tile.columns] += 1
        if tile.mirrored:
            mirrored = slice(tile.columns.start - first, tile.columns.stop - first)
            covered[mirrored, first + tile.rows.start : first + tile.rows.stop] += 1
    return covered


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", SIZES)
def test_plan_serves_each_pair_once(n: int, world_size: int, budget: int) -> None:
    for rank in range(world_size):
        total, first = n * world_size, n * rank
        plan = list(_plan(n, total, first, budget))
        assert (times_covered(plan, n, total, first) == 1).all()


@pytest.mark.parametrize("n", [1, 300, 700])
def test_plan_allows_any_own_part_of_all_rows(n: int) -> None:
    for first, after in ((0, 0), (1, 0), (0, 1), (100, 5000)):
        plan = list(_plan(n, first + n + after, first, 256 * 600))
        assert (times_covered(plan, n, first + n + after, first) == 1).all()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("n", "total"), [(200, 200), (700, 700), (700, 2100), (5000, 5000)])
def test_kept_tiles_share_the_budget_without_overlap(n: int, total: int, budget: int) -> None:
    kept, remade = [], 0
    for tile in _plan(n, total, total - n, budget):
        area = (tile.rows.stop - tile.rows.start) * (tile.columns.stop - tile.columns.start)
        if tile.kept is None:
            remade += area
            assert tile.columns.stop - tile.columns.start <= 512
        else:
            kept.append((tile.kept, tile.kept + area))
    ends = [0, *(stop for _, stop in kept)]
    assert [start for start, _ in kept] == ends[:-1]
    assert ends[-1] <= budget
    assert remade == 0 if budget == 10**9 else remade > 0 or n == 200


def test_middling_budget_mixes_kept_and_remade_tiles_over_several_row_blocks() -> None:
    """At a size and a cache that `test_losses` compares with its oracle."""
    plan = list(_plan(2000, 2000, 0, int(4.5 * 2**17)))
    assert {tile.kept is None for tile in plan} == {False, True}
    assert len({tile.rows.start for tile in plan}) > 1


@pytest.mark.parametrize("cache_mb", [64, 0.1, 0])
@pytest.mark.parametrize("first", [0, 200, 400])
def test_sums_of_a_rank_match_the_whole_matrix(first: int, cache_mb: float) -> None:
    everything = torch.randn(600, 4, dtype=torch.float64)
    own = everything[first : first + 200]
    ids = torch.randint(0, 200, (600,))
    tiles = PairTiles(own, everything, first, 100, ids, cache_mb)
    s = own @ everything.T
    itself = torch.arange(600) == torch.arange(first, first + 200)[:, None]
    positive = (ids[first : first + 200, None] == ids) & ~itself
    negative = ~positive & ~itself
    e = s.exp2()
    sums = tiles.row_sums(True)
    expected = (
        (e * negative).sum(1),
        (e * positive).sum(1),
        (s * positive).sum(1),
        positive.sum(1).double(),
        (e * negative).amax(1),
        (e * positive).amax(1),
        (e * s * ~itself).sum(1),
    )
    torch.testing.assert_close(tuple(sums), expected, rtol=1e-12, atol=1e-12)

    r = torch.rand(600, dtype=torch.float64)
    own_r = r[first : first + 200]
    g = tiles.weighted_rows(own_r, r, lambda e, tile: 3 * e)
    weights = e * torch.where(positive, 3, own_r[:, None] + r) * ~itself
    torch.testing.assert_close(g, weights @ everything, rtol=1e-12, atol=1e-12)
