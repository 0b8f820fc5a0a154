"""The keyed random numbers against splitmix64 in plain Python integers."""

import itertools

import numpy as np
import pytest
from scipy import stats

from simclr_pl.keyed_random import Stream, keys, permutation, uniforms

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = mix(((key ^ (part & MASK)) + GOLDEN) & MASK)
    return key


def slow_uniforms(key: int, n: int) -> list[float]:
    return [(mix((key + i * GOLDEN) & MASK) >> 11) / 2**53 for i in range(1, n + 1)]


def test_numbers_are_the_published_splitmix64_sequence() -> None:
    # the first outputs for seed 1234567, as in https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    numbers = uniforms(np.uint64(1234567), 5)
    assert [int(u * 2**53) for u in numbers] == [bits >> 11 for bits in published]


@pytest.mark.parametrize(
    "parts", [(), (0,), (0, 0), (7, 3, 1, 12345), (-1, 2), (2**63 - 1, -(2**63))]
)
def test_keys_match_python_integers(parts: tuple[int, ...]) -> None:
    key = keys(*parts)
    assert key.dtype == np.uint64
    assert int(key) == slow_key(*parts)


def test_broadcast_keys_and_uniforms_match_python_integers() -> None:
    index, views = np.array([5, -1, 2**40])[:, None], np.arange(2)[None, :]
    numbers = uniforms(keys(3, -2, Stream.CROP, index, views), 4)
    assert numbers.shape == (3, 2, 4)
    for (i, sample), v in itertools.product(enumerate(index[:, 0]), range(2)):
        assert numbers[i, v].tolist() == slow_uniforms(slow_key(3, -2, 1, int(sample), v), 4)


@pytest.mark.parametrize("axis", ["samples", "numbers", "epochs", "views"])
def test_numbers_are_uniform_along_each_part_of_the_key(axis: str) -> None:
    many = np.arange(100_000)
    numbers = {
        "samples": uniforms(keys(0, 0, Stream.JITTER, many, 0), 1)[:, 0],
        "numbers": uniforms(keys(0, 0, Stream.JITTER, 0, 0), len(many)),
        "epochs": uniforms(keys(0, many, Stream.JITTER, 0, 0), 1)[:, 0],
        "views": uniforms(keys(0, 0, Stream.JITTER, 0, many), 1)[:, 0],
    }[axis]
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(len(many))


def test_seeds_epochs_streams_and_views_are_uncorrelated() -> None:
    index = np.arange(100_000)
    base = (0, 0, Stream.JITTER, index, 0)
    columns = [uniforms(keys(*base), 1)[:, 0]]
    for position, value in ((0, 1), (1, 1), (2, Stream.GREY), (4, 1)):
        other = list(base)
        other[position] = value
        columns.append(uniforms(keys(*other), 1)[:, 0])
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4 / np.sqrt(len(index))


def test_the_order_of_the_parts_matters() -> None:
    assert keys(1, 2) != keys(2, 1)
    assert keys(0) != keys(0, 0)


def test_a_sample_gets_the_same_numbers_in_any_batch() -> None:
    batch = np.array([9, 4, 7, 1])
    together = uniforms(keys(0, 3, Stream.BLUR, batch[:, None], np.arange(2)), 3)
    for row, sample in zip(together, batch, strict=True):
        alone = uniforms(keys(0, 3, Stream.BLUR, np.array([[sample]]), np.arange(2)), 3)
        np.testing.assert_array_equal(alone[0], row)
    other_batch = uniforms(keys(0, 3, Stream.BLUR, batch[::-1][:, None], np.arange(2)), 3)
    np.testing.assert_array_equal(other_batch[::-1], together)


def test_the_first_numbers_do_not_depend_on_how_many_are_drawn() -> None:
    key = keys(0, np.arange(5))
    np.testing.assert_array_equal(uniforms(key, 9)[:, :4], uniforms(key, 4))


def test_permutation_is_the_order_of_the_hashes() -> None:
    order = permutation(1000, 5, 2, Stream.ORDER)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == sorted(range(1000), key=lambda i: slow_key(5, 2, 0, i))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_permutation_of_few(n: int) -> None:
    assert sorted(permutation(n, 0).tolist()) == list(range(n))


def test_permutation_differs_by_epoch_and_seed() -> None:
    orders = [permutation(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).mean() < 0.01  # one of a thousand is expected to stay


def test_every_entry_of_a_permutation_reaches_every_place() -> None:
    places = np.array([permutation(10, epoch) for epoch in range(5000)])
    counts = np.stack([(places == value).sum(0) for value in range(10)])
    assert stats.chisquare(counts.ravel()).pvalue > 0.01


def test_permutation_and_keys_are_pinned_across_versions() -> None:
    assert permutation(1000, 42, 3, Stream.ORDER)[:8].tolist() == [
        345,
        190,
        22,
        283,
        917,
        438,
        506,
        469,
    ]
    assert permutation(10, 0).tolist() == [1, 4, 5, 7, 6, 9, 0, 3, 2, 8]
    assert int(keys(42, 3, Stream.CROP, 7, 1)) == 2660305042152457452


def test_stream_values_are_unique_and_never_change() -> None:
    values = {name: int(stream) for name, stream in Stream.__members__.items()}
    assert len(set(values.values())) == len(values)
    released = ["ORDER", "CROP", "FLIP", "AFFINE", "JITTER", "GREY", "BLUR", "SOLARISE", "SPLIT"]
    released += ["STEP", "DIGITS"]
    assert [values[name] for name in released] == list(range(11))
