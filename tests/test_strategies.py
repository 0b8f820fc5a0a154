"""Sharded weights: the steps, checkpoints and errors of DDP."""

import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from ranks import on_ranks
from test_configs import Built
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from simclr_pl import LARS, ConvEncoder, InputError, NTXentLoss, strategies
from simclr_pl.optim import parameter_groups
from simclr_pl.strategies import FullySharded, pays_to_compile, shard


@pytest.mark.parametrize(
    ("steps", "layer", "serves", "pays"),
    [
        (5000, nn.BatchNorm1d(2), True, True),
        (4999, nn.BatchNorm1d(2), True, False),
        (5000, nn.BatchNorm1d(2), False, False),
        (5000, nn.SyncBatchNorm(2), True, False),
    ],
)
def test_long_runs_of_layers_of_one_rank_are_compiled_where_triton_serves(
    steps: int, layer: nn.Module, serves: bool, pays: bool, monkeypatch: Any
) -> None:
    """No GPU is needed to decide it: the answer of `triton_serves` stands in for one."""
    monkeypatch.setattr(
        strategies, "triton_serves", lambda device: serves and device.type == "cuda"
    )
    on_gpu = SimpleNamespace(root_device=torch.device("cuda"))
    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps, strategy=on_gpu)
    assert pays_to_compile(trainer, nn.Sequential(nn.Linear(2, 2), layer)) is pays


LARS_OPTIONS: list[dict[str, Any]] = [{}, {"nesterov": True}, {"foreach": False}]


def network() -> nn.Module:
    """Rows that two ranks share unevenly, or of which one has none."""
    torch.manual_seed(0)
    within = nn.Sequential(nn.Sequential(nn.Linear(5, 5)), nn.Linear(5, 7), nn.LayerNorm(7))
    blocks = [within, nn.Sequential(nn.Linear(7, 3))]
    return nn.Sequential(*blocks, nn.ReLU(), nn.Linear(3, 1)).double()


def lars_steps(ranks: int) -> list[dict[str, Tensor]]:
    found = []
    for options in LARS_OPTIONS:
        model = network()
        if ranks > 1:
            shard(model, init_device_mesh("cpu", (ranks,)))
        groups, _ = parameter_groups(model)
        optimizer = LARS(groups, lr=0.1, weight_decay=0.01, trust_coefficient=0.3, **options)
        for step in range(4):
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).double()
            if ranks > 1:
                x = x.chunk(ranks)[get_rank()]
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        found.append({name: whole(p.detach()) for name, p in model.named_parameters()})
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_lars_on_shards_takes_the_steps_on_whole_tensors() -> None:
    expected = lars_steps(1)
    for found in on_ranks(2, lars_steps, 2):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def sharded_modules() -> list[str]:
    shard(ConvEncoder(4).to(memory_format=torch.channels_last), init_device_mesh("cpu", (2,)))
    model = network()
    for _ in range(2):  # `fit`, then `validate`
        shard(model, init_device_mesh("cpu", (2,)))
    return [name for name, m in model.named_modules() if isinstance(m, FSDPModule)]


def test_blocks_are_sharded_by_themselves_and_but_once() -> None:
    for names in on_ranks(2, sharded_modules):
        assert names == ["", "0", "0.0", "1"]


def test_fsdp_on_the_command_line_is_this_strategy(tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path)]
    strategy = ["--trainer.accelerator", "cpu", "--trainer.strategy", "fsdp"]
    config = Path(__file__).parents[1] / "configs/quickstart.yaml"
    cli = Built(["fit", "--config", str(config), *root, *strategy])
    assert type(cli.trainer.strategy) is FullySharded


class Losses(Callback):
    """Keeps the losses, and checkpoints after four steps."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.values = path, []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if self.path is not None and trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


def fit(
    strategy: type, chunk: int | None, optimizer: Any, save: Path | None, load: Path | None
) -> tuple[list[float], Any]:
    model = tiny_model(batch_norm=False, optimizer=optimizer, encode_chunk=chunk)
    recorder = Losses(save)
    trainer = tiny_trainer([recorder], devices=2, strategy=strategy(), num_sanity_val_steps=0)
    trainer.fit(model, datamodule=tiny_data(), ckpt_path=load, weights_only=True)
    parts = [p.to_local().shape for p in model.parameters() if isinstance(p, DTensor)]
    assert bool(parts) == (strategy is FullySharded)
    weights = trainer.strategy.lightning_module_state_dict()
    state = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return recorder.values, ({name: w.clone() for name, w in weights.items()}, state)


def four_runs(folder: Path, optimizer: Any) -> Any:
    """With either strategy, and each resumed with the other and, in chunks, with itself."""
    files = {DDPStrategy: folder / "ddp.ckpt", FullySharded: folder / "fsdp.ckpt"}
    whole = {s.__name__: fit(s, None, optimizer, files[s], None) for s in files}
    resumed = [
        (f"{s.__name__} from {files[t].stem}", fit(s, None, optimizer, None, files[t]))
        for s in files
        for t in files
    ]
    return whole, resumed, fit(FullySharded, 24, optimizer, None, None)


@pytest.mark.parametrize("optimizer", [partial(LARS, lr=0.3), partial(AdamW, lr=1e-3)])
def test_a_sharded_fit_is_the_one_of_ddp_and_either_resumes_from_the_other(
    optimizer: Any, tmp_path: Path
) -> None:
    alone = Losses()
    model = tiny_model(batch_norm=False, optimizer=optimizer)
    tiny_fit([alone], model, num_sanity_val_steps=0)
    for whole, resumed, chunked in on_ranks(2, four_runs, tmp_path, optimizer):
        ddp, fsdp = whole["DDPStrategy"], whole["FullySharded"]
        for losses, _ in (ddp, fsdp, chunked):
            assert losses == pytest.approx(alone.values, rel=1e-6)
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
        close(fsdp[1], ddp[1])
        for name, (losses, end) in resumed:
            assert losses == pytest.approx(alone.values[4:], rel=1e-6), name
            close(end, ddp[1])
        assert resumed[-1][1][0] == fsdp[0][4:]  # the same to the bit
        torch.testing.assert_close(resumed[-1][1][1], fsdp[1], rtol=0, atol=0)


class OnCPU(FSDPStrategy):
    """Lightning asks for a GPU by the very type."""


def refusal(strategy: type, loss: Any) -> str:
    assert get_world_size() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = tiny_trainer([], devices=2, strategy=strategy()).fit
        with pytest.raises(InputError) as error:
            fit(tiny_model(loss=loss), datamodule=tiny_data())
    return str(error.value)


def refusals() -> list[str]:
    learnable = partial(NTXentLoss, learnable=True)
    return [
        refusal(OnCPU, NTXentLoss),
        refusal(ModelParallelStrategy, NTXentLoss),
        refusal(FullySharded, learnable),
    ]


def test_what_cannot_be_right_is_refused() -> None:
    for first, second, third in on_ranks(2, refusals):
        assert "got OnCPU. Set `trainer.strategy` to" in first
        assert "got ModelParallelStrategy. Set `trainer.strategy` to" in second
        assert "got a learnable temperature" in third
