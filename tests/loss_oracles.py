"""The loss from whole matrices in float64, by autograd, and what compares it with ours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_pl.loss_anchors import Denominator
from simclr_pl.losses import Statistics

DENOMINATORS = ("all", "negatives", "both_negatives")


def brute_force(
    z: Tensor,
    ids: Tensor,
    temperature: float,
    denominator: Denominator = "all",
    similarity: str = "cosine",
    normalise: bool = True,
) -> Tensor:
    """Row by row and term by term: z (V, B, D), ids (V, B)."""
    rows = [row / row.norm() if normalise else row for row in z.flatten(0, 1)]
    names = ids.flatten().tolist()

    def exponent(i: int, j: int) -> Tensor:
        if similarity == "cosine":
            return rows[i] @ rows[j] / temperature
        return -(rows[i] - rows[j]).square().sum() / temperature

    losses = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        positives = [j for j in others if names[j] == names[i]]
        negatives = [j for j in others if names[j] != names[i]]
        summed = others if denominator == "all" else negatives
        if not positives or not summed:
            continue
        terms = []
        for p in positives:
            ends = (i, p) if denominator == "both_negatives" else (i,)
            below = torch.stack([exponent(end, j) for end in ends for j in summed]).exp().sum()
            terms.append(below.log() - exponent(i, p))
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


def all_pairs(
    z: Tensor,
    ids: Tensor | None,
    temperature: float | Tensor,
    similarity: str = "cosine",
    normalise: bool = True,
) -> tuple[Tensor, ...]:
    """Exponents and the masks of positives and of self, (N, N) each."""
    rows = z.double().flatten(0, 1)
    if normalise:
        rows = F.normalize(rows, dim=1)
    names = torch.arange(z.shape[1]).repeat(len(z)) if ids is None else ids.flatten()
    itself = torch.eye(len(rows), dtype=torch.bool)
    positive = (names[:, None] == names) & ~itself
    if similarity == "cosine":
        return rows @ rows.T / temperature, positive, itself
    distances = torch.stack([(row - rows).square().sum(1) for row in rows])
    return -distances / temperature, positive, itself


def dense(
    z: Tensor,
    ids: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    denominator: Denominator = "all",
    **variant: Any,
) -> Tensor:
    """From the whole matrix, by logarithms: z (V, B, D), ids (V, B)."""
    s, positive, itself = all_pairs(z, ids, temperature, **variant)
    summed = ~itself if denominator == "all" else ~itself & ~positive
    anchors = positive.any(1) & summed.any(1)
    s, positive, summed = s[anchors], positive[anchors], summed[anchors]
    lse = s.masked_fill(~summed, -torch.inf).logsumexp(1)  # (anchors,)
    terms = lse[:, None] - s
    if denominator == "both_negatives":
        partners = torch.zeros(len(anchors), dtype=s.dtype).index_put((anchors,), lse)
        terms = torch.logaddexp(lse[:, None], partners) - s
    return (torch.where(positive, terms, 0).sum(1) / positive.sum(1)).mean()


def dense_statistics(
    z: Tensor, ids: Tensor | None, temperature: float, **variant: Any
) -> Statistics:
    s, positive, itself = all_pairs(z, ids, temperature, **variant)
    anchors = positive.any(1)
    nearest = s.masked_fill(itself, -torch.inf).argmax(1, keepdim=True)
    entropy = torch.distributions.Categorical(
        logits=s.masked_fill(itself, torch.finfo(s.dtype).min)
    ).entropy()
    return Statistics(
        positive.gather(1, nearest)[anchors].double().mean(),
        temperature * s[positive].mean(),
        temperature * s[~positive & ~itself].mean(),
        entropy[anchors].mean(),
    )


def value_and_gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def assert_equal_to(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float) -> None:
    """The norm of the difference is at most ``rtol`` of the norm, or 1e-12."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= rtol * theirs.norm() + 1e-12


def float64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def random_ids(n_views: int, n_images: int) -> Tensor:
    """About three rows to an id; of many rows, some have no positive."""
    n = n_views * n_images
    return torch.randint(0, max(1, n // 3), (n_views, n_images))


def label_ids(n_views: int, n_images: int) -> Tensor:
    return torch.randint(0, 10, (n_images,)).repeat(n_views, 1)


class OperationCounter(TorchDispatchMode):
    """Counts the operations dispatched inside, of a namespace or of one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += self.name in (func.namespace, func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
