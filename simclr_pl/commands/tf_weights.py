"""google-research/simclr's checkpoints, as the encoder `SimCLRResNet`.

TF1's name variables by the order in which the graph was built (`base_model/conv2d_12/kernel`); TF2's,
SavedModels included, carry a graph of Python objects that leads to each variable. Both give the layers
in the order in which the authors' code creates them, which is that of `SimCLRResNet`.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from simclr_pl.commands.imported import Imported
from simclr_pl.commands.tensor_bundle import Bundle, Fields, message_fields
from simclr_pl.errors import InputError
from simclr_pl.published_resnets import BLOCKS, SimCLRResNet

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# Attributes of the authors' TF2 classes that lead to layers, in the order of their creation.
_ATTRIBUTES = (
    "initial_conv_relu_max_pool",
    "block_groups",
    "layers",
    "projection_layers",
    "shortcut_layers",
    "conv_relu_dropblock_layers",
    "conv2d_bn_layers",
    "conv2d_fixed_padding",
    "batch_norm_relu",
    "conv2d_0",
    "batch_norm_relu_1",
    "conv2d_1",
    "conv2d",
    "bn",
)

Layer = dict[str, str]  # a variable's role in its layer -> its name in the bundle
# Convolutions and batch norms in order, and what variables were called in Python.
Layers = tuple[list[Layer], list[Layer], dict[str, str]]


def find_bundle(path: Path) -> Path | None:
    """The prefix of the TensorFlow checkpoint that a path means; None if it means none.

    Args:
        path: the prefix, one of its files, a folder with a `checkpoint` or one index, or a SavedModel.

    Raises:
        InputError: a folder has several checkpoints and does not say which is the last.
    """
    if path.is_dir():
        return _bundle_in(path)
    prefix = path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))
    return prefix if prefix.with_name(prefix.name + ".index").is_file() else None


def _bundle_in(folder: Path) -> Path | None:
    if (folder / "variables/variables.index").is_file():
        return folder / "variables/variables"
    if (folder / "checkpoint").is_file():
        text = (folder / "checkpoint").read_text(errors="replace")
        named = re.search(r'^model_checkpoint_path: "(.+)"', text, re.MULTILINE)
        last = None if named is None else folder / Path(named[1]).name  # the folder may have moved
        if last is not None and last.with_name(last.name + ".index").is_file():
            return last
    found = sorted(folder.glob("*.index"))
    if len(found) > 1:
        raise InputError(
            f"a folder must hold one checkpoint, or a file `checkpoint` that names the last; got "
            f"{len(found)} in {str(folder)!r}. Give one's path, e.g. {str(found[-1])!r}."
        )
    return found[0].with_suffix("") if found else None


def read_tf(prefix: Path) -> Imported:
    """The encoder of a checkpoint of google-research/simclr, v1 or v2.

    Args:
        prefix: from `find_bundle`.

    Raises:
        InputError: it is damaged, or no ResNet of theirs.
    """
    bundle = Bundle(prefix)
    is_tf1 = any(name.startswith("base_model/") for name in bundle.entries)
    convs, norms, words = _layers_of_tf1(bundle) if is_tf1 else _layers_of_tf2(bundle)
    if not convs or not norms:
        raise InputError(
            "a checkpoint must hold the variables of google-research/simclr, below `base_model/` (TF1) "
            f"or `resnet_model` (TF2); got {str(prefix)!r} without. Give another checkpoint."
        )
    options = _architecture([bundle.entries[c["kernel"]].shape for c in convs], prefix)
    weights = _weights(bundle, convs, norms, options, prefix)
    used = {name for layer in (*convs, *norms) for name in layer.values()}
    return Imported(
        layout=f"google-research/simclr, {'TF1' if is_tf1 else 'TF2'}",
        class_path="simclr_pl.published_resnets.SimCLRResNet",
        init_args=options,
        weights=weights,
        normalisation=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # pixels in [0, 1], as they are
        left_out=sorted(words.get(n, n) for n in bundle.entries.keys() - used - {_GRAPH}),
        step=_step(bundle),
    )


def _step(bundle: Bundle) -> int:
    for name in ("global_step", "global_step/.ATTRIBUTES/VARIABLE_VALUE"):
        if name in bundle.entries and bundle.entries[name].shape == ():
            return int(bundle.tensor(name))
    return 0


def _layers_of_tf1(bundle: Bundle) -> Layers:
    found: dict[str, dict[int, Layer]] = {"conv2d": {}, "batch_normalization": {}}
    for name in bundle.entries:
        match = re.fullmatch(r"base_model/(conv2d|batch_normalization)(?:_(\d+))?/(\w+)", name)
        if match and match[3] in {"kernel", *_NORM}:
            found[match[1]].setdefault(int(match[2] or 0), {})[match[3]] = name
    convs, norms = ([layers[n] for n in sorted(layers)] for layers in found.values())
    return [conv for conv in convs if "kernel" in conv], norms, {}


def _layers_of_tf2(bundle: Bundle) -> Layers:
    """By way of the graph of objects: messages TrackableObjectGraph, of trackable_object_graph.proto."""
    if _GRAPH not in bundle.entries:
        return [], [], {}
    graph = bundle.text(_GRAPH)
    try:
        nodes = [message_fields(_bytes(node)) for node in message_fields(graph).get(1, [])]
        children = [dict(_child(_bytes(child)) for child in node.get(1, [])) for node in nodes]
        variables = [_variable(node) for node in nodes]
        convs, norms = _walk(children, [key for key, _ in variables])
    except (ValueError, IndexError, KeyError, RecursionError) as error:
        raise InputError(
            f"the graph of objects in a checkpoint must be whole; got {str(bundle.prefix)!r}: {error!r}. "
            "Copy it again."
        ) from error
    return convs, norms, dict(variables)


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number in the place of a message")
    return value


def _child(reference: bytes) -> tuple[str, int]:
    fields = message_fields(reference)
    return _bytes(fields[2][-1]).decode(), int(fields.get(1, [0])[-1])


def _variable(node: Fields) -> tuple[str, str]:
    """The name in the bundle of the variable that an object is, and its name in Python; or nothing."""
    if 2 not in node:
        return "", ""
    fields = message_fields(_bytes(node[2][0]))
    key, name = (_bytes(fields.get(number, [b""])[-1]).decode() for number in (3, 2))
    return key, name or key


def _walk(children: list[dict[str, int]], keys: list[str]) -> tuple[list[Layer], list[Layer]]:
    convs: list[Layer] = []
    norms: list[Layer] = []

    def visit(node: int) -> None:
        below = children[node]
        if "kernel" in below:
            convs.append({"kernel": keys[below["kernel"]]})
        elif "gamma" in below:
            norms.append({role: keys[below[role]] for role in _NORM if role in below})
        else:
            numbered = sorted((name for name in below if name.isdigit()), key=int)
            for name in (*(a for a in _ATTRIBUTES if a in below), *numbered):
                visit(below[name])

    roots = [node for node, below in enumerate(children) if "block_groups" in below]
    if roots:
        visit(roots[0])
    return convs, norms


def _architecture(shapes: list[tuple[int, ...]], prefix: Path) -> dict[str, int | float | bool]:
    """The options of `SimCLRResNet` whose convolutions have these shapes (H, W, in, out), in order."""
    first = shapes[0] if len(shapes[0]) == 4 else (0, 0, 0, 0)
    # The first convolution of a deep stem is 3x3 as a small stem's is; the next are its only ones.
    deep = first[0] == 3 and len(shapes) > 2 and shapes[1][:2] == shapes[2][:2] == (3, 3)
    deep = deep and shapes[2][-1] == 2 * first[-1]
    width = first[-1] // 32 if deep else first[-1] // 64
    for depth in BLOCKS:
        for sk_ratio in (0.0625,) if deep else (0.0, 0.0625):
            options = {
                "depth": depth,
                "width": width,
                "sk_ratio": sk_ratio,
                "small_stem": first[0] == 3 and not deep,
                "in_channels": first[2],
            }
            if width < 1 or (sk_ratio > 0 and depth < 50):
                continue
            if _convolutions(options) == shapes:
                return options
    raise InputError(
        "a checkpoint must hold a ResNet of google-research/simclr, of depth 18, 34, 50, 101, 152 or "
        f"200; got {len(shapes)} convolutions, the first of shape {list(shapes[0])}, in {str(prefix)!r}, "
        "which fit none. Give another checkpoint."
    )


def _convolutions(options: dict[str, int | float | bool]) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        model = SimCLRResNet(**options)  # type: ignore[arg-type]
    convs = (m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d))
    return [(h, w, c_in, c_out) for c_out, c_in, h, w in convs]


def _weights(
    bundle: Bundle,
    convs: list[Layer],
    norms: list[Layer],
    options: dict[str, int | float | bool],
    prefix: Path,
) -> dict[str, Tensor]:
    with torch.device("meta"):
        named = list(SimCLRResNet(**options).named_modules())  # type: ignore[arg-type]
    weights = {}
    conv_names = [name for name, m in named if isinstance(m, nn.Conv2d)]
    for name, layer in zip(conv_names, convs, strict=True):
        kernel = bundle.tensor(layer["kernel"]).transpose(3, 2, 0, 1)  # HWIO to OIHW
        weights[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
    norm_names = [name for name, m in named if isinstance(m, nn.BatchNorm2d)]
    if len(norm_names) != len(norms) or any(len(layer) != len(_NORM) for layer in norms):
        raise InputError(
            f"a checkpoint must hold {len(norm_names)} whole batch norms for its convolutions; got "
            f"{sum(len(layer) == len(_NORM) for layer in norms)} in {str(prefix)!r}. Give another "
            "checkpoint."
        )
    for name, layer in zip(norm_names, norms, strict=True):
        for role, variable in layer.items():
            weights[f"{name}.{_NORM[role]}"] = torch.from_numpy(bundle.tensor(variable))
    return weights
