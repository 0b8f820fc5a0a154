"""The nearest rows of a bank, found on the CPU by rough products and a few exact ones.

Only the k largest similarities of a query count, and one that is known within e cannot be among them if
it lies more than e under the k-th largest so far. So the products are taken of rows rounded to 8 bits,
which processors multiply four times as fast as float32; one comparison drops nearly all, and the few
that pass are computed again in float32. Both sides are centred first: the features of an untrained
encoder point almost the same way, and then only their differences are rounded.

With b = m + b', q = m + q' and rounded rows b^, q^, Cauchy bounds what the rough similarity is off by:
q.b = q'.b' + q.m + b'.m and |q'.b' - q^.b^| <= |q' - q^| |b^| + |q'| |b' - b^|.

Symbols: M bank rows, Q queries, E feature width, m the centre.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_pl.cpu import compiled
from simclr_pl.neighbours import unit_rows

_BLOCK = 64  # similarities that one branch decides on
_SLACK = 2e-6  # of a similarity: more than float32 sums over unit rows are off by
_CENTRE_ROWS = 1024
_NONE = -2.0  # below every similarity, and finite: the quick loops must meet no infinity
_NEVER = -1e30


def multiplies_bytes() -> bool:
    """Whether this processor multiplies int8 quickly and, unlike older ones, without saturation."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and has_vnni is not None and bool(has_vnni())


def nearest_rows(
    bank: Tensor, query: Tensor, k: int, chunk: int, bank_chunk: int, in_bytes: bool
) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of each query, the most similar first.

    Args:
        bank: (M, E) on the CPU, any float dtype and scale.
        query: (Q, E) likewise.
        k: <= M.
        chunk: queries at a time, shared by torch's threads.
        bank_chunk: bank rows at a time.
        in_bytes: see `multiplies_bytes`; otherwise the rough products are of float32.

    Returns:
        Cosine similarities (Q, k) float32 and rows of the bank (Q, k) int64. Of equal similarities the
        first rows are taken. Rows with NaN are nobody's neighbours: the similarity is -inf.
    """
    similarity = torch.full((len(query), k), _NONE)
    row = torch.zeros(len(query), k, dtype=torch.int64)
    if not similarity.numel():
        return similarity, row
    sample = bank[:: max(1, len(bank) // _CENTRE_ROWS)]
    centre = unit_rows(sample).nan_to_num_().mean(0)  # (E,)
    with _threads_of_one() as threads, ThreadPoolExecutor(threads) as pool:
        size = max(1, chunk // threads)
        pieces = (part.split(size) for part in (query, similarity, row))
        asked = list(pool.map(partial(_ask, centre, in_bytes), *pieces))
        for first in range(0, len(bank), bank_chunk):
            rows = unit_rows(bank[first : first + bank_chunk])
            offered = _rough(rows, centre, False, in_bytes)
            list(pool.map(partial(_look, rows, offered, first), asked))
        list(pool.map(_sort, *zip(*((one.similarity, one.place) for one in asked), strict=True)))
    return similarity.masked_fill_(similarity == _NONE, -torch.inf), row


@contextmanager
def _threads_of_one() -> Iterator[int]:
    """How many threads torch uses; meanwhile it uses one in this thread and in new ones.

    The threads that torch spreads one product over wait for each other, and by spinning: with another
    process on the same cores a search took ten times as long as on one thread. Threads that share
    nothing wait for nobody.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class _Rough(NamedTuple):
    """Centred rows, rounded.

    Attributes:
        values: (n, E) int8, or float32 and not rounded.
        scale: (n,) of the values.
        error: (n,) length of what rounding took away.
        length: (n,) of the rounded rows or of the centred ones, whichever is longer.
        shift: (n,) the part of the similarity that centring took away.
    """

    values: Tensor
    scale: Tensor
    error: Tensor
    length: Tensor
    shift: Tensor


def _rough(rows: Tensor, centre: Tensor, is_query: bool, in_bytes: bool) -> _Rough:
    centred = rows - centre
    shift = ((rows if is_query else centred) @ centre).nan_to_num(_NEVER)
    centred = centred.nan_to_num_()
    length = centred.norm(dim=1)
    if not in_bytes:
        return _Rough(centred, torch.ones_like(length), torch.zeros_like(length), length, shift)
    scale = centred.abs().amax(1).clamp(min=1e-30) / 127
    values = (centred / scale[:, None]).round_()
    error = values.mul(scale[:, None]).sub_(centred).norm(dim=1)
    return _Rough(values.to(torch.int8), scale, error, length + error, shift)


class _Asked(NamedTuple):
    """Some of the queries, and what was found for them so far.

    Attributes:
        rows: (q, E) any dtype and scale.
        rough: the same.
        similarity: (q, k) float32; each row is a heap, the least similar neighbour at 0.
        place: (q, k) int64, the neighbours' rows in the bank.
    """

    rows: Tensor
    rough: _Rough
    similarity: np.ndarray
    place: np.ndarray


def _ask(centre: Tensor, in_bytes: bool, rows: Tensor, similarity: Tensor, place: Tensor) -> _Asked:
    rough = _rough(unit_rows(rows), centre, True, in_bytes)
    return _Asked(rows, rough, similarity.numpy(), place.numpy())


def _look(bank: Tensor, offered: _Rough, first: int, asked: _Asked) -> None:
    """Takes what is nearer among the bank rows from ``first`` on than what was found so far."""
    rough = asked.rough
    product, limits = _product(rough, offered), _limits(rough, offered)
    exact = unit_rows(asked.rows)
    tensors = (product, rough.scale, limits, offered.scale, offered.shift, exact, bank)
    _keep_best(*(tensor.numpy() for tensor in tensors), asked.similarity, asked.place, first)


def _product(query: _Rough, bank: _Rough) -> Tensor:
    """(q, c) of the rounded values, without their scales; exact in int32."""
    if bank.values.dtype == torch.int8:
        return torch._int_mm(query.values, bank.values.t())  # type: ignore[no-any-return]
    return query.values @ bank.values.t()


def _limits(query: _Rough, bank: _Rough) -> Tensor:
    """(q,) what is at most to be added to the product and the bank's shift for the similarity."""
    margin = query.error * bank.length.max() + query.length * bank.error.max() + _SLACK
    return query.shift + margin


# Sums may be taken in any order, which lets the loops be vectorised; NaN still compares as NaN.
_compiled = compiled(fastmath={"reassoc", "contract"})


@_compiled
def _keep_best(
    product: Any,
    query_scale: Any,
    limits: Any,
    bank_scale: Any,
    bank_shift: Any,
    query: Any,
    bank: Any,
    similarity: Any,
    place: Any,
    first: int,
) -> None:
    for i in range(len(query)):
        kept, places, scale = similarity[i], place[i], query_scale[i]
        least = kept[0] - limits[i]
        for left in range(0, len(bank), _BLOCK):
            right = min(left + _BLOCK, len(bank))
            products = product[i, left:right]
            scales, shifts = bank_scale[left:right], bank_shift[left:right]
            if not _excess(products, scale, scales, shifts, least) > 0:
                continue
            for j in range(len(products)):
                if products[j] * (scales[j] * scale) + shifts[j] > least:
                    exact = _dot(query[i], bank[left + j])
                    if exact > kept[0]:
                        kept[0], places[0] = exact, first + left + j
                        _sink(kept, places, len(kept))
                        least = kept[0] - limits[i]


@compiled(fastmath={"reassoc", "contract", "nnan", "nsz"})
def _excess(products: Any, scale: Any, scales: Any, shifts: Any, least: Any) -> Any:
    """Positive if any similarity may exceed ``least``; unlike a maximum, a sum is vectorised."""
    total = np.float32(0)
    for j in range(len(products)):
        over = np.float32(products[j]) * (scales[j] * scale) + shifts[j] - least
        total += max(over, np.float32(0))
    return total


@_compiled
def _dot(x: Any, y: Any) -> Any:
    total = np.float32(0)
    for e in range(len(x)):
        total += x[e] * y[e]
    return total


@_compiled
def _sink(kept: Any, places: Any, size: int) -> None:
    """Brings the first entry of a heap of ``size`` to its place; of equals the last row is least."""
    parent, value, place = 0, kept[0], places[0]
    while 2 * parent + 1 < size:
        child = 2 * parent + 1
        other = child + 1
        if other < size and _is_less(kept[other], places[other], kept[child], places[child]):
            child = other
        if not _is_less(kept[child], places[child], value, place):
            break
        kept[parent], places[parent] = kept[child], places[child]
        parent = child
    kept[parent], places[parent] = value, place


@_compiled
def _is_less(a: Any, place_of_a: Any, b: Any, place_of_b: Any) -> Any:
    return a < b or (a == b and place_of_a > place_of_b)


@_compiled
def _sort(similarity: Any, place: Any) -> None:
    """Turns heaps into lists, the most similar first."""
    for i in range(len(similarity)):
        kept, places = similarity[i], place[i]
        for size in range(len(kept) - 1, 0, -1):
            kept[0], kept[size] = kept[size], kept[0]
            places[0], places[size] = places[size], places[0]
            _sink(kept, places, size)
