"""What commands are given: encoders, data sets, and clear words about what they cannot take."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tiny import tiny_data, tiny_model
from trained import QUICKSTART, digits_folder, digits_run

from simclr_pl import Encoder, InputError
from simclr_pl.commands.encoders import (
    channels_of,
    clean_views,
    data_for,
    load_subject,
    trainer_for,
)
from simclr_pl.data import CIFAR10, Digits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.mktemp("runs"))


def test_a_runs_folder_and_its_checkpoint_are_the_trained_encoder(run: Path) -> None:
    file = run / "checkpoints/last.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    for what in (run, file):
        subject = load_subject(str(what))
        assert (subject.name, subject.checkpoint, subject.run) == (str(what), file, run)
        assert (subject.step, subject.num_features) == (6, 32)
        assert subject.config == yaml.safe_load((run / "config.yaml").read_text())
        for name, part in (("encoder", subject.encoder), ("projector", subject.projector)):
            assert part is not None
            for key, value in part.state_dict().items():
                assert torch.equal(value, state[f"{name}.{key}"])


def test_fresh_is_the_same_architecture_at_the_same_initialisation_each_time(run: Path) -> None:
    subject = load_subject(str(run))
    before = torch.get_rng_state()
    one, two = (subject.fresh().state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    trained = subject.encoder.state_dict()
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in trained.items()}
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["0.weight"], trained["0.weight"])


def test_an_encoder_by_name_has_the_channels_asked_for_and_a_fresh_twin() -> None:
    subject = load_subject("timm/resnet18", in_channels=1)
    assert (subject.num_features, subject.checkpoint, subject.projector) == (512, None, None)
    assert subject.encoder(torch.zeros(2, 1, 32, 32)).shape == (2, 512)
    assert isinstance(subject.fresh(), Encoder)
    assert torch.equal(next(subject.fresh().parameters()), next(subject.encoder.parameters()))


def test_a_checkpoint_from_python_takes_its_recipe_from_a_config_beside_it(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    model = tiny_model()
    trainer.fit(model, datamodule=tiny_data())
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    with pytest.raises(InputError, match="written from Python"):
        load_subject(str(tmp_path / "mine.ckpt"))
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    config["model"]["encoder"]["init_args"]["width"] = 4
    config["model"]["projector"]["init_args"] = {"hidden_features": 16, "out_features": 8}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    subject = load_subject(str(tmp_path / "mine.ckpt"))
    weights = model.encoder.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in subject.encoder.state_dict().items())
    config["model"]["encoder"]["init_args"]["width"] = 8
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="a checkpoint must be of the model that is configured"):
        load_subject(str(tmp_path / "mine.ckpt"))
    config["model"]["encoder"]["class_path"] = "no.such.Encoder"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="can be built here; got: No module named 'no'"):
        load_subject(str(tmp_path / "mine.ckpt"))


class Touch:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Touch(tmp_path / "touched")}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="must be whole, of plain values and tensors alone"):
        load_subject(str(tmp_path / "evil.ckpt"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("resnet19", "no checkpoint and no run's folder, and as an encoder: .* Perhaps: "),
        ("runs/none", "a checkpoint or a run's folder must exist; got 'runs/none'"),
        ("none.ckpt", "a checkpoint or a run's folder must exist; got 'none.ckpt'"),
        ("timm/a/b", "a checkpoint or a run's folder must exist; got 'timm/a/b'"),
        (".", "must hold checkpoints/last.ckpt; got '.' without"),
        ("tensor.ckpt", "must be one that `simclr fit` wrote; got 'tensor.ckpt' without weights"),
        ("text.ckpt", "must be whole, of plain values and tensors alone; got 'text.ckpt': "),
    ],
)
def test_what_is_no_encoder_is_named_with_a_remedy(what: str, message: str) -> None:
    torch.save(torch.zeros(1), "tensor.ckpt")
    Path("text.ckpt").write_text("hello")
    with pytest.raises(InputError, match=message):
        load_subject(what)


# Data.


def test_the_runs_own_images_are_the_default_and_all_are_in_the_bank(run: Path) -> None:
    data = data_for(load_subject(str(run)))
    data.setup()
    assert isinstance(data.source, Digits)
    assert (len(data.samples("bank")), len(data.samples("query"))) == (1347, 450)
    data = data_for(load_subject(str(run)), bank_size=100, batch_size=32, seed=3)
    data.setup()
    assert (len(data.samples("bank")), data.eval_batch_size, data.seed) == (100, 32, 3)


def test_as_much_may_be_unreadable_as_in_the_run(run: Path) -> None:
    subject = load_subject(str(run))
    assert data_for(subject).max_bad_fraction == 0.05
    assert subject.config is not None
    subject.config["data"]["max_bad_fraction"] = 0.3
    assert data_for(subject).max_bad_fraction == 0.3
    assert data_for(subject, max_bad_fraction=0.1).max_bad_fraction == 0.1


def test_other_images_are_seen_as_the_run_saw_its_own(tmp_path: Path) -> None:
    config = digits_folder(tmp_path / "images", 12)
    views = ["--data.augment", "simclr_pl.augment.digits", "--data.augment.size", "24"]
    subject = load_subject(str(digits_run(tmp_path, *views)))
    for dataset in (None, str(config)):
        augment = data_for(subject, dataset).augment
        assert (augment.size, augment.clean_fraction) == (24, 1.0)
        np.testing.assert_allclose((augment.mean, augment.std), ((0.204,), (0.181,)))
    assert data_for(subject, size=16).augment.size == 16
    with pytest.raises(InputError, match="`size` must be >= 2; got 1"):
        data_for(subject, size=1)


def test_a_run_without_augmentation_of_its_own_keeps_that_of_its_source(
    run: Path, tmp_path: Path
) -> None:
    config = digits_folder(tmp_path / "images", 12)
    augment = data_for(load_subject(str(run)), str(config)).augment
    assert (augment.size, augment.mean) == (32, (0.204,))


def test_published_weights_see_images_normalised_as_they_learned_it() -> None:
    subject = load_subject("resnet18")
    source = CIFAR10("nowhere")
    assert clean_views(subject, source).mean == source.default_augment().mean
    subject.normalisation = ((0.5,) * 3, (0.25,) * 3)
    augment = clean_views(subject, source)
    assert (augment.mean, augment.std) == ((0.5,) * 3, (0.25,) * 3)


def test_images_of_other_channels_are_refused(run: Path, tmp_path: Path) -> None:
    digits_folder(tmp_path / "images", 12)
    with pytest.raises(InputError, match=r"got 3 for 1. Give a YAML config .* `grey: true`"):
        data_for(load_subject(str(run)), str(tmp_path / "images"))
    with pytest.raises(InputError, match=r"got 1 for 3. Give a YAML config .* `grey: false`"):
        data_for(load_subject("resnet18"), "Digits")
    assert (channels_of("Digits"), channels_of(None)) == (1, 3)


def test_an_encoder_by_name_needs_a_data_set() -> None:
    with pytest.raises(InputError, match="a data set must be given for 'resnet18'"):
        data_for(load_subject("resnet18"))


def test_the_trainer_writes_nothing_by_itself(tmp_path: Path) -> None:
    trainer = trainer_for(1, "cpu", max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(tiny_model(), datamodule=tiny_data())
    assert trainer.loggers == []
    assert list(tmp_path.iterdir()) == []
