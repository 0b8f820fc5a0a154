"""`simclr export`: an encoder for other programs, in the format that they read.

Symbols: B samples, n views, C channels, S side in pixels, E feature width.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation
from simclr_pl.commands.encoder_file import KEY, named_part, save_encoder
from simclr_pl.commands.encoders import (
    Subject,
    augment_of_run,
    clean_example,
    image_channels,
    load_subject,
)
from simclr_pl.commands.model_card import native_timm_name, write_folder_texts
from simclr_pl.durable import flush, publish, temporary_of
from simclr_pl.errors import InputError

Format = Literal["safetensors", "onnx", "torch", "huggingface"]
Run = Callable[[Tensor], Tensor]
_ENDINGS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2", "huggingface": ""}
_TOLERANCE = 1e-4  # of the largest feature: float32 in another order of sums is 1e-6 to 1e-5


def export(
    subject: str, format: Format = "safetensors", out: str | None = None, pretrained: bool = False
) -> None:
    """Write an encoder in a format of other programs.

    What was written is loaded again, and its features are compared with those of the checkpoint; where
    they differ, nothing is left. Images go in normalised, and each format says by what mean and standard
    deviation; of other samples views go in, as the run's augmentation makes them, and some of the run's
    data is read to know their shape. The classifier, which SimCLR has none of, is left out.

    Args:
        subject: RUN, a model of timm or torchvision by name, or a file of `simclr import`. For example:
            simclr export RUN --format onnx
        format: "safetensors", the weights under the names of timm or torchvision; "onnx"; "torch", a
            program of torch.export; "huggingface", a folder with weights, configuration and model card of
            an encoder of images. "onnx" and "torch" take any number of views of the run's size, and
            tokens of any length.
        out: The file or the folder; by default beside the checkpoint, as <checkpoint>.safetensors,
            <checkpoint>.onnx, <checkpoint>.pt2 or <checkpoint>-huggingface.
        pretrained: Load the published weights of a model by name.
    """
    if format == "onnx":
        _require_onnx()
    model = load_subject(subject, pretrained)
    target = _target(model, format, out)
    views = _views_of(model)
    if format == "huggingface" and not isinstance(views, Augment):
        raise InputError(
            f"`format` huggingface is for encoders of images; got views by {type(views).__name__}. Set "
            "`--format` to safetensors, onnx or torch."
        )
    examples = _examples(model, views)
    about = _about(model, views, examples[0])
    encoder = copy.deepcopy(model.encoder).float().eval().requires_grad_(False)
    encoder = encoder.cpu().to(memory_format=torch.contiguous_format)  # torch.export's own order
    temporary = temporary_of(target)
    _remove(temporary)  # what is left of a process that was killed
    try:
        differences = {
            name: _difference(encoder, run, examples, name)
            for name, run in _write(format, temporary, model, encoder, views, about, examples[1])
        }
        for file in temporary.iterdir() if temporary.is_dir() else ():
            flush(file)
        publish(temporary, target)
    finally:
        _remove(temporary)
    count = sum(p.numel() for p in encoder.parameters())
    print(f"{type(model.encoder).__name__} with {count:,} parameters, of {subject}, is in {target}")
    if isinstance(views, Augment):
        mean, std = ([round(x, 4) for x in about["normalisation"][k]] for k in ("mean", "std"))
        print(f"takes pixels in [0, 1], less {mean}, divided by {std}; {views.size} pixels a side")
    else:
        shape = ", ".join(["n", *map(str, about["input"]["shape"])])
        print(f"takes ({shape}) {about['input']['dtype']}, views by {about['input']['views']}")
    for name, difference in differences.items():
        print(f"largest difference of features, {name} to checkpoint: {difference:.1e}")


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"`format` onnx needs onnx, onnxruntime and onnxscript; got no {', '.join(missing)}. Run "
            "`pip install 'simclr_pl[onnx]'`."
        )


def _target(model: Subject, format: Format, out: str | None) -> Path:
    stem = model.checkpoint.with_suffix("") if model.checkpoint else model.name.replace("/", "-")
    ending = _ENDINGS[format]
    target = Path(out or f"{stem}{ending or '-huggingface'}")
    if not (target.name.endswith(ending) and target.absolute().parent.is_dir()):
        must = f"end in {ending} and " if ending else ""
        raise InputError(
            f"`out` must {must}lie in a folder that exists; got {str(target)!r}. Set `--out`."
        )
    if model.checkpoint is not None and target.exists() and target.samefile(model.checkpoint):
        raise InputError(
            f"`out` must be another file than what is exported; got {str(target)!r}. Set `--out`."
        )
    if target.is_dir() and any(target.iterdir() if format == "huggingface" else [target]):
        what = "a new or an empty folder" if format == "huggingface" else "a file"
        raise InputError(
            f"`out` must be {what}; got {str(target)!r}, where something is. Move it, or set `--out`."
        )
    if format == "huggingface" and target.is_file():
        raise InputError(f"`out` must be a folder; got the file {str(target)!r}. Set `--out`.")
    return target


def _views_of(model: Subject) -> Augmentation:
    """How the clean views are made that an encoder is to see: of images size, normalisation and cut."""
    views = copy.copy(augment_of_run(model) or Augment())
    if not isinstance(views, Augment):
        return views
    if model.run is None:
        published = getattr(named_part(model.encoder), "pretrained_cfg", {})
        views.size = model.size or int(published.get("input_size", (views.size,))[-1])
    if model.normalisation is not None:
        views.mean, views.std = model.normalisation
    channels = image_channels(model.encoder) or len(views.mean)
    # One number serves all channels; grey images have the mean of ImageNet's, for want of their own.
    for name in ("mean", "std"):
        values = getattr(views, name)
        if len(values) != channels:
            setattr(views, name, (sum(values) / len(values),) * channels)
    return views


def _examples(model: Subject, views: Augmentation) -> list[Tensor]:
    """1 and 3 views on the CPU: of random pixels, of other samples real ones."""
    if not isinstance(views, Augment):
        three = clean_example(model, 3).cpu()
        return [three[:1], three]
    mean, std = (torch.tensor(v)[:, None, None] for v in (views.mean, views.std))
    shape = (3, len(views.mean), views.size, views.size)
    pixels = torch.randint(
        256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    images = (pixels / 255 - mean) / std
    return [images[:1], images]


def _about(model: Subject, views: Augmentation, example: Tensor) -> dict[str, Any]:
    """What every format says of an encoder, as plain values: see `encoder_file`."""
    encoder, recipe = type(model.encoder), dict(model.recipe or {})
    if encoder.__module__.startswith("simclr_pl."):  # by its full name, wherever the run found it
        recipe["class_path"] = f"{encoder.__module__}.{encoder.__qualname__}"
    source = model.name
    if model.checkpoint is not None:  # the end of its path: the rest is of this machine alone
        parts = [*(model.run.parts[-2:] if model.run else ()), model.checkpoint.name]
        source = "/".join(parts)
    about = {"encoder": recipe, "source": source, "step": model.step}
    if isinstance(views, Augment):
        normalisation = {"mean": list(views.mean), "std": list(views.std)}
        return {**about, "normalisation": normalisation, "size": views.size}
    dtype = str(example.dtype).removeprefix("torch.")
    maker = f"{type(views).__module__}.{type(views).__qualname__}"
    return {**about, "input": {"shape": list(example.shape[1:]), "dtype": dtype, "views": maker}}


# The formats. Each writes, loads what it wrote, and yields a name for that and what makes features.


def _write(
    format: Format,
    file: Path,
    model: Subject,
    encoder: nn.Module,
    views: Augmentation,
    about: dict[str, Any],
    example: Tensor,
) -> Iterator[tuple[str, Run]]:
    if format == "onnx":
        yield "onnxruntime", _onnx(file, encoder, about, example)
    elif format == "torch":
        yield "torch.export", _torch_program(file, encoder, about, example)
    elif format == "safetensors":
        save_encoder(file, model.encoder, about)
        yield "file", _reloaded(file, model)
    else:
        assert isinstance(views, Augment)
        file.mkdir()
        save_encoder(file / "model.safetensors", model.encoder, about)
        write_folder_texts(file, model, views, about)
        yield "file", _reloaded(file / "model.safetensors", model)
        if native_timm_name(model):
            import timm

            yield "timm", timm.create_model(f"local-dir:{file}", pretrained=True).eval()


def _reloaded(file: Path, model: Subject) -> Run:
    encoder = model.fresh().cpu()
    named_part(encoder).load_state_dict(load_file(file))
    return encoder.float().eval()


def _axes(example: Tensor) -> dict[int, str]:
    """The axes that may have any length: that of the views, and of tokens also that along a text."""
    return {0: "batch"} if example.is_floating_point() else {0: "batch", 1: "length"}


def _program(encoder: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The encoder for any n; from an example of more views than 1, which would be taken as fixed."""
    try:
        with torch.no_grad():
            shapes = dict.fromkeys(_axes(example), torch.export.Dim.DYNAMIC)
            return torch.export.export(encoder, (example,), dynamic_shapes=(shapes,))
    except Exception as error:  # of many kinds, from the encoder and from the tracer
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"an encoder must be one that torch.export can trace for any batch; got {line} "
            "Set `--format safetensors`."
        ) from error


def _torch_program(file: Path, encoder: nn.Module, about: dict[str, Any], example: Tensor) -> Run:
    with file.open("wb") as stream:
        torch.export.save(
            _program(encoder, example), stream, extra_files={f"{KEY}.json": json.dumps(about)}
        )
    with file.open("rb") as stream:
        return torch.export.load(stream).module()


def _onnx(file: Path, encoder: nn.Module, about: dict[str, Any], example: Tensor) -> Run:
    import onnxruntime

    name = "images" if "size" in about else "views"
    traced = _program(encoder, example)
    with torch.no_grad():
        program = torch.onnx.export(
            traced,
            dynamo=True,
            dynamic_shapes=(_axes(example),),  # the names, which the trace has not
            input_names=[name],
            output_names=["features"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[KEY] = json.dumps(about)
    program.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["features"], {name: x.numpy()})[0])


# Parity.


def _difference(encoder: nn.Module, run: Run, examples: Sequence[Tensor], name: str) -> float:
    """The largest absolute difference of the features of some views.

    Raises:
        InputError: it is above the tolerance, or no number.
    """
    largest = 0.0
    for views in examples:
        with torch.no_grad():
            expected, received = encoder(views), run(views)
        difference = float((expected - received).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise InputError(
                f"an export must give the features of its checkpoint; got a difference of "
                f"{difference:.1e} from {name} for {len(views)} views. Nothing is written; try another "
                "`--format`."
            )
        largest = max(largest, difference)
    return largest


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
