"""Views of tokens: functions of their key, cut and padded as promised."""

import math

import numpy as np
import pytest
import torch

from simclr_pl import InputError, TextAugment
from simclr_pl.augmentation import Rows
from simclr_pl.keyed_random import Stream


def documents(*lengths: int) -> list[np.ndarray]:
    """Tokens that tell where they stand: 100 in document 1, 101, ..., 200 in document 2, ..."""
    return [np.arange(n, dtype=np.int32) + 100 * (i + 1) for i, n in enumerate(lengths)]


def rows_of(index: list[int], view: list[int], epoch: int = 3) -> Rows:
    return Rows(5, epoch, np.array(index), np.array(view))


def contents(table: dict[str, np.ndarray]) -> list[list[int]]:
    return [[token - 1 for token in row if token] for row in table["tokens"].tolist()]


def test_the_clean_view_is_the_first_tokens_with_padding_to_a_multiple_of_16() -> None:
    augment = TextAugment(1000, max_length=40)
    samples = documents(3, 17, 60)
    table = augment.prepare(samples, None)
    assert table["tokens"].shape == (3, 40)
    assert contents(table) == [s[:40].tolist() for s in samples]
    views = augment.finish({"tokens": torch.from_numpy(table["tokens"])})
    assert views.dtype == torch.int64
    assert augment.prepare(samples[:1], None)["tokens"].shape == (1, 16)
    assert augment.prepare(samples[:2], None)["tokens"].shape == (2, 32)
    assert table["tokens"][0].tolist() == [101, 102, 103] + [0] * 37


def test_crops_and_deletions_are_those_of_a_slow_oracle() -> None:
    augment = TextAugment(1000, (0.3, 0.9), 0.4, 24)
    lengths = (1, 2, 9, 23, 60, 90)
    rows = rows_of([7, 1, 0, 3, 12, 5], [0, 1, 0, 1, 0, 1])
    samples = documents(*lengths)
    found = contents(augment.prepare(samples, rows))
    place, chance = (rows.uniforms(s, 24) for s in (Stream.TEXT_CROP, Stream.TEXT_DELETION))
    for i, tokens in enumerate(samples):
        count = min(24, math.ceil((0.3 + 0.6 * place[i, 0]) * len(tokens)))
        start = int(place[i, 1] * (len(tokens) - count + 1))
        crop = tokens[start : start + count].tolist()
        left = [token for token, u in zip(crop, chance[i], strict=False) if u >= 0.4]
        assert found[i] == (left or crop[:1])
    assert max(map(len, found)) <= 24


def test_a_view_depends_on_its_key_alone() -> None:
    augment = TextAugment(1000, max_length=32)
    samples = documents(50, 8, 31, 90)
    index, view = [4, 9, 2, 6], [0, 1, 1, 0]
    whole = contents(augment.prepare(samples, rows_of(index, view)))
    for order in ([2, 0], [3, 1, 2, 0], [1]):
        part = rows_of([index[i] for i in order], [view[i] for i in order])
        assert contents(augment.prepare([samples[i] for i in order], part)) == [
            whole[i] for i in order
        ]
    other = contents(augment.prepare(samples, rows_of(index, [1, 0, 0, 1])))
    later = contents(augment.prepare(samples, rows_of(index, view, epoch=4)))
    assert all(a != b for a, b in zip(whole, other, strict=True))
    assert whole != later


def test_without_crop_and_deletion_both_views_are_the_clean_one() -> None:
    augment = TextAugment(1000, (1.0, 1.0), 0.0, 20)
    samples = documents(50, 8)
    views = [augment.prepare(samples, rows_of([0, 1], [v, v]))["tokens"] for v in (0, 1)]
    clean = augment.prepare(samples, None)["tokens"]
    assert np.array_equal(views[0], clean)
    assert np.array_equal(views[1], clean)


def test_deletion_alone_leaves_the_start_where_it_is() -> None:
    augment = TextAugment(1000, (1.0, 1.0), 0.3, 20)
    (view,) = contents(augment.prepare(documents(90), rows_of([0], [1])))
    assert 0 < len(view) < 20
    assert max(view) < 120  # of the first 20 tokens


def test_raw_is_the_logarithm_of_counts_without_padding() -> None:
    augment = TextAugment(5)
    views = torch.tensor([[1, 1, 5, 0], [2, 0, 0, 0]])
    counts = torch.tensor([[2.0, 0, 0, 0, 1], [0, 1, 0, 0, 0]])
    assert torch.equal(augment.raw(views), counts.log1p())
    assert augment.pictures(views) is None
    assert augment.picture_of(documents(4)[0]) is None


def test_a_token_beyond_the_vocabulary_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"`vocab_size` must be .* got 102 where there is a token 102"
    ):
        TextAugment(102).prepare(documents(3), None)
    assert TextAugment(103).prepare(documents(3), None)["tokens"].max() == 103


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": (0.0, 0.5)}, "`crop` must be"),
        ({"crop": (0.6, 0.5)}, "`crop` must be"),
        ({"deletion": 1.0}, "`deletion` must be"),
        ({"max_length": 0}, "`max_length` must be"),
        ({"vocab_size": 0}, "`vocab_size` must be"),
    ],
)
def test_numbers_out_of_range_are_errors(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextAugment(**options)
