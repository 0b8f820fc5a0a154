"""The texts of a Hugging Face-style folder: configuration, preprocessing, a model card from the run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

import simclr_pl
from simclr_pl.augment import Augment
from simclr_pl.commands.encoders import Subject
from simclr_pl.models import Encoder
from simclr_pl.optim import lr_factor

_PROTOCOLS = {
    "knn": "weighted vote of nearest neighbours among frozen features",
    "linear": "linear classifier on frozen features",
    "probe": "linear head trained beside the encoder",
    "finetune": "whole encoder trained on labels; the weights here are those before",
}
_BASELINES = {"": "this encoder", "_init": "at initialisation", "_raw": "raw pixels"}


class Score(NamedTuple):
    """A row of the card's table: accuracies in percent, of the first guess."""

    protocol: str
    data: str
    cells: list[str]


def native_timm_name(model: Subject) -> str | None:
    """The name by which timm builds exactly this architecture; None where it has none."""
    options = (model.recipe or {}).get("init_args") or {}
    plain = options.get("width", 1.0) == 1.0 and not options.get("small_stem", False)
    if _library(model) != "timm" or type(model.encoder) is not Encoder or not plain:
        return None
    return str(options.get("name", "resnet50")).removeprefix("timm/")


def _library(model: Subject) -> str:
    """Whose names the tensors have: "timm", "torchvision" or "simclr_pl"."""
    inner = model.encoder.model if isinstance(model.encoder, Encoder) else model.encoder
    found = type(inner).__module__.partition(".")[0]
    return found if found in ("timm", "torchvision") else "simclr_pl"


def write_folder_texts(folder: Path, model: Subject, views: Augment, about: dict[str, Any]) -> None:
    """Writes config.json, preprocessor_config.json and README.md.

    Args:
        folder: exists.
        model: the encoder.
        views: size, cut and normalisation of what it is to see.
        about: what its file says of it.
    """
    texts = {
        "config.json": _config(model, views, about),
        "preprocessor_config.json": _pixels(views),
    }
    for name, values in texts.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    (folder / "README.md").write_text(_card(model, views, about))


def _config(model: Subject, views: Augment, about: dict[str, Any]) -> dict[str, Any]:
    """The keys of timm where it can build the encoder, and this package's recipe."""
    name = native_timm_name(model)
    if name is None:
        return {"num_features": model.num_features, "simclr_pl": about}
    channels = len(views.mean)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.num_features,
        "pretrained_cfg": {
            "tag": "simclr",
            "input_size": [channels, views.size, views.size],
            "interpolation": "bilinear",
            "crop_pct": views.clean_fraction,
            "crop_mode": "center",
            "mean": list(views.mean),
            "std": list(views.std),
            "num_classes": 0,
        },
        "simclr_pl": about,
    }


def _pixels(views: Augment) -> dict[str, Any]:
    """What transformers' image processors call the clean view: shrink, cut, scale, normalise."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": round(views.size / (views.clean_fraction or 1.0))},
        "resample": 2,  # Pillow's bilinear
        "do_center_crop": True,
        "crop_size": {"height": views.size, "width": views.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
    }


# The card.


def _card(model: Subject, views: Augment, about: dict[str, Any]) -> str:
    loader = PackageLoader("simclr_pl", "commands")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    recipe = about["encoder"]
    options = recipe.get("init_args") or {}
    front = {
        "library_name": "timm" if native_timm_name(model) else "simclr_pl",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["simclr", "self-supervised-learning", "contrastive-learning", "simclr_pl"],
    }
    return environment.get_template("model_card.md").render(
        front=yaml.safe_dump(front, sort_keys=False).rstrip(),
        name=str(options.get("name") or recipe.get("class_path", "").rpartition(".")[2]),
        about=about,
        options=", ".join(f"{key}={value!r}" for key, value in options.items()),
        features=model.num_features,
        parameters=sum(p.numel() for p in model.encoder.parameters()),
        channels=len(views.mean),
        edge=_pixels(views)["size"]["shortest_edge"],
        native=native_timm_name(model),
        library=_library(model),
        small_stem=bool(options.get("small_stem")),
        stem_stride=options.get("stem_stride", 1),
        by_simclr=model.config is not None,
        tuned=model.tuned,
        training=_training(model),
        scores=_scores(model),
        version=simclr_pl.__version__,
    )


def _training(model: Subject) -> list[tuple[str, str]]:
    """Names and values of the recipe, those that the run's config says."""
    config = model.config or {}
    module, data, trainer = (config.get(key) or {} for key in ("model", "data", "trainer"))
    batch, scaling = data.get("global_batch_size"), module.get("lr_scaling")
    rows = [("data", _data_name(data.get("source"))), ("optimiser steps", f"{model.step:,}")]
    if batch:
        batch *= trainer.get("accumulate_grad_batches") or 1
        rows.append(("images of one update", f"{batch:,}"))
    optimizer = module.get("optimizer") or {}
    rate = (optimizer.get("init_args") or {}).get("lr")
    if rate and batch and scaling:
        effective = rate * lr_factor(scaling, batch)
        rows.append(("learning rate", f"{effective:g} at its peak: {rate:g}, scaled {scaling}"))
    rows.append(("optimiser", optimizer.get("class_path", "").rpartition(".")[2]))
    for name, values, key in (
        ("epochs", trainer, "max_epochs"),
        ("warm-up epochs", module, "warmup_epochs"),
        ("temperature", module, "temperature"),
        ("views of an image", data, "n_views"),
        ("precision", trainer, "precision"),
        ("seed", config, "seed_everything"),
    ):
        if values.get(key) is not None:
            rows.append((name, str(values[key])))
    return [(name, value) for name, value in rows if value] if config else rows[1:2]


def _data_name(source: Any) -> str:
    """The source and the last folder of its path: the rest is of the machine that trained."""
    if not isinstance(source, dict):
        return str(source or "")
    root = (source.get("init_args") or {}).get("root")
    name = str(source.get("class_path", "")).rpartition(".")[2]
    return f"{name} ({Path(str(root)).name})" if root else name


def _scores(model: Subject) -> list[Score]:
    """What the run and the commands after it have measured of these very weights."""
    rows = []
    if model.run is not None and not model.tuned:
        summary = _read(model.run / "summary.json")
        if summary.get("steps") == model.step:
            rows += [
                _score(name, summary, f"{name}_top1", "the run's")
                for name in ("knn", "linear", "probe")
            ]
    if model.checkpoint is not None:
        for name in ("knn", "linear", "finetune"):
            result = _read(model.checkpoint.with_suffix(f".{name}.json"))
            if result.get("step") == model.step:
                rows.append(_score(name, result, "top1", str(result.get("dataset") or "the run's")))
    return [row for row in rows if row.cells[0] != "-"]


def _score(name: str, values: dict[str, Any], key: str, data: str) -> Score:
    found = [values.get(f"{key}{suffix}") for suffix in _BASELINES]
    cells = [f"{100 * x:.1f}" if isinstance(x, (int, float)) else "-" for x in found]
    return Score(_PROTOCOLS[name], Path(data).name, cells)


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; nothing where the file is missing, and where it is damaged, by name."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        print(f"left out of the model card: {file} cannot be read ({error})")
        return {}
    return values if isinstance(values, dict) else {}
