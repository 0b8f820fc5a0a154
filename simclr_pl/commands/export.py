"""`simclr export`: an encoder's weights as safetensors, which hold numbers and run nothing."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from simclr_pl.commands.encoders import load_subject
from simclr_pl.durable import publish, temporary_of
from simclr_pl.errors import InputError
from simclr_pl.models import Encoder


def export(subject: str, out: str | None = None, pretrained: bool = False) -> None:
    """Write an encoder's weights to a safetensors file.

    The tensors have the names of timm or torchvision where the encoder is a model of theirs; the
    classifier, which SimCLR has none of, is left out. The file is read back and compared.

    Args:
        subject: A checkpoint of `simclr fit`, a run's folder, or a model of timm or torchvision. For
            example: simclr export runs/simclr/version_0
        out: The file; by default <checkpoint>.safetensors beside the checkpoint, or <name>.safetensors.
        pretrained: Load the published weights of a model by name.
    """
    if out is not None and not (out.endswith(".safetensors") and _is_in_a_folder(out)):
        raise InputError(
            f"`out` must end in .safetensors and lie in a folder that exists; got {out!r}. Set `--out`."
        )
    model = load_subject(subject, pretrained)
    stem = model.checkpoint.with_suffix("") if model.checkpoint else subject.replace("/", "-")
    file = Path(out or f"{stem}.safetensors")
    encoder = model.encoder.model if isinstance(model.encoder, Encoder) else model.encoder
    weights = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    about = {"format": "pt", "num_features": str(model.num_features), "step": str(model.step)}
    save_file(weights, temporary_of(file), about)
    saved = load_file(temporary_of(file))
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())
    publish(temporary_of(file), file)
    count = sum(value.numel() for value in weights.values())
    print(f"{len(weights)} tensors of {count:,} numbers, as in {subject}, are in {file}")


def _is_in_a_folder(path: str) -> bool:
    return Path(path).absolute().parent.is_dir()
