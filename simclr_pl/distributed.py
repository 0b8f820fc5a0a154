"""Rank, world size and gathers; every function also works in a single process.

Symbols: W ranks, n rows on this rank, N rows on all ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True when a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of ranks W, 1 in a single process."""
    return dist.get_world_size() if is_distributed() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows of all ranks, in rank order. Carries no gradient.

    Args:
        rows: (n, ...), the same shape and dtype on every rank.

    Returns:
        (W*n, ...); in a single process ``rows`` itself, detached.
    """
    rows = rows.detach()
    if not is_distributed():
        return rows
    everything = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(everything, rows.contiguous())
    return everything


def gather_uneven_rows(rows: Tensor) -> Tensor:
    """`gather_rows` for ranks that hold different numbers of rows.

    Args:
        rows: (n, ...), where n may differ between ranks, also 0.

    Returns:
        (N, ...) with N the sum of all n, in rank order.
    """
    if not is_distributed():
        return rows.detach()
    counts = gather_rows(torch.tensor([rows.shape[0]], device=rows.device)).tolist()
    longest = max(counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    everything = gather_rows(padded).reshape(world_size(), longest, *rows.shape[1:])
    return torch.cat([part[:n] for part, n in zip(everything, counts, strict=True)])


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sums ``value`` over the ranks, in place, and returns it."""
    if is_distributed():
        dist.all_reduce(value)
    return value
