"""Encoding a batch in chunks: the activations of one chunk at a time, the gradient of the whole batch.

Symbols: N rows, C channels, S side of a view, E feature width, D projection width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def encode_in_chunks(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    chunk: int | None,
    module: nn.Module,
) -> tuple[Tensor, Tensor]:
    """Runs ``encode`` on ``chunk`` rows at a time; backward runs all chunks but the last once more.

    Without batch norm the result and the gradient are those of one call on all rows. Batch norm in
    training mode takes its statistics over one chunk, and its running statistics move once for each
    chunk, in forward only. Random numbers (dropout) are the same in both runs of a chunk. What is random
    about the images themselves must be drawn before.

    Args:
        encode: maps rows (n, ...) to features (n, E) and projections (n, D).
        x: (N, ...), e.g. (N, C, S, S).
        chunk: rows at a time; None or at least N is one call on all rows.
        module: holds the batch-norm layers that ``encode`` uses.

    Returns:
        Features (N, E) and projections (N, D).
    """
    if chunk is None or chunk >= len(x):
        return encode(x)
    *early, last = x.split(chunk)
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_statistics(norms)

    parts = [
        checkpoint(encode, part, use_reentrant=False, context_fn=contexts)
        if torch.is_grad_enabled()
        else encode(part)
        for part in early
    ]
    parts.append(encode(last))  # backward starts here: its activations are needed at once
    features, projections = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(projections)


@contextmanager
def _frozen_statistics(norms: list[_NormBase]) -> Iterator[None]:
    """Leaves running statistics alone although batches pass in training mode."""
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum = 0.0
        if m.num_batches_tracked is not None:
            m.num_batches_tracked = m.num_batches_tracked.clone()
    try:
        yield
    finally:
        for m, (momentum, tracked) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, tracked
