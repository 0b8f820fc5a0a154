"""Nearest neighbours among the features of all ranks, and their votes.

Symbols: M bank images, Q query images, E feature width, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_pl.distributed import gather_rows, gather_uneven_rows, is_distributed, world_size


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Weighted k-nearest-neighbour classes of all ranks' queries by all ranks' banks.

    A neighbour with cosine similarity s votes for its class with weight exp(s / temperature) (Wu et
    al. 2018, arXiv:1805.01978, section 3.4). Exact: the queries travel to every rank, each finds the
    nearest of its own bank rows, and the partial lists are merged.

    Args:
        bank: (M, E) features of this rank, in any scale; ranks may differ in M.
        bank_labels: (M,) int64 in [0, K).
        query: (Q, E) features of this rank.
        num_classes: K.
        k: neighbours; all ranks' bank where that is smaller.
        temperature: of the votes, > 0.
        chunk: queries compared at a time; memory is chunk * M numbers.

    Returns:
        (sum of Q over ranks,) int64 predicted classes, in rank order.
    """
    with torch.autocast(query.device.type, enabled=False):
        bank = F.normalize(bank.float(), dim=1)
        query = F.normalize(gather_uneven_rows(query.float()), dim=1)
        classes = [
            _vote(*_nearest(bank, bank_labels, part, k), num_classes, temperature)
            for part in query.split(chunk)
        ]
    return torch.cat(classes) if classes else query.new_empty(0, dtype=torch.int64)


def _nearest(bank: Tensor, labels: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and labels (Q, <= k) of the nearest rows of all ranks' banks."""
    similarity, position = (query @ bank.T).topk(min(k, len(bank)), dim=1)
    nearest = labels[position]
    if not is_distributed():
        return similarity, nearest
    short = k - similarity.shape[1]  # a bank smaller than k is filled up with votes of weight 0
    similarity = F.pad(similarity, (0, short), value=-torch.inf)
    nearest = F.pad(nearest, (0, short))
    shape = (world_size(), len(query), k)
    similarity = gather_rows(similarity).view(shape).transpose(0, 1).flatten(1)  # (Q, W*k)
    nearest = gather_rows(nearest).view(shape).transpose(0, 1).flatten(1)
    similarity, position = similarity.topk(k, dim=1)
    return similarity, nearest.gather(1, position)


def _vote(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    # Relative to the best neighbour, so that no weight overflows at a low temperature.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros(len(labels), num_classes, device=labels.device)
    return votes.scatter_add_(1, labels, weights).argmax(1)
