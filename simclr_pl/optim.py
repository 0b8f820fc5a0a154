"""LARS, parameter groups, the learning rate's scaling with the batch, and its schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from simclr_pl.errors import InputError

LRScaling = Literal["linear", "sqrt", "none"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, as in the authors' `lars_optimizer.py`.

    For each tensor w with gradient g, momentum buffer v and this step's learning rate:

        g <- g + weight_decay * w
        ratio = trust_coefficient * |w| / |g|, or 1 where either norm is 0
        v <- momentum * v + lr * ratio * g
        w <- w - v

    The buffer includes the learning rate (the authors' "classic momentum"); You et al. (2017,
    arXiv:1708.03888) write the same. Groups with ``adapt=False`` use ratio 1. The norms are those of
    whole tensors, also where each rank has but a part of each (torch's `fully_shard`).

    Args:
        params: parameters or groups; `parameter_groups` makes the groups of the paper.
        lr: learning rate, before scaling with the batch; the paper's 0.3 is for a batch of 256.
        momentum: of the buffer v.
        weight_decay: added to the gradient before the norms are taken. The paper's text has 1e-6, the
            authors' later commands (SimCLRv2) 1e-4; this default is the paper's.
        trust_coefficient: the authors' `eeta`.
        nesterov: step by ``momentum * v + lr * ratio * g`` instead of v.
        foreach: one kernel for all tensors of a group instead of one for each.

    Raises:
        InputError: a negative learning rate, momentum or weight decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        foreach: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise InputError(f"LARS's `{name}` must be >= 0; got {value}. Give a value >= 0.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
            "foreach": foreach,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Does one update; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if group["foreach"]:
                self._update(group, params)
            else:
                for p in params:
                    self._update(group, [p])
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        mesh = params[0].device_mesh if isinstance(params[0], DTensor) else None
        buffers = _parts(self.state[p]["momentum_buffer"] for p in params)
        grads = _parts(p.grad for p in params if p.grad is not None)
        params = _parts(params)
        steps = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["adapt"]:
            norms = torch.stack(torch._foreach_norm([*params, *steps]))  # type: ignore[arg-type]
            if mesh is not None:
                norms = norms.square()
                dist.all_reduce(norms, group=mesh.get_group())
                norms = norms.sqrt()
            w_norm, g_norm = norms.view(2, -1)
            usable = (w_norm > 0) & (g_norm > 0)
            ratio = group["trust_coefficient"] * w_norm / g_norm
            ratio = torch.where(usable, ratio, torch.ones_like(ratio)) * group["lr"]
            torch._foreach_mul_(steps, list(ratio.unbind()))  # no host sync
        else:
            torch._foreach_mul_(steps, group["lr"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        torch._foreach_sub_(params, buffers if not group["nesterov"] else steps)
        if group["nesterov"]:
            torch._foreach_sub_(params, torch._foreach_mul(buffers, group["momentum"]))


def _parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank has of each tensor: all of it, unless it is sharded."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def parameter_groups(model: nn.Module) -> tuple[list[dict[str, Any]], list[str]]:
    """Splits the trainable parameters into adapted ones and those exempt from decay and adaptation.

    Exempt are the parameters of normalisation layers, found by the module's type, and every
    parameter with at most one dimension (biases, scales, gates).

    Args:
        model: its parameters with ``requires_grad`` are taken, each once.

    Returns:
        Two groups for an optimiser, the exempt one with ``weight_decay=0`` and ``adapt=False`` (which
        only `LARS` reads), and the names of the exempt parameters.
    """
    exempt_ids = {
        id(p)
        for module in model.modules()
        if isinstance(module, _NORMS)
        for p in module.parameters(recurse=False)
    }
    adapted, exempt, names = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in exempt_ids or p.ndim <= 1:
            exempt.append(p)
            names.append(name)
        else:
            adapted.append(p)
    groups: list[dict[str, Any]] = [{"params": adapted}]
    if exempt:
        groups.append({"params": exempt, "weight_decay": 0.0, "adapt": False})
    return groups, names


def lr_factor(scaling: LRScaling, global_batch_size: int) -> float:
    """What the base learning rate is multiplied with for a global batch (paper, section 2.2, B.1).

    Args:
        scaling: "linear" batch / 256, "sqrt" sqrt(batch), "none" 1.
        global_batch_size: images of one update, over all ranks and accumulated batches.
    """
    if scaling == "linear":
        return global_batch_size / 256
    return math.sqrt(global_batch_size) if scaling == "sqrt" else 1.0


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, cycles: int = 1) -> float:
    """The learning rate at a step as a fraction of its peak: linear warm-up, cosines to 0.

    With one cycle it equals the authors' `WarmUpAndCosineDecay`: the warm-up starts at 0, and the cosine
    spans the steps after it. More cycles share these steps equally, each from the peak: the warm
    restarts of Loshchilov and Hutter (arXiv:1608.03983, equation 5, with T_mult = 1).

    Args:
        step: the update about to be made, from 0.
        warmup_steps: updates of the warm-up.
        total_steps: updates of the whole run.
        cycles: cosines, at least 1.
    """
    if step < warmup_steps:
        return step / warmup_steps
    length = max(1, total_steps - warmup_steps)  # of all cycles
    cycle, place = divmod((step - warmup_steps) * cycles, length)
    done = place / length if cycle < cycles else 1.0
    return 0.5 * (1.0 + math.cos(math.pi * done))
