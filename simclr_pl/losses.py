"""NT-Xent, the loss of SimCLR, over the rows of all ranks.

Symbols: B images on this rank, V views, D projection width, n = V*B rows here, N = W*n rows on all
ranks, s_ij = z_i . z_j / temperature of L2-normalised rows, P(i) the positives of row i.

    L = mean over rows with a positive of ( lse_i - mean_{p in P(i)} s_ip ),
    lse_i = log sum_{j != i} exp(s_ij)

For V = 2 this is eq. 1 of Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations" (arXiv:2002.05709); with several positives it is L_out of Khosla et al., "Supervised
Contrastive Learning" (arXiv:2004.11362, eq. 2).
"""

from typing import Any

import torch
from torch import Tensor, nn

from simclr_pl.distributed import gather_rows, rank, world_size
from simclr_pl.errors import InputError


class _NTXent(torch.autograd.Function):
    """The loss of all N rows and the exact gradient of this rank's n rows.

    A row acts as anchor and as candidate of other anchors. With the other ranks' rows and their
    log-sum-exps at hand both parts of its gradient are local sums, so backward needs no collective.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, temperature: float) -> Tensor:
        n, first = rows.shape[0], rank() * rows.shape[0]
        everything, all_ids = gather_rows(rows), gather_rows(ids)  # (N, D), (N,)
        own = torch.arange(n, device=rows.device)
        positive = ids[:, None] == all_ids[None, :]  # (n, N)
        positive[own, first + own] = False
        positive = positive.to(rows.dtype)
        count = positive.sum(1)  # (n,)
        share = positive / count.clamp(min=1)[:, None]  # (n, N), rows sum to 1 or 0
        s = rows @ everything.T / temperature  # (n, N)
        pull = (share * s).sum(1)  # (n,) mean similarity of the positives
        s[own, first + own] = -torch.inf
        lse = s.logsumexp(1)  # (n,)
        anchor = (count > 0).to(rows.dtype)
        table = gather_rows(torch.stack([lse, anchor, anchor * (lse - pull)], 1))  # (N, 3)
        all_lse, all_anchor, all_loss = table.unbind(1)
        anchors = all_anchor.sum().clamp(min=1)
        if ctx.needs_input_grad[0]:
            as_anchor = anchor[:, None] * (torch.exp(s - lse[:, None]) - share)
            all_count = gather_rows(count).clamp(min=1)
            as_candidate = all_anchor * (torch.exp(s - all_lse) - positive / all_count)
            gradient = (as_anchor + as_candidate) @ everything / (anchors * temperature)
            # DistributedDataParallel averages over ranks; the loss is one mean over all of them.
            ctx.save_for_backward(gradient * world_size())
        return all_loss.sum() / anchors

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None


def nt_xent(z: Tensor, ids: Tensor | None = None, temperature: float = 0.5) -> Tensor:
    """NT-Xent loss over the rows of all ranks.

    Args:
        z: (V, B, D) projections of this rank, any float dtype; they are L2-normalised here, in
            float32 (float64 stays float64) also under autocast. V and B are the same on every rank.
        ids: (V, B) int64; rows with equal ids, on any rank, are positives of each other. By default the
            views of one image are.
        temperature: divides the similarities, > 0.

    Returns:
        Scalar, the mean over all ranks' rows, equal on every rank. Its gradient in ``z`` is W times
        this rank's part of the global gradient, so that the average over ranks that
        DistributedDataParallel takes is the global gradient. Backward calls no collective.

    Raises:
        InputError: ``z`` is not 3-D or has one row, ``ids`` has another shape, or temperature <= 0.
    """
    _check(z, ids, temperature)
    n_views, n_images, width = z.shape
    with torch.autocast(z.device.type, enabled=False):
        dtype = torch.promote_types(z.dtype, torch.float32)
        rows = nn.functional.normalize(z.reshape(-1, width).to(dtype), dim=1)  # (n, D)
        if ids is None:
            first = rank() * n_images
            ids = torch.arange(first, first + n_images, device=z.device).repeat(n_views)
        return _NTXent.apply(rows, ids.reshape(-1), temperature)  # type: ignore[no-any-return]


def _check(z: Tensor, ids: Tensor | None, temperature: float) -> None:
    if not temperature > 0:
        raise InputError(
            f"`temperature` must be > 0; got {temperature}. Set `model.temperature`, e.g. 0.5."
        )
    if z.dim() != 3:
        raise InputError(
            f"`z` must be (V, B, D), views by images by width; got {tuple(z.shape)}. "
            "Reshape the projections with `z.view(V, B, -1)`."
        )
    if world_size() * z.shape[0] * z.shape[1] < 2:
        raise InputError(
            f"NT-Xent needs at least 2 rows; got {tuple(z.shape)}. Use a larger batch or more views."
        )
    if ids is not None and ids.shape != z.shape[:2]:
        raise InputError(
            f"`ids` must be (V, B) = {tuple(z.shape[:2])}; got {tuple(ids.shape)}. "
            "Give one id for each row of `z`."
        )


class NTXentLoss(nn.Module):
    """NT-Xent loss as a module; see `nt_xent`.

    Args:
        temperature: divides the cosine similarities, > 0. The authors' commands use 0.5 for CIFAR-10
            and 0.1 for ImageNet (README of google-research/simclr).
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        _check(torch.empty(2, 1, 1), None, temperature)
        self.temperature = temperature

    def forward(self, z: Tensor, ids: Tensor | None = None) -> Tensor:
        """Returns the scalar loss of ``z`` (V, B, D) with optional ``ids`` (V, B)."""
        return nt_xent(z, ids, self.temperature)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"temperature={self.temperature}"
