"""Checkpoints of torch, Lightning's included, that hold a ResNet under names of torchvision's kind.

lightly, solo-learn, stable-pretraining, VISSL, MoCo, torchvision and timm differ in what they put before
those names, in the name of the shortcut, and in numbering a ResNet's children instead of naming them.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simclr_pl.augment import Augment
from simclr_pl.commands.imported import Imported
from simclr_pl.commands.inert_pickle import load_untrusted
from simclr_pl.errors import InputError
from simclr_pl.models import Encoder

# A word of the prefix of a network that follows the trained one, as its moving average or copy.
_COPIES = ("momentum", "target", "teacher", "encoder_k", "ema", "swa")

# Models by their blocks and whether these are bottlenecks; the first with the right shapes is taken.
_MODELS: dict[tuple[bool, tuple[int, ...]], tuple[str, ...]] = {
    (False, (2, 2, 2, 2)): ("resnet18",),
    (False, (3, 4, 6, 3)): ("resnet34",),
    (True, (3, 4, 6, 3)): ("resnet50", "wide_resnet50_2", "resnext50_32x4d"),
    (True, (3, 4, 23, 3)): ("resnet101", "wide_resnet101_2", "resnext101_32x8d"),
    (True, (3, 8, 36, 3)): ("resnet152",),
}

# What a ResNet's own names begin with; the rest of what has its prefix are heads.
_OWN = re.compile(r"(conv\d*|bn\d*|norm\d*|stem|layer\d+)\.")

Weights = dict[str, Tensor]
Names = dict[str, str]  # torchvision's name -> the checkpoint's


def read_torch(path: Path, prefix: str | None = None) -> Imported:
    """The ResNet of a checkpoint of torch.

    Args:
        path: of a Lightning checkpoint, another file of `torch.save`, or a safetensors file.
        prefix: what stands before the encoder's names, e.g. "backbone"; by default it is found.

    Raises:
        InputError: the file cannot be read, has no ResNet or several, or one of no known architecture.
    """
    content, skipped = _load(path)
    tensors = _tensors(content)
    networks = _networks(tensors)
    chosen = _choose(networks, prefix, path)
    names = networks[chosen]
    weights = {name: tensors[old] for name, old in names.items()}
    options = _architecture(weights, path)
    usual = Augment()  # ImageNet's
    class_path = "simclr_pl.models.Encoder"
    if options["small_stem"] and (peculiar := _peculiarity(tensors, names, chosen)):
        class_path = "simclr_pl.published_resnets.SmallStemResNet"
        del options["small_stem"]
        options |= peculiar
    remark = f"not read, since they are no tensors: {', '.join(sorted(skipped))}"
    return Imported(
        layout=f"a ResNet below {chosen!r}",
        class_path=class_path,
        init_args=options,
        weights=weights,
        normalisation=(usual.mean, usual.std),
        left_out=sorted(tensors.keys() - names.values()),
        step=_step(content),
        remark=remark if skipped else "",
    )


def _load(path: Path) -> tuple[Any, set[str]]:
    if path.suffix != ".safetensors":
        return load_untrusted(path)
    try:
        return load_file(path), set()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"a safetensors file must be whole; got {str(path)!r}: {error}. Copy it again."
        ) from error


def _step(content: Any) -> int:
    step = content.get("global_step", 0) if isinstance(content, dict) else 0
    return step if isinstance(step, int) else 0


def _tensors(content: Any) -> Weights:
    """All tensors by name: of the state dict, or of everything there is, names joined by dots."""
    tensors: Weights = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(key, str):
                    collect(item, f"{name}.{key}" if name else key)

    inner = content.get("state_dict") if isinstance(content, dict) else None
    collect(inner if isinstance(inner, dict) else content, "")
    return tensors


def _networks(tensors: Weights) -> dict[str, Names]:
    """The ResNets, by what stands before their names."""
    networks: dict[str, Names] = {}
    for name in tensors:
        if name.endswith("layer1.0.conv1.weight"):
            prefix = name.removesuffix("layer1.0.conv1.weight")
            networks[prefix] = _named(tensors, prefix)
        match = re.fullmatch(r"((?:.*\.)?)(\d+)\.0\.conv1\.weight", name)
        if match and f"{match[1]}0.weight" in tensors:
            first = int(match[2])
            is_first = f"{match[1]}{first - 1}.0.conv1.weight" not in tensors
            # torchvision's children: conv1, bn1, relu, maxpool, layer1...; lightly's without the two.
            if is_first and first in (2, 4):
                networks[match[1]] = _numbered(tensors, match[1], first)
    return networks


def _named(tensors: Weights, prefix: str) -> Names:
    rest = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    return {_torchvision(own): name for own, name in rest.items() if _OWN.match(own)}


def _numbered(tensors: Weights, prefix: str, first: int) -> Names:
    children = {"0": "conv1", "1": "bn1", **{str(first + i): f"layer{i + 1}" for i in range(4)}}
    names = {}
    for name in tensors:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number in children:
            names[_torchvision(f"{children[number]}.{rest}")] = name
    return names


def _torchvision(name: str) -> str:
    return name.replace(".shortcut.", ".downsample.")


def _choose(networks: dict[str, Names], prefix: str | None, path: Path) -> str:
    """The prefix of the network to take: the trained one, where there are copies of it."""
    found = ", ".join(map(repr, networks)) or "none"
    if prefix is not None:
        for candidate in (prefix, f"{prefix}."):
            if candidate in networks:
                return candidate
        raise InputError(
            f"`prefix` must be what stands before a ResNet's names in {str(path)!r}; got {prefix!r} "
            f"where there is {found}. Set `--prefix`."
        )
    trained = [p for p in networks if not any(word in p for word in _COPIES)]
    if len(trained) == 1 or len(networks) == 1:
        return (trained or list(networks))[0]
    if not networks:
        raise InputError(
            "a checkpoint of torch must hold a ResNet under torchvision's names, or numbered as in an "
            f"nn.Sequential of its children; got {str(path)!r} without. Give another file."
        )
    raise InputError(
        f"one ResNet must be chosen; got several in {str(path)!r}: {found}. Set `--prefix` to one."
    )


def _architecture(weights: Weights, path: Path) -> dict[str, Any]:
    """The options of `Encoder` that these weights fit."""
    blocks = tuple(len(_blocks(weights, stage)) for stage in range(1, 5))
    models = _MODELS.get(("layer1.0.conv3.weight" in weights, blocks), ())
    stem = weights.get("conv1.weight")
    if not models or stem is None or stem.ndim != 4:
        raise InputError(
            "a ResNet must be one of 18, 34, 50, 101 or 152 layers with one convolution as its stem; got "
            f"{'-'.join(map(str, blocks))} blocks and a stem of shape "
            f"{None if stem is None else list(stem.shape)} in {str(path)!r}. It cannot be imported."
        )
    options = {
        "small_stem": stem.shape[2] == 3,
        "width": stem.shape[0] / 64,
        "in_channels": stem.shape[1],
    }
    fitting = [name for name in models if _fits(weights, {"name": name, **options})]
    return {
        "name": (fitting or models)[0],
        **options,
    }  # one that does not fit is refused as it is filled


def _blocks(weights: Weights, stage: int) -> set[str]:
    return {name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")}


def _fits(weights: Weights, options: dict[str, Any]) -> bool:
    with torch.device("meta"):
        expected = Encoder(**options).model.state_dict()
    return all(n in expected and expected[n].shape == value.shape for n, value in weights.items())


def _peculiarity(tensors: Weights, names: Names, prefix: str) -> dict[str, Any]:
    """What differs in a small stem though no tensor shows it; empty for nothing."""
    if names["layer1.0.conv1.weight"] == f"{prefix}2.0.conv1.weight":
        return {"relu": False}  # lightly's ResNet, taken apart
    if prefix in ("backbone.", "encoder.") and "classifier.weight" in tensors:
        return {"padding": 2}  # solo-learn, which trains a linear classifier beside its backbone
    return {}
