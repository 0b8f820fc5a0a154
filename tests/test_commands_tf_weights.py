"""Checkpoints of the authors' networks give the features that TensorFlow computed."""

import shutil
from pathlib import Path

import pytest
import torch
from tensorflow_files import STEP, expected, write

from simclr_pl.commands.tf_weights import find_bundle, read_tf
from simclr_pl.errors import InputError


def largest_difference(name: str, prefix: Path) -> float:
    encoder = read_tf(prefix).build(name).eval()
    images, features = expected(name)
    with torch.no_grad():
        found = encoder(torch.from_numpy(images.copy()))
    assert found.shape == features.shape
    return float((found - torch.from_numpy(features)).abs().max())


def test_a_resnet18_of_tf1_has_tensorflows_features(tmp_path: Path) -> None:
    prefix = write("resnet18", tmp_path / "model.ckpt-1234")
    imported = read_tf(prefix)
    assert imported.init_args == {
        "depth": 18,
        "width": 1,
        "sk_ratio": 0.0,
        "small_stem": True,
        "in_channels": 3,
    }
    assert imported.step == STEP
    assert imported.normalisation == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert largest_difference("resnet18", prefix) < 1e-5


def test_a_resnet50_of_simclrv2_with_selective_kernels_has_tensorflows_features(
    tmp_path: Path,
) -> None:
    prefix = write("resnet50_sk", tmp_path / "model.ckpt-1234")
    assert read_tf(prefix).init_args["sk_ratio"] == 0.0625
    assert largest_difference("resnet50_sk", prefix) < 1e-5


def test_a_saved_model_of_tf2_has_tensorflows_features(tmp_path: Path) -> None:
    prefix = write("saved_model", tmp_path / "variables" / "variables")
    imported = read_tf(prefix)
    assert imported.layout == "google-research/simclr, TF2"
    assert len(imported.left_out) == 16
    assert largest_difference("saved_model", prefix) < 1e-5


def test_all_that_is_no_encoder_is_named(tmp_path: Path) -> None:
    imported = read_tf(write("resnet18", tmp_path / "model.ckpt-1234"))
    heads = [name.split("/")[0] for name in imported.left_out]
    assert sorted(set(heads)) == ["global_step", "head_contrastive", "head_supervised"]
    assert len(imported.left_out) + len(imported.weights) == 122


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Where an index lies, without its numbers."""
    prefix = write("resnet18", tmp_path / "run" / "model.ckpt-1234")
    prefix.with_name("model.ckpt-1234.data-00000-of-00001").unlink()
    return prefix


@pytest.mark.parametrize("suffix", ["", ".index", ".meta", ".data-00000-of-00001"])
def test_a_checkpoint_is_found_by_any_of_its_files(prefix: Path, suffix: str) -> None:
    assert find_bundle(prefix.with_name(prefix.name + suffix)) == prefix


def test_a_folder_means_its_only_or_its_last_checkpoint(prefix: Path) -> None:
    folder = prefix.parent
    assert find_bundle(folder) == prefix
    shutil.copy(f"{prefix}.index", folder / "model.ckpt-99.index")
    with pytest.raises(InputError, match=r"must hold one checkpoint.* got 2 in "):
        find_bundle(folder)
    (folder / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt-1234"\n')
    assert find_bundle(folder) == prefix


def test_what_is_no_checkpoint_of_tensorflow_is_none(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"")
    assert find_bundle(tmp_path) is None
    assert find_bundle(tmp_path / "weights.ckpt") is None
    assert find_bundle(tmp_path / "missing") is None


def test_another_network_of_tensorflow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold the variables of google-research/simclr"):
        read_tf(Path(__file__).parent / "tf_files" / "kinds")
