"""Linear classifiers of features.

Symbols: M images to fit, Q query images, E feature width, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_predict(
    features: Tensor, labels: Tensor, query: Tensor, num_classes: int, l2: float = 1.0
) -> Tensor:
    """Classes of the queries by multinomial logistic regression on frozen features.

    The features are standardised; the weights minimise the summed cross-entropy plus
    l2 / 2 * |weights|^2 by L-BFGS, which is scikit-learn's `LogisticRegression(C=1 / l2)`.

    Args:
        features: (M, E) of the images to fit.
        labels: (M,) int64 in [0, K).
        query: (Q, E).
        num_classes: K.
        l2: weight of the penalty.

    Returns:
        (Q,) int64 predicted classes.
    """
    features, query = features.float(), query.float()
    mean, std = features.mean(0), features.std(0, correction=0)
    # A constant feature has no scale: dividing it by rounding noise would blow up the queries'.
    std = torch.where(std > 1e-5 * mean.abs(), std, 1.0)
    features, query = (features - mean) / std, (query - mean) / std
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + l2 / (2 * len(labels)) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        solver.step(closure)
        return F.linear(query, weight, bias).argmax(1)
