"""The LightningModule: one forward, the same gradient on two ranks, plain hyper-parameters."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW

from simclr_pl import LARS, ConvEncoder, InputError, Projector, SimCLR
from simclr_pl.losses import nt_xent


def test_training_step_encodes_all_views_at_once_and_returns_the_contract() -> None:
    model, calls = tiny_model(), []
    model.encoder.register_forward_hook(lambda *args: calls.append(args[1][0].shape))
    model.log = lambda *_, **__: None  # type: ignore[assignment]
    tiny_trainer([]).strategy.connect(model)
    attributes = {
        "optimizers": [LARS(model.parameters())],
        "global_step": 0,
        "log_every_n_steps": 9,
    }
    model.trainer = type("T", (), attributes)()
    batch = {
        "views": torch.randn(12, 1, 32, 32),
        "label": torch.arange(6),
        "index": torch.arange(6),
    }
    out = model.training_step(batch, 0)
    assert calls == [(12, 1, 32, 32)]
    assert out["features"].shape == (12, 32)
    assert not out["features"].requires_grad
    assert out["loss"].requires_grad
    assert torch.equal(out["label"], batch["label"])
    assert torch.equal(out["index"], batch["index"])
    z = tiny_model().train()
    expected = nt_xent(z.projector(z.encoder(batch["views"])).view(2, 6, 8), temperature=0.2)
    torch.testing.assert_close(out["loss"], expected)


def test_small_views_are_encoded_apart_and_are_positives_of_all_views_of_their_image() -> None:
    losses, calls = [], []

    class Recording(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any
        ) -> None:
            losses.append((outputs, batch))

    model = tiny_model(optimizer=partial(SGD, lr=0.0))
    model.encoder.register_forward_hook(lambda *args: calls.append(tuple(args[1][0].shape)))
    trainer = tiny_trainer([Recording()], max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0)
    trainer.fit(model, datamodule=tiny_data(n_small_views=3))
    assert calls[:2] == [(128, 1, 32, 32), (192, 1, 14, 14)]
    model.train()
    for outputs, batch in losses:
        parts = [model.projector(model.encoder(batch[n])) for n in ("views", "small_views")]
        z = torch.nn.functional.normalize(torch.cat(parts).double(), dim=1)  # (5*64, D)
        similarity = z @ z.T / 0.2
        similarity.fill_diagonal_(-torch.inf)
        log_p = similarity - similarity.logsumexp(1, keepdim=True)
        image = torch.arange(64).repeat(5)
        positive = (image[:, None] == image) & ~torch.eye(320, dtype=torch.bool)
        expected = -(log_p.where(positive, 0).sum(1) / 4).mean()  # the mean over four positives
        torch.testing.assert_close(outputs["loss"].double(), expected, rtol=0, atol=1e-5)
        assert outputs["features"].shape == (320, 32)


def test_a_compiled_encoder_makes_the_same_step_in_chunks() -> None:
    ends = []
    for compile in (True, False):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.BatchNorm1d(8))
        encoder.num_features = 8  # type: ignore[assignment]
        model = SimCLR(
            encoder,
            nn.Linear(8, 4, bias=False),
            optimizer=partial(SGD, lr=0.05),
            lr_scaling="none",
            warmup_epochs=0,
            encode_chunk=48,  # of 128 rows: the last chunk is a plain call
            compile=compile,
        )
        graphs = counters["stats"]["unique_graphs"]
        tiny_fit([], model, limit_train_batches=1, max_epochs=1)
        assert (counters["stats"]["unique_graphs"] > graphs) is compile
        assert copy.deepcopy(model)._compiled is None
        ends.append(weights(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-5, atol=1e-6)
    assert (ends[0]["encoder.2.running_mean"] != 0).any()


class Gradients(Callback):
    """Keeps the loss and the parameter gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, list[Tensor]]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        self.steps.append((loss, [p.grad.clone() for p in pl_module.parameters()]))


def gradients_in_float64() -> list[tuple[float, list[Tensor]]]:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    recorder = Gradients()
    tiny_fit(
        [recorder],
        tiny_model(batch_norm=False),
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",
    )
    return recorder.steps


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_under_lightning_ddp_give_the_gradients_of_one_process(world_size: int) -> None:
    expected = gradients_in_float64()
    assert len(expected) == 8
    for steps in on_ranks(world_size, gradients_in_float64):
        for (loss, gradients), (loss_1, gradients_1) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(loss_1, rel=1e-6)  # logged in float32
            for g, g_1 in zip(gradients, gradients_1, strict=True):
                torch.testing.assert_close(g, g_1, rtol=0, atol=1e-10)


def test_same_seed_trains_the_same_weights_with_dropout() -> None:
    first, second = (
        weights(tiny_fit([], tiny_model(batch_norm=False, dropout=0.5)).lightning_module)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def dropout_masks() -> list[Tensor]:
    class Masks(Callback):
        def __init__(self) -> None:
            self.masks: list[Tensor] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.encoder[2].register_forward_hook(
                lambda module, args, out: self.masks.append((out == 0).clone())
            )

    masks = Masks()
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    model = tiny_model(batch_norm=False, dropout=0.5)
    strategy = "ddp" if devices > 1 else "auto"
    tiny_fit([masks], model, devices=devices, strategy=strategy, fast_dev_run=True)
    return masks.masks[:1]


def test_ranks_draw_different_dropout() -> None:
    first, second = on_ranks(2, dropout_masks)
    assert first[0].shape == second[0].shape
    assert (first[0] != second[0]).float().mean() > 0.2


def test_validation_leaves_the_padding_out() -> None:
    batch = {
        "views": torch.randn(4, 1, 32, 32),
        "label": torch.tensor([3, 1, -1, -1]),
        "index": torch.tensor([5, 9, 7, -1]),
    }
    out = tiny_model().eval().validation_step(batch, 0)
    assert out["features"].shape == (3, 32)
    assert out["index"].tolist() == [5, 9, 7]
    assert out["label"].tolist() == [3, 1, -1]


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 0.25), ("sqrt", 8.0), ("none", 1.0)])
def test_learning_rate_is_scaled_and_scheduled_by_step(scaling: Any, factor: float) -> None:
    rates = Rates()
    model = tiny_model(optimizer=partial(LARS, lr=0.5), lr_scaling=scaling)
    model.warmup_epochs = 0.5  # two of four steps
    tiny_fit([rates], model)
    peak = 0.5 * factor
    assert rates.rates[:3] == pytest.approx([0.0, peak / 2, peak])
    assert rates.rates[5] == pytest.approx(peak / 2)  # half of the cosine's six steps


def test_the_rate_starts_again_from_its_peak_in_each_cycle() -> None:
    rates = Rates()
    tiny_fit([rates], tiny_model(optimizer=partial(LARS, lr=0.5), lr_cycles=2))
    half = [0.25 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates.rates == pytest.approx(half + half)


def test_exempt_groups_reach_the_optimizer() -> None:
    trainer = tiny_fit([], tiny_model(optimizer=partial(AdamW, weight_decay=0.1)))
    decayed, exempt = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] == 0.1
    assert exempt["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in decayed["params"])


def test_max_steps_alone_gives_the_length_of_training() -> None:
    trainer = tiny_fit([], tiny_model(), max_epochs=-1, max_steps=5)
    assert trainer.global_step == 5


def test_unlimited_training_is_an_error() -> None:
    with pytest.raises(InputError, match="length of training must be known"):
        tiny_fit([], tiny_model(), max_epochs=-1)


def test_checkpoint_holds_plain_values_and_loads_with_weights_only(tmp_path: Path) -> None:
    trainer = tiny_fit([])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {
        "temperature": 0.2,
        "encode_chunk": None,
        "lr_scaling": "none",
        "warmup_epochs": 0,
        "lr_cycles": 1,
        "seed": 0,
        "batch_norm_ranks": 1,
        "compile": None,
    }
    loaded = SimCLR.load_from_checkpoint(
        tmp_path / "a.ckpt",
        encoder=ConvEncoder(4, in_channels=1),
        projector=partial(Projector, hidden_features=16, out_features=8),
    )
    assert loaded.loss.temperature == 0.2
    for name, value in weights(trainer.lightning_module).items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    tiny_fit([]).save_checkpoint(tmp_path / "a.ckpt")
    other = SimCLR(ConvEncoder(8, in_channels=1), lr_scaling="none")
    with pytest.raises(InputError, match=r"of the model that is configured; got one that differs"):
        tiny_trainer([]).fit(
            other, datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )


def test_projector_may_be_a_module_or_made_from_the_width() -> None:
    head = nn.Linear(32, 4)
    assert SimCLR(ConvEncoder(4), head).projector is head
    assert SimCLR(ConvEncoder(4)).projector[0].in_features == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be > 0"),
        ({"warmup_epochs": -1}, "`warmup_epochs`"),
        ({"lr_cycles": 0}, "`lr_cycles` must be >= 1; got 0. Set `model.lr_cycles`."),
    ],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SimCLR(ConvEncoder(4), **options)


def test_scaling_without_a_known_batch_is_an_error() -> None:
    loader = torch.utils.data.DataLoader(torch.zeros(8, 1, 32, 32), batch_size=4)
    with pytest.raises(InputError, match="scaling the learning rate needs the global batch size"):
        tiny_trainer([]).fit(tiny_model(lr_scaling="linear"), loader, loader)
