"""`simclr import`: published weights, and those of other libraries, as an encoder's file."""

import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from simclr_pl.commands.encoder_file import write_encoder
from simclr_pl.commands.imported import Imported, Normalisation
from simclr_pl.commands.tf_weights import find_bundle, read_tf
from simclr_pl.commands.torch_weights import read_torch
from simclr_pl.errors import InputError

_NAMED = 5  # names that are printed of each group that is left out
_SLOTS = ("Momentum", "ExponentialMovingAverage", "Adam", "Adam_1", "momentum")


def import_weights(
    checkpoint: str,
    out: str | None = None,
    prefix: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> None:
    """Make a checkpoint of another library an encoder's file, which every command takes as RUN.

    It can hold a ResNet of google-research/simclr (SimCLR and SimCLRv2, TF1 and TF2; TensorFlow is not
    needed), or one under torchvision's names, as lightly, solo-learn, stable-pretraining, VISSL, MoCo,
    torchvision and timm save it. The kind is found from the file, and nothing in the file is run. What
    the encoder has no place for, such as heads, is left out and named; a file that does not fill the
    encoder is refused.

    For example:

        simclr import ResNet50_1x/model.ckpt-225206 --out encoder.safetensors

    Args:
        checkpoint: A file of torch or safetensors; or TensorFlow's: a folder, a SavedModel's folder, or
            the path without `.index`.
        out: The file; by default <checkpoint>.safetensors beside the checkpoint.
        prefix: What stands before the names of the encoder, e.g. backbone, where a file of torch holds
            several.
        mean: What the weights expect to be subtracted from pixels in [0, 1], one number a channel; by
            default 0 for google-research/simclr and ImageNet's means for others.
        std: What they expect the pixels to be divided by then; by default 1 for google-research/simclr
            and ImageNet's standard deviations for others.
    """
    path = Path(checkpoint)
    target = _target(path, out)
    imported = _read(path, prefix)
    imported.normalisation = _normalisation(imported, mean, std)
    encoder = imported.build(checkpoint)
    about = {
        "encoder": {"class_path": imported.class_path, "init_args": imported.init_args},
        "normalisation": dict(zip(("mean", "std"), imported.normalisation, strict=True)),
        "source": f"{path.absolute().name}: {imported.layout}",
        "step": imported.step,
    }
    write_encoder(target, encoder, about)
    for line in _report(imported, encoder):
        print(line)
    print(f"written to {target}; for example: simclr knn {target} --dataset FOLDER")


def _read(path: Path, prefix: str | None) -> Imported:
    bundle = find_bundle(path)
    if bundle is None and not path.is_file():
        raise InputError(
            f"a checkpoint must exist, as a file or a folder with an index; got {str(path)!r}. Check "
            "the path."
        )
    if bundle is not None and prefix is not None:
        raise InputError(
            f"`prefix` is for files of torch; got {prefix!r} for TensorFlow's {str(path)!r}. Leave it "
            "out."
        )
    return read_torch(path, prefix) if bundle is None else read_tf(bundle)


def _target(path: Path, out: str | None) -> Path:
    endings = (".ckpt", ".pt", ".pth", ".torch", ".bin", ".index", ".safetensors")
    stem = path.absolute().with_suffix("") if path.suffix in endings else path.absolute()
    mark = "-encoder" if path.suffix == ".safetensors" else ""
    target = Path(out or f"{stem}{mark}.safetensors")
    if target.suffix != ".safetensors" or not target.absolute().parent.is_dir():
        raise InputError(
            f"`out` must end in .safetensors and lie in a folder that exists; got {str(target)!r}. "
            "Set `--out`."
        )
    if target.exists() and target.samefile(path):
        raise InputError(
            f"`out` must be another file than the checkpoint; got {str(target)!r}. Set `--out`."
        )
    return target


def _normalisation(
    imported: Imported, mean: list[float] | None, std: list[float] | None
) -> Normalisation:
    """What was given, or what the layout expects, for each channel of the encoder."""
    channels = int(imported.init_args["in_channels"])
    result = []
    for name, given, usual in zip(
        ("mean", "std"), (mean, std), imported.normalisation, strict=True
    ):
        values = usual if given is None else tuple(given)
        if len(values) != channels or (name == "std" and min(values) <= 0):
            above = " above 0" if name == "std" else ""
            raise InputError(
                f"`{name}` must be {channels} numbers{above}, one a channel; got {list(values)}. "
                f"Set `--{name}`, e.g. [{', '.join(['0.5'] * channels)}]."
            )
        result.append(values)
    return result[0], result[1]


def _report(imported: Imported, encoder: nn.Module) -> Iterator[str]:
    options = ", ".join(f"{k}={v!r}" for k, v in imported.init_args.items())
    parameters = sum(p.numel() for p in encoder.parameters())
    mean, std = ([round(x, 4) for x in values] for values in imported.normalisation)
    step = f", step {imported.step:,}" if imported.step else ""
    yield f"found: {imported.layout}{step}"
    yield f"encoder: {imported.class_path.rpartition('.')[2]}({options})"
    yield (
        f"         {encoder.num_features:,} features, {parameters:,} parameters; all of its tensors are "
        f"filled, by {len(imported.weights)} of the checkpoint"
    )
    yield f"pixels: in [0, 1], less {mean}, divided by {std}"
    for place, names in _groups(imported).items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"left out: {place} ({len(names)}): {', '.join(names[:_NAMED])}{more}"
    if imported.remark:
        yield f"note: {imported.remark}"


def _groups(imported: Imported) -> dict[str, list[str]]:
    """What was left out by its first word, or by its last where that is one of the encoder's."""
    groups: dict[str, list[str]] = {}
    for name in imported.left_out:
        words = re.split(r"[/.]", name)
        place = words[-1] if words[-1] in _SLOTS else words[0]
        groups.setdefault(place, []).append(name)
    return groups
