"""Batch norm whose statistics are those of several ranks' rows, on any device.

Symbols: n rows on this rank, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simclr_pl.distributed import is_distributed, world_size
from simclr_pl.errors import InputError


class _Sum(torch.autograd.Function):
    """The sum over a group's ranks, and in backward the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Sum.apply(grad, ctx.group), None


class SharedBatchNorm(_BatchNorm):
    """What torch's SyncBatchNorm is on a GPU, for a CPU, where that and DDP refuse it.

    It also runs the activation that some of timm's layers have inside. Made by `share_batch_norm`.
    """

    process_group: dist.ProcessGroup | None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, C, ...) to the same shape.

        While training, mean and variance are those of the rows of all ranks of the group, and the
        gradient flows through them to all of these. Else this is common batch norm.
        """
        y = self._normalised(x) if self.training and is_distributed() else super().forward(x)
        for part in ("drop", "act"):  # as timm's
            y = getattr(self, part, nn.Identity())(y)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def _normalised(self, given: Tensor) -> Tensor:
        x = given if given.dtype == torch.float64 else given.float()
        group = self.process_group or dist.group.WORLD
        over, channels = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        n = x.new_tensor([x.numel() / x.shape[1]])  # (1,)
        sums = _Sum.apply(torch.cat([x.sum(over), n]), group)  # (C + 1,)
        mean, n = sums[:-1] / sums[-1], sums[-1].detach()  # (C,), ()
        centred = x - mean.view(channels)
        # A second collective, because E[x^2] - E[x]^2 cancels where the mean is large.
        var = _Sum.apply(centred.square().sum(over), group) / n  # (C,)
        self._track(mean.detach(), var.detach() * n / (n - 1))
        y = centred * (var + self.eps).rsqrt().view(channels)
        if self.affine:
            y = y * self.weight.view(channels) + self.bias.view(channels)
        return y.to(given.dtype)  # type: ignore[no-any-return]

    def _track(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            running.lerp_(new.to(running.dtype), step)


def share_batch_norm(model: nn.Module, ranks: int, device: torch.device) -> None:
    """Lets the batch norm layers of a model take their statistics over groups of ranks. Collective.

    Over all ranks it is the paper's "global BN" (section 2.2), and the result that of one process with
    the whole batch.

    Args:
        model: its layers are replaced; their parameters and names stay.
        ranks: of a group; the ranks [0, ranks), [ranks, 2*ranks) and so on share. One process alone
            leaves the model as it is.
        device: where the model will be.

    Raises:
        InputError: the number of ranks is no multiple of ``ranks``.
    """
    if world_size() == 1:
        return
    if world_size() % ranks:
        raise InputError(
            f"the number of ranks must be a multiple of `batch_norm_ranks`; got {world_size()} and "
            f"{ranks}. Set `model.batch_norm_ranks`."
        )
    kinds = (nn.SyncBatchNorm, SharedBatchNorm)
    if not any(isinstance(layer, kinds) for layer in model.modules()):
        # Not torch's conversion, which drops the activation that some of timm's layers have inside.
        convert_sync_batchnorm(model)
    group = None if ranks == world_size() else dist.new_subgroups(ranks)[0]
    for layer in model.modules():
        if isinstance(layer, kinds):
            layer.process_group = group
            if device.type == "cpu":
                layer.__class__ = SharedBatchNorm
