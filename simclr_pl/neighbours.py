"""Nearest neighbours among the features of all ranks, and their votes.

Symbols: M bank images of this rank, Q query images, E feature width, K classes, W ranks, k neighbours
asked for, k' neighbours there are: the smaller of k and the bank images of all ranks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_pl.distributed import (
    all_reduce_sum,
    gather_rows,
    gather_uneven_rows,
    is_distributed,
    world_size,
)

BANK_CHUNK = 1024  # bank rows compared at a time
_LEAST_EXPONENT = -80.0  # exp of it is still a normal float32


class Neighbours(NamedTuple):
    """The nearest bank images of all ranks for the queries of all ranks, the nearest first.

    Attributes:
        similarity: (sum of Q, k') float32 cosines; -inf where features are NaN.
        payload: (sum of Q, k') int64, what the bank's owner gave for the image.
    """

    similarity: Tensor
    payload: Tensor


def find_neighbours(
    bank: Tensor, payload: Tensor, query: Tensor, k: int, chunk: int = 1024
) -> Neighbours:
    """The k nearest bank images of each query by cosine similarity; collective and exact.

    The queries travel to every rank, each finds the nearest of its own bank rows, and the lists are
    merged. Features may have any scale and any float dtype; products are float32. At most ``chunk`` *
    1024 similarities are held at a time; beside them the queries of all ranks, in their own dtype and in
    8 bits. So give large banks and queries in half precision, see `normalised_half`.

    Args:
        bank: (M, E) features of this rank; ranks may differ in M.
        payload: (M,) int64, such as labels or indices of the images.
        query: (Q, E) features of this rank; ranks may differ in Q.
        k: neighbours, >= 1; all ranks' bank where that is smaller.
        chunk: queries compared at a time.

    Returns:
        The same on every rank, the queries in rank order.
    """
    total = int(all_reduce_sum(torch.tensor(len(bank), device=bank.device)))
    query = gather_uneven_rows(query)
    k = min(k, total)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        nearest = _nearest_rows_on_cpu if query.device.type == "cpu" else _nearest_rows_on_device
        similarity, row = nearest(bank, query, min(k, len(bank)), chunk)
        own = Neighbours(similarity, payload[row])
        return _merged(own, k, chunk) if is_distributed() else own


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (n, E) of any float dtype and scale as float32 of length 1; zeros stay zeros."""
    rows = rows.float()
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp(min=1e-12)


def normalised_half(features: Tensor) -> Tensor:
    """Features (n, E) of any scale as rows of length 1 in half precision, to be kept in memory."""
    return unit_rows(features.detach()).half()


def vote(neighbours: Neighbours, num_classes: int, k: int, temperature: float) -> Tensor:
    """Votes for the classes by the first k neighbours, whose payload are labels.

    A neighbour with cosine similarity s votes for its class with weight exp(s / temperature) (Wu et
    al. 2018, arXiv:1805.01978, section 3.4), here relative to that of the nearest one, so that no
    temperature overflows. Weights below e^-80 count as that: whoever has a vote is above 0.

    Args:
        neighbours: of Q queries, k or more of each, or all there are.
        num_classes: K.
        k: neighbours that vote.
        temperature: > 0.

    Returns:
        (Q, K) float32 >= 0; 0 for classes without a vote.
    """
    similarity, label = (part[:, :k] for part in neighbours)
    exponent = (similarity - similarity[:, :1]) / temperature  # (Q, k')
    weight = exponent.clamp(min=_LEAST_EXPONENT).exp()
    weight = torch.where(similarity > -torch.inf, weight, 0)
    scores = weight.new_zeros(len(label), num_classes)
    return scores.scatter_add_(1, label, weight)


def hits(scores: Tensor, truth: Tensor, n: int) -> Tensor:
    """Whether the true class is among the n with most votes; a class without votes never is.

    Args:
        scores: (Q, K) from `vote`.
        truth: (Q,) int64 in [0, K).
        n: classes that may be named, >= 1.

    Returns:
        (Q,) bool.
    """
    votes, named = scores.topk(min(n, scores.shape[1]), dim=1)
    return ((named == truth[:, None]) & (votes > 0)).any(1)


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """The class with most votes by `find_neighbours` and `vote`, for all ranks' queries.

    Args:
        bank: (M, E) features of this rank, in any scale; ranks may differ in M.
        bank_labels: (M,) int64 in [0, K).
        query: (Q, E) features of this rank.
        num_classes: K.
        k: neighbours; all ranks' bank where that is smaller.
        temperature: of the votes, > 0.
        chunk: queries compared at a time.

    Returns:
        (sum of Q over ranks,) int64 predicted classes, in rank order.
    """
    neighbours = find_neighbours(bank, bank_labels, query, k, chunk)
    return vote(neighbours, num_classes, k, temperature).argmax(1)


def _nearest_rows_on_cpu(bank: Tensor, query: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    from simclr_pl.neighbour_kernels import (  # numba takes a while to import
        multiplies_bytes,
        nearest_rows,
    )

    return nearest_rows(bank, query, k, chunk, BANK_CHUNK, multiplies_bytes())


def _nearest_rows_on_device(
    bank: Tensor, query: Tensor, k: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """The same by torch alone; the host does not wait for the device."""
    similarity = torch.full((len(query), k), -torch.inf, device=query.device)
    row = torch.zeros(len(query), k, dtype=torch.int64, device=query.device)
    for first in range(0, len(bank) if k else 0, BANK_CHUNK):
        rows = unit_rows(bank[first : first + BANK_CHUNK])
        parts = zip(query.split(chunk), similarity.split(chunk), row.split(chunk), strict=True)
        for asked, best, places in parts:
            s = (unit_rows(asked) @ rows.t()).nan_to_num_(-torch.inf)  # (chunk, C)
            s, place = s.topk(min(k, len(rows)), dim=1)
            s, order = torch.cat([best, s], 1).topk(k, dim=1)
            places.copy_(torch.cat([places, place + first], 1).gather(1, order))
            best.copy_(s)
    return similarity, row


def _merged(own: Neighbours, k: int, chunk: int) -> Neighbours:
    """The k nearest (sum of Q, k) of all ranks' lists; collective."""
    short = k - own.similarity.shape[1]  # a bank smaller than k is filled up with what loses
    parts = []
    for similarity, payload in zip(*(part.split(chunk) for part in own), strict=True):
        similarity = F.pad(similarity, (0, short), value=-torch.inf)
        lists = (gather_rows(part) for part in (similarity, F.pad(payload, (0, short))))
        similarity, payload = (
            part.view(world_size(), -1, k).transpose(0, 1).flatten(1) for part in lists
        )  # (chunk, W*k)
        similarity, position = similarity.topk(k, dim=1)
        parts.append((similarity, payload.gather(1, position)))
    return Neighbours(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
