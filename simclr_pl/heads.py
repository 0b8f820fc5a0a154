"""Linear classifiers that are trained step by step, many at once.

Symbols: n rows on this rank, E feature width, H hidden width, K classes, G heads, P parameters of a head.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from simclr_pl.distributed import all_reduce_sum

_STATISTICS_RATE = 0.1  # weight of the newest step in the running mean and variance
_AVERAGE_DECAY = 0.98  # weight of the past in the averaged heads
_SMALL_VARIANCE = 1e-3  # of the mean variance: what nearly never moves is not blown up


class LinearHeads:
    """G classifiers trained at once on the same features, one for each learning rate and weight decay.

    All start from the same weights, are float32, and are the same on all ranks: the gradient of a head is
    that of its mean cross-entropy over the labelled rows of all ranks, and its step SGD's with momentum.

    Args:
        num_features: E.
        num_classes: K.
        lr: G learning rates.
        weight_decay: G weight decays, of all parameters, as `torch.optim.SGD`'s.
        momentum: of the steps.
        hidden_features: H, the width of a hidden layer with ReLU; by default none.
        online: for features that change while the heads learn. The input is standardised by a running
            mean and variance of earlier steps, and `logits` answers with a running average of the
            weights; both make the result depend less on the learning rate. The first step only measures.
        device: where the heads live.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        lr: Sequence[float],
        weight_decay: Sequence[float],
        momentum: float = 0.9,
        hidden_features: int | None = None,
        online: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        start, self._shapes = _initial(num_features, num_classes, hidden_features)  # (P,)
        self._start = start.to(device)
        self.lr = torch.tensor(lr, dtype=torch.float32, device=device)  # (G,)
        self.weight_decay = torch.tensor(weight_decay, dtype=torch.float32, device=device)  # (G,)
        self.momentum = momentum
        self.online = online
        self.weights = self._start.repeat(len(lr), 1)  # (G, P)
        self._velocity = torch.zeros_like(self.weights)
        self._average = self.weights.clone() if online else self.weights
        self._mean = torch.zeros(num_features, device=device)
        self._variance = torch.ones(num_features, device=device)
        self._steps = torch.zeros((), device=device)

    def reset(self) -> None:
        """Back to the start."""
        self.weights.copy_(self._start.expand_as(self.weights))
        self._average.copy_(self.weights)
        self._variance.fill_(1)
        for tensor in (self._velocity, self._mean, self._steps):
            tensor.zero_()

    def parts(self, head: int) -> list[Tensor]:
        """The parameters of one head, in the order of an `nn.Sequential` of `nn.Linear`."""
        return [part[head] for part in self._split(self.weights)]

    def logits(self, features: Tensor) -> Tensor:
        """Every head's answers.

        Args:
            features: (n, E), of any precision.

        Returns:
            (G, n, K) float32.
        """
        with torch.autocast(features.device.type, enabled=False):
            x = self._standardised(features.detach().float())
            return self._forward(x, self._average)[-1].mT

    def update(self, features: Tensor, label: Tensor, lr_factor: float = 1.0) -> Tensor:
        """One step of every head. Collective: one sum over the ranks.

        A head whose gradient is not finite on some rank stays as it is, on all ranks, and without labels
        all do. The device is not waited for.

        Args:
            features: (n, E) of this rank; ranks may differ in n, also 0.
            label: (n,) int64 in [0, K); -1 where there is none.
            lr_factor: multiplies the learning rates in this step.

        Returns:
            (G, 3): summed cross-entropy, hits and labelled rows of all ranks, before the step; of the
            weights themselves, not their average.
        """
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            x = self._standardised(features.detach().float())  # (n, E)
            layers = self._forward(x, self.weights)
            loss, hits, slope = _cross_entropy(layers[-1], label)
            gradient = self._backward(x, layers, slope)
            local = torch.cat([gradient, loss[:, None], hits[:, None]], 1)  # (G, P + 2)
            count = torch.stack([(label >= 0).sum(), label.new_full((), len(label))]).float()
            moments = [x.sum(0), x.square().sum(0)] if self.online else []
            # Any rank's NaN or infinity makes the sum non-finite on every rank.
            flat = all_reduce_sum(torch.cat([local.flatten(), count, *moments]))
            local = flat[: local.numel()].view_as(local)
            count, rest = flat[local.numel() :].split([2, len(flat) - local.numel() - 2])
            self._step(local[:, :-2] / count[0].clamp(min=1), count[0] > 0, lr_factor)
            if self.online:
                mean, square = (rest / count[1].clamp(min=1)).chunk(2)
                self._measure(mean, square, count[1] > 0)
            return torch.cat([local[:, -2:], count[0].expand(len(local), 1)], 1)

    def _step(self, gradient: Tensor, labelled: Tensor, lr_factor: float) -> None:
        """SGD with momentum where the gradient (G, P) is finite."""
        go = gradient.isfinite().all(1, keepdim=True) & labelled  # (G, 1)
        if self.online:
            go = go & (self._steps > 0)
        step = gradient + self.weight_decay[:, None] * self.weights
        # `where`, not `if`: the device is not waited for
        self._velocity.copy_(torch.where(go, self.momentum * self._velocity + step, self._velocity))
        scaled = lr_factor * self.lr[:, None] * self._velocity
        self.weights.sub_(torch.where(go, scaled, 0.0))
        if self.online:
            decay = (self._steps / (self._steps + 9)).clamp(max=_AVERAGE_DECAY)
            mixed = torch.lerp(self.weights, self._average, decay)
            self._average.copy_(torch.where(go, mixed, self._average))

    def _measure(self, mean: Tensor, square: Tensor, rows: Tensor) -> None:
        """Takes the moments (E,) of this step's standardised features into the running ones."""
        go = mean.isfinite().all() & square.isfinite().all() & rows
        scale = self._scale()
        # The first step counts in full, so that the start at 0 and 1 leaves no trace.
        rate = (1 / (self._steps + 1)).clamp(min=_STATISTICS_RATE)
        variance = (square - mean.square()).clamp(min=0) * scale.square()
        shifted = self._mean + rate * scale * mean
        mixed = self._variance.lerp(variance, rate)
        self._mean.copy_(torch.where(go, shifted, self._mean))
        self._variance.copy_(torch.where(go, mixed, self._variance))
        self._steps.add_(go)

    def _scale(self) -> Tensor:
        floor = _SMALL_VARIANCE * self._variance.mean() + 1e-12
        return (self._variance + floor).sqrt()

    def _standardised(self, x: Tensor) -> Tensor:
        return (x - self._mean) / self._scale() if self.online else x

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Weight and bias of each layer, (G, ...), out of (G, P)."""
        sizes = [shape.numel() for shape in self._shapes]
        parts = zip(flat.split(sizes, 1), self._shapes, strict=True)
        return [part.view(len(flat), *shape) for part, shape in parts]

    def _forward(self, x: Tensor, flat: Tensor) -> list[Tensor]:
        """Outputs of the layers, with a hidden one (G, H, n), and (G, K, n).

        Rows last: the first layers of all heads are one product, and the softmax runs along the rows.
        """
        weight, bias, *last = self._split(flat)
        first = torch.addmm(bias.flatten()[:, None], weight.flatten(0, 1), x.T)
        layers = [first.view(*bias.shape, len(x))]
        if last:
            layers.append(last[0] @ layers[0].relu() + last[1][..., None])
        return layers

    def _backward(self, x: Tensor, layers: list[Tensor], slope: Tensor) -> Tensor:
        """Gradient (G, P) of the parameters, from that of the logits (G, K, n).

        By hand, since validation runs in torch's inference mode, where autograd does not.
        """
        parts: list[Tensor] = []
        if len(layers) > 1:
            parts = [slope @ layers[0].relu().mT, slope.sum(2)]
            slope = (self._split(self.weights)[2].mT @ slope) * (layers[0] > 0)
        parts = [slope.flatten(0, 1) @ x, slope.sum(2), *parts]
        return torch.cat([part.reshape(len(slope), -1) for part in parts], 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors; `load_state_dict` goes on to the same bits."""
        state = {"weights": self.weights, "velocity": self._velocity}
        if self.online:
            state |= {"average": self._average, "mean": self._mean}
            state |= {"variance": self._variance, "steps": self._steps}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up a state.

        Args:
            state: of heads of the same number, width and kind.

        Raises:
            ValueError: it is of others.
        """
        ours = self.state_dict()
        shapes, theirs = ({k: tuple(v.shape) for k, v in s.items()} for s in (ours, state))
        if shapes != theirs:
            raise ValueError(f"got heads of {theirs}, not of {shapes}")
        for name, tensor in ours.items():
            tensor.copy_(state[name])


def _initial(
    num_features: int, num_classes: int, hidden_features: int | None
) -> tuple[Tensor, list[torch.Size]]:
    """The start (P,) and shapes of one head, torch's own, leaving its random state alone."""
    widths = [num_features, *([hidden_features] if hidden_features else []), num_classes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
    parameters = [p.detach() for layer in layers for p in (layer.weight, layer.bias)]
    return torch.cat([p.flatten() for p in parameters]), [p.shape for p in parameters]


def _cross_entropy(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy (G,), hits (G,) and gradient (G, K, n) of logits (G, K, n)."""
    labelled = label >= 0
    target = label.clamp(min=0).expand(len(logits), 1, -1)  # (G, 1, n)
    log_p = logits.log_softmax(1)
    loss = -(log_p.gather(1, target)[:, 0] * labelled).sum(1)
    slope = log_p.exp().scatter_add_(1, target, -torch.ones_like(log_p[:, :1]))
    hits = ((logits.argmax(1) == label) & labelled).sum(1).float()
    return loss, hits, slope * labelled
