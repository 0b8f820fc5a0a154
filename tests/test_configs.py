"""Every preset parses, builds, takes a step, and trains at the rate of its source."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from tiny import tiny_trainer

from simclr_pl.audio_augment import AudioAugment
from simclr_pl.augment import Augment
from simclr_pl.commands.presets import facts_of
from simclr_pl.data import ContrastiveDataModule, in_memory
from simclr_pl.data.clips import Clip
from simclr_pl.data.description import Moments, write_moments
from simclr_pl.data.sources import ResidentImages, Source
from simclr_pl.optim import lr_factor, parameter_groups
from simclr_pl.presets import preset_files
from simclr_pl.text_augment import TextAugment
from simclr_pl.training_cli import SimCLRCLI

CONFIGS = list(preset_files().values())


def name_of(path: Path) -> str:
    return next(name for name, file in preset_files().items() if file == path)


# Of each preset the peak rate, weight decay and temperature, from the flags or lines of its source:
# README of google-research/simclr for those with its name, CONFIG.md of moco-v3, lightly's
# imagenette_benchmark.py, section 3 of SimCLRv2. None: this project's own choice of numbers.
_CIFAR = (1.0 * 512 / 256, 1e-4, 0.5)  # --learning_rate=1.0, linear
_IMAGENET = (0.075 * math.sqrt(4096), 1e-4, 0.1)  # --learning_rate=0.075 ..._scaling=sqrt
_AT_512 = (0.075 * math.sqrt(512), 1e-4, 0.1)
SOURCES: dict[str, tuple[float, float, float] | None] = {
    "quickstart": None,
    "cifar10-cpu": None,
    "spoken-digits": None,
    "package-docs": None,
    "cifar10": _CIFAR,
    "cifar10-200ep": _CIFAR,
    "cifar100": _CIFAR,
    "stl10": _AT_512,
    "imagenette": (6e-2 * 256 / 256, 5e-4, 0.5),
    "imagenet100": _AT_512,
    "imagenet": _IMAGENET,
    "imagenet-256": (0.075 * math.sqrt(256), 1e-4, 0.1),
    "imagenet-12gb": _IMAGENET,
    "simclrv2": (6.4, 1e-4, 0.1),  # the paper gives the product of 0.1 and sqrt(4096)
    "speedrun/cifar10-100ep": (0.06 * 512 / 256, 5e-4, 0.5),
    "speedrun/cifar10": (0.03 * 1024 / 256, 5e-4, 0.5),
    "speedrun/imagenette": (6e-2 * 512 / 256, 5e-4, 0.5),
    "vit-small": (1.5e-4 * 4096 / 256, 0.1, 0.2),  # main_moco.py: args.lr * args.batch_size / 256
}
# Batch, epochs and epochs of warm-up by the same sources
LENGTHS = {
    "cifar10": (512, 1000, 10),
    "cifar10-200ep": (512, 200, 10),
    "imagenette": (256, 200, 0),
    "imagenet": (4096, 100, 10),
    "imagenet-256": (256, 100, 10),
    "imagenet-12gb": (4096, 100, 10),
    "simclrv2": (4096, 800, 0.05 * 800),
    "speedrun/cifar10-100ep": (512, 100, 0),
    "speedrun/cifar10": (1024, 500, 5),
    "speedrun/imagenette": (512, 800, 10),
    "vit-small": (4096, 300, 40),
}
# Side, strength of the jitter, probabilities of grey, blur and solarisation by the same sources
_CIFAR_VIEWS = (32, 0.5, 0.2, 0.0, 0.0)  # --use_blur=False --color_jitter_strength=0.5
_IMAGENET_VIEWS = (224, 1.0, 0.2, 0.5, 0.0)
VIEWS = {
    "cifar10": _CIFAR_VIEWS,
    "cifar10-200ep": _CIFAR_VIEWS,
    "cifar100": _CIFAR_VIEWS,
    "imagenette": (128, 0.5, 0.2, 0.5, 0.0),
    "speedrun/cifar10-100ep": (32, 0.5, 0.1, 0.0, 0.0),
    "speedrun/cifar10": (32, 0.5, 0.1, 0.0, 0.0),
    "speedrun/imagenette": (128, 0.5, 0.2, 0.5, 0.0),
    "imagenet": _IMAGENET_VIEWS,
    "imagenet-256": _IMAGENET_VIEWS,
    "simclrv2": _IMAGENET_VIEWS,
    "vit-small": (224, 0.4 / 0.8, 0.2, (1.0 + 0.1) / 2, 0.2 / 2),
}
# What the authors exempt from decay and adaptation (batch_normalization and bias in the name): scale and
# shift of every batch norm of the encoder, two of each in a three-layer head, and a scale of the last.
EXEMPT = {"cifar10": 2 * 20 + 5, "imagenet": 2 * 53 + 5, "imagenet100": 2 * 20 + 5}


class Built(SimCLRCLI):
    """Parses and instantiates, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class Noise(Source):
    """Twelve random images of two classes."""

    def __init__(self, side: int, channels: int) -> None:
        self.side, self.channels = side, channels

    def open(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (12, self.channels, self.side, self.side)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        images = ResidentImages(pixels, np.arange(12) % 2)
        self.train = self.bank = self.query = images


class Hiss(Source):
    """Twelve clips of noise of two classes."""

    def __init__(self, augment: AudioAugment) -> None:
        self.rate = augment.sample_rate

    def open(self) -> None:
        noise = 0.1 * np.random.default_rng(0).standard_normal((12, self.rate)).astype(np.float32)
        clips = [Clip(self.rate, self.rate, lambda a, n, w=w: w[a : a + n]) for w in noise]
        self.train = self.bank = self.query = in_memory(clips, np.arange(12) % 2)


class Words(Source):
    """Twelve documents of random tokens of two classes."""

    def __init__(self, augment: TextAugment) -> None:
        self.vocab_size = augment.vocab_size

    def open(self) -> None:
        documents = np.random.default_rng(0).integers(0, self.vocab_size, (12, 50))
        self.train = self.bank = self.query = in_memory(documents, np.arange(12) % 2)


@pytest.fixture(scope="module", params=CONFIGS, ids=name_of)
def preset(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Built]:
    """Built once; pytest runs all tests of one preset before it makes the next."""
    path: Path = request.param
    root = tmp_path_factory.mktemp("runs")
    args = ["fit", "--config", str(path), "--trainer.accelerator", "cpu"]
    return name_of(path), Built([*args, "--trainer.default_root_dir", str(root)])


def test_every_config_has_its_source_in_the_table() -> None:
    assert SOURCES.keys() == preset_files().keys()


def test_preset_parses_and_builds(preset: tuple[str, Built]) -> None:
    name, cli = preset
    assert cli.model.num_features > 0
    assert cli.datamodule.global_batch_size > 0
    root = Path(cli.trainer.default_root_dir)
    assert cli.trainer.log_dir == str(root / name.replace("/", "-") / "version_0")
    assert (cli.model.encode_chunk is not None) == (name == "imagenet-12gb")
    if SOURCES[name] is not None:  # no paper rotates
        assert cli.datamodule.augment.rotation == cli.datamodule.augment.shift == 0


def test_peak_rate_decay_and_temperature_are_those_of_the_source(
    preset: tuple[str, Built],
) -> None:
    name, cli = preset
    optimizer = cli.model.optimizer(parameter_groups(cli.model)[0])
    decayed, exempt = optimizer.param_groups
    factor = lr_factor(cli.model.lr_scaling, cli.datamodule.global_batch_size)
    found = (decayed["lr"] * factor, decayed["weight_decay"], cli.model.loss.temperature)
    assert exempt["weight_decay"] == 0
    assert len(exempt["params"]) == EXEMPT.get(name, len(exempt["params"]))
    if (source := SOURCES[name]) is not None:
        assert [float(value) for value in found] == pytest.approx(source)


def test_batch_epochs_and_warm_up_are_those_of_the_source(preset: tuple[str, Built]) -> None:
    name, cli = preset
    found = (cli.datamodule.global_batch_size, cli.trainer.max_epochs, cli.model.warmup_epochs)
    if name in LENGTHS:
        assert found == LENGTHS[name]


def test_views_are_those_of_the_source(preset: tuple[str, Built]) -> None:
    name, cli = preset
    a = cli.datamodule.augment
    if name in VIEWS:
        assert (a.size, a.strength, a.grey, a.blur, a.solarise) == pytest.approx(VIEWS[name])
        low = 0.2 if name.startswith("speedrun/cifar10") else 0.08
        assert (a.crop_scale, a.jitter, a.flip) == ((low, 1.0), 0.8, 0.5)


def test_rotation_and_statistics_are_options_of_every_image_preset(
    preset: tuple[str, Built], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, cli = preset
    own = cli.datamodule.augment
    turned = ["--config", name, "--data.augment.init_args.rotation", "15"]
    if not isinstance(own, Augment):  # sounds and texts cannot be turned, and it says so
        with pytest.raises(SystemExit):
            cli._parser("fit").parse_args(turned)
        assert "Option 'rotation' is not accepted" in capsys.readouterr().err
        return
    found = Moments((0.11, 0.22, 0.33), (0.44, 0.55, 0.66), images=1, pixels=1, unreadable=0)
    write_moments(tmp_path / "stats.yaml", found, ["# of a test"])
    words = [*turned, "--config", str(tmp_path / "stats.yaml")]
    given = cli._parser("fit").parse_args(words).data
    parser = ArgumentParser(exit_on_error=False)  # of the data alone: no model is built again
    parser.add_class_arguments(ContrastiveDataModule, "data")
    augment = parser.instantiate(parser.parse_object({"data": given})).data.augment
    changed = {"mean": found.mean, "std": found.std, "rotation": 15}
    assert vars(augment) == vars(own) | changed


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_preset_takes_a_step_that_reaches_every_tensor(preset: tuple[str, Built]) -> None:
    name, cli = preset
    model, augment = cli.model, cli.datamodule.augment
    source = cli.datamodule.source
    if isinstance(augment, Augment):
        augment.size = 224 if name.startswith("vit") else 32
        source = Noise(augment.size, source.channels)
    elif isinstance(augment, AudioAugment):
        source = Hiss(augment)
    elif isinstance(augment, TextAugment):
        source = Words(augment)
    data = ContrastiveDataModule(source, 4, augment=augment, num_workers=0)
    model.warmup_epochs = 0  # else the first step is one of length 0
    model.encode_chunk = model.encode_chunk and 4
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    trainer = tiny_trainer([], max_steps=1, precision=cli.trainer.precision, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    (base,) = model.optimizer([torch.nn.Parameter(torch.ones(1))]).param_groups
    rate = trainer.optimizers[0].param_groups[0]["initial_lr"]
    assert rate == pytest.approx(base["lr"] * lr_factor(model.lr_scaling, 4))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    moved = [not torch.equal(a, b) for a, b in zip(before, trained, strict=True)]
    assert sum(moved) > 0.5 * len(moved)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_header_says_command_hardware_result_and_source(path: Path) -> None:
    text = path.read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert header[0].startswith(f"# simclr fit --config configs/{name_of(path)}.yaml")
    facts = facts_of(text)
    assert facts.keys() == {"Hardware", "Data", "Expected", "Source"}
    measured = path.stem in ("quickstart", "cifar10-cpu", "spoken-digits", "package-docs")
    assert measured != facts["Expected"].startswith("not measured here")
    assert measured != ("not measured here" in facts["Hardware"])
