"""An encoder with a linear head, and how its layers lie.

Symbols: n rows, E feature width, K classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from simclr_pl.errors import InputError
from simclr_pl.models import feature_width


class Classifier(nn.Module):
    """An encoder, the first layers of its projector, and a linear head.

    SimCLRv2 fine-tunes from the first layer of a three-layer projector (Chen et al. 2020,
    arXiv:2006.10029, section 2): what follows that layer's batch norm and ReLU is dropped.

    Args:
        encoder: maps views (n, ...) to features (n, E); used as it is, not copied.
        num_classes: K.
        projector: the one that it was trained with.
        projector_layers: linear layers of it to keep.
        zero_head: start the head at zero, as the authors fine-tune (``zero_init_logits_layer``); else as
            `nn.Linear` does.

    Raises:
        InputError: ``projector_layers`` is not within the projector.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        projector: nn.Module | None = None,
        projector_layers: int = 0,
        zero_head: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.projector, width = kept_layers(projector, projector_layers)
        self.head = nn.Linear(width or feature_width(encoder), num_classes)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps views (n, ...), of images (n, C, S, S), to logits (n, K), in float32 or more."""
        if x.is_floating_point():
            x = x.to(self.head.weight.dtype)
        if x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        logits: Tensor = self.head(self.projector(self.encoder(x)))
        return logits if logits.dtype == torch.float64 else logits.float()


def kept_layers(projector: nn.Module | None, layers: int) -> tuple[nn.Sequential, int | None]:
    """The first layers of a projector, each with its batch norm and ReLU, and their output width.

    Args:
        projector: an `nn.Sequential`, e.g. `Projector`.
        layers: linear layers to keep; with 0 the result is empty, and the width None.

    Raises:
        InputError: there are not as many.
    """
    modules = list(projector) if isinstance(projector, nn.Sequential) else []
    linear = [i for i, module in enumerate(modules) if isinstance(module, nn.Linear)]
    if not 0 <= layers <= len(linear):
        raise InputError(
            f"`projector_layers` must be within 0 and the projector's {len(linear)} linear layers; "
            f"got {layers}. Set `--projector_layers`."
        )
    if layers == 0:
        return nn.Sequential(), None
    end = [*linear, len(modules)][layers]
    return nn.Sequential(*modules[:end]), int(modules[linear[layers - 1]].out_features)  # type: ignore[arg-type]


def rates_by_depth(classifier: Classifier, lr: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate shrinks from the head towards the images.

    The head has ``lr``, the layer below ``lr * decay``, the next ``lr * decay ** 2``. timm says what the
    layers of its models are; those of other encoders are their children, in order. Each linear layer of
    the projector is one.

    Args:
        classifier: its trainable parameters are taken, each once.
        lr: of the head.
        decay: within (0, 1]; 1 gives every layer the same rate.
    """
    projector: list[list[nn.Parameter]] = []
    for module in classifier.projector:
        if isinstance(module, nn.Linear):
            projector.append([])
        projector[-1].extend(module.parameters())
    layers = [*encoder_layers(classifier.encoder), *projector, list(classifier.head.parameters())]
    groups = []
    for depth, layer in enumerate(reversed(layers)):
        trained = [p for p in layer if p.requires_grad]
        if trained:
            groups.append({"params": trained, "lr": lr * decay**depth})
    return groups


def encoder_layers(encoder: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of an encoder, each once, by layer, the first layer first."""
    children = [child for child in encoder.children() if any(True for _ in child.parameters())]
    own = list(encoder.parameters(recurse=False))
    matcher: Any = getattr(encoder, "group_matcher", None)  # of timm
    if matcher is not None:
        from timm.models import group_parameters

        by_layer = group_parameters(encoder, matcher(coarse=False), return_values=True)
        return [by_layer[i] for i in sorted(by_layer)]
    if len(children) == 1 and not own:  # a wrapper
        return encoder_layers(children[0])
    layers = [own] if own else []
    for child in children:
        parameters = list(child.parameters())
        if layers and all(p.ndim <= 1 for p in parameters):  # a norm, with the layer before it
            layers[-1].extend(parameters)
        else:
            layers.append(parameters)
    return layers
