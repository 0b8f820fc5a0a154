"""Which keys are secret, and that the values reach no file of a run."""

import enum
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from tiny import tiny_model
from torch import nn

from simclr_pl.cli import main
from simclr_pl.secrets import is_secret, masked, plain
from simclr_pl.simclr import SimCLR


@pytest.mark.parametrize(
    "key",
    [
        *("token", "hf_token", "apiKey", "api_key", "API-KEY", "apikey", "password", "db.password"),
        *("client_secret", "secret", "credentials", "aws_secret_access_key", "accessToken"),
        *("private_key", "wandb_token", "passwd", "token_api_key", "api_key_file"),
    ],
)
def test_secret_keys(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        *("tokenizer", "key_dim", "key", "keys", "n_tokens", "tokens", "token_dim", "num_tokens"),
        *(
            "monkey",
            "class_token_dim",
            "global_pool",
            "encoder",
            "seed",
            "secretary",
            "keyed_random",
        ),
    ],
)
def test_other_keys(key: str) -> None:
    assert not is_secret(key)


def test_masking_reaches_nested_values_and_addresses_and_leaves_the_original() -> None:
    given = {"a": [{"token": "t", "n": 1}], "b": "s3://me:pw@host/x", "password": None, "c": "x:y"}
    assert masked(given) == {
        "a": [{"token": "***", "n": 1}],
        "b": "s3://me:***@host/x",
        "password": None,
        "c": "x:y",
    }
    assert given["a"] == [{"token": "t", "n": 1}]


class Colour(enum.StrEnum):
    RED = "red"


def test_plain_values_are_of_the_plain_types_themselves() -> None:
    given = {"a": (1, np.float64(2)), "b": Colour.RED, "c": Path("x"), 3: {True}, "d": None}
    value = plain(given)
    assert value == {"a": [1, 2.0], "b": "red", "c": "x", "3": [True], "d": None}
    assert [type(v) for v in (value["a"][1], value["b"], value["3"][0])] == [float, str, bool]


def test_hyper_parameters_from_python_are_plain() -> None:
    model = tiny_model(encode_chunk=np.int64(4))
    for values in (model.hparams, model.hparams_initial):
        assert type(values["encode_chunk"]) is int
        assert values["temperature"] == 0.2


class Hub(nn.Module):
    """An encoder from somewhere that asks for a token."""

    seen = ""

    def __init__(self, hub_token: str = "", sizes: tuple[int, int] = (3, 4)) -> None:
        super().__init__()
        Hub.seen = hub_token
        self.layer = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 6))
        self.num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_run_uses_the_secret_and_writes_it_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "hunter2-environment")
    words = ["simclr", "fit", "--model.encoder.hub_token", "hunter2-words"]  # wandb keeps them
    monkeypatch.setattr(sys, "argv", words)
    config = tmp_path / "given.yaml"
    config.write_text("""
data: {source: Digits, bank_size: 60}
model: {encoder: {class_path: test_secrets.Hub, init_args: {hub_token: hunter2-config}}}
track: [wandb-offline, tensorboard]
knn: null
collapse: null
pictures: null
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false}
""")
    root = tmp_path / "runs"
    main(["fit", "--config", str(config), "--trainer.default_root_dir", str(root)])
    wandb.finish()  # all is written
    assert Hub.seen == "hunter2-config"
    files = [file for file in root.rglob("*") if file.is_file()]
    assert {"config.yaml", "hparams.yaml", "last.ckpt"} <= {file.name for file in files}
    assert any(file.suffix == ".wandb" for file in files)
    for file in files:
        assert b"hunter2" not in file.read_bytes(), file
    run = root / "simclr/version_0"
    assert "hub_token: '***'" in (run / "config.yaml").read_text()
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert content[SimCLR.CHECKPOINT_HYPER_PARAMS_KEY]["encoder"]["init_args"] == {
        "hub_token": "***",
        "sizes": [3, 4],
    }
