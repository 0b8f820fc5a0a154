"""Batch norm over several ranks: what torch's has over all of their rows in one process."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size, is_initialized
from torch.optim import SGD

from simclr_pl import Encoder, InputError, SimCLR
from simclr_pl.batch_norm import share_batch_norm

CPU = torch.device("cpu")
ROWS = [3, 5, 2, 7]  # of each rank, uneven


def network(norm: type[nn.Module], **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    last = nn.Linear(4, 3) if norm is nn.BatchNorm1d else nn.Conv2d(4, 3, 1)
    model = nn.Sequential(norm(4, **options), nn.ReLU(), last).double()
    if options.get("affine", True):
        nn.init.normal_(model[0].weight)
        nn.init.normal_(model[0].bias)
    return model


def rows_of(ranks: list[int], shape: tuple[int, ...], step: int) -> Tensor:
    """float64, with a mean that is large beside the deviation."""
    parts = []
    for r in ranks:
        generator = torch.Generator().manual_seed(10 * step + r)
        parts.append(torch.randn(ROWS[r], *shape, generator=generator).double() + 3e4 + r)
    return torch.cat(parts)


class Steps(NamedTuple):
    outputs: list[Tensor]
    inputs: list[Any]  # their gradients
    parameters: list[Any]  # their gradients
    running: list[Tensor]


def two_steps(model: nn.Sequential, ranks: list[int], shape: tuple[int, ...]) -> Steps:
    """Two steps of training and one of evaluation."""
    outputs, grads = [], []
    for step in range(2):
        x = rows_of(ranks, shape, step).requires_grad_()
        y = model(x)
        y.sin().square().sum().backward()  # each row's loss has its own weight
        outputs.append(y.detach())
        grads.append(x.grad)
    model.eval()
    if model[0].track_running_stats:
        outputs.append(model(rows_of(ranks, shape, 2)).detach())
    return Steps(outputs, grads, [p.grad for p in model.parameters()], list(model.buffers()))


CASES: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (nn.BatchNorm1d, (4,), {}),
    (nn.BatchNorm2d, (4, 5, 6), {"momentum": None}),
    (nn.BatchNorm2d, (4, 2, 3), {"affine": False, "track_running_stats": False}),
]


def shared(ranks: int) -> list[Any]:
    results = []
    for norm, shape, options in CASES:
        model = network(norm, **options)
        names = list(model.state_dict())
        share_batch_norm(model, ranks, CPU)
        assert list(model.state_dict()) == names
        results.append(two_steps(model, [get_rank()], shape))
    return results


@pytest.mark.parametrize("groups", [[[0, 1, 2]], [[0, 1], [2, 3]]])
def test_outputs_gradients_and_running_statistics_are_those_of_the_group(
    groups: list[list[int]],
) -> None:
    results = on_ranks(sum(map(len, groups)), shared, len(groups[0]))
    for group in groups:
        for case, (norm, shape, options) in enumerate(CASES):
            expected = two_steps(network(norm, **options), group, shape)
            found = [results[r][case] for r in group]
            for part in ("outputs", "inputs"):
                steps = zip(*(getattr(f, part) for f in found), strict=True)
                joined = [torch.cat(step) for step in steps]
                torch.testing.assert_close(joined, getattr(expected, part), rtol=0, atol=1e-9)
            summed = [sum(grads) for grads in zip(*(f.parameters for f in found), strict=True)]
            torch.testing.assert_close(summed, expected.parameters, rtol=0, atol=1e-9)
            for f in found:
                torch.testing.assert_close(f.running, expected.running, rtol=0, atol=1e-9)


def halves(ranks: int = 1) -> Tensor:
    layer = nn.Sequential(nn.BatchNorm1d(4))
    x = (torch.randn(128, 4, generator=torch.Generator().manual_seed(0)) + 9).bfloat16()
    if not is_initialized():
        return layer(x.float()).detach()
    share_batch_norm(layer, ranks, CPU)
    y = layer(x.chunk(ranks)[get_rank()])
    assert y.dtype == torch.bfloat16
    return y.detach()


def test_statistics_of_bfloat16_are_float32() -> None:
    found = torch.cat(on_ranks(2, halves, 2))
    torch.testing.assert_close(found.float(), halves(), rtol=2**-8, atol=1e-6)


def activated(ranks: int = 1) -> tuple[Tensor, set[str]]:
    """Features on this rank, and the kinds of layers that a GPU would have."""
    torch.manual_seed(0)
    encoder = Encoder("mobilenetv3_small_050").train()
    x = torch.randn(8, 3, 32, 32)
    on_gpu = Encoder("mobilenetv3_small_050")
    if is_initialized():
        for _ in range(2):  # a second `fit` finds them shared
            share_batch_norm(encoder, ranks, CPU)
            share_batch_norm(on_gpu, ranks, torch.device("cuda"))
        x = x.chunk(get_world_size())[get_rank()]
    return encoder(x).detach(), {type(m).__name__ for m in on_gpu.modules()}


def test_timm_layers_keep_their_activation() -> None:
    results = on_ranks(2, activated, 2)
    torch.testing.assert_close(
        torch.cat([h for h, _ in results]), activated()[0], rtol=0, atol=1e-4
    )
    for _, kinds in results:
        assert "SyncBatchNormAct" in kinds
        assert not kinds & {"BatchNorm2d", "BatchNormAct2d", "SharedBatchNorm"}


def losses(**options: Any) -> list[float]:
    class Losses(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.values.append(float(outputs["loss"]))

    recorder, ranks = Losses(), get_world_size() if is_initialized() else 1
    options = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", **WHOLE, **options}
    tiny_fit([recorder], tiny_model(optimizer=partial(SGD, lr=0.05, momentum=0.9)), **options)
    return recorder.values


WHOLE = {
    "max_epochs": 5,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "precision": "64-true",  # in float32 the roundings of 20 steps grow to 1e-1
}


def both_losses() -> tuple[list[float], list[float]]:
    return losses(sync_batchnorm=True), losses(max_epochs=1)


def test_all_ranks_with_sync_batchnorm_have_the_losses_of_one_process_over_20_steps() -> None:
    alone = losses()
    assert len(alone) == 20
    for synced, own in on_ranks(2, both_losses):
        assert synced == pytest.approx(alone, rel=0, abs=1e-9)
        assert own != pytest.approx(alone[:4], rel=0, abs=1e-3)


def test_a_configuration_for_many_ranks_also_trains_on_one() -> None:
    assert tiny_fit([], tiny_model(batch_norm_ranks=8), max_epochs=1).global_step == 4


def misfit(options: dict[str, Any], **trainer: Any) -> str:
    fit = tiny_trainer([], devices=2, strategy="ddp", **trainer).fit
    with pytest.raises(InputError) as error:
        fit(tiny_model(**options), datamodule=tiny_data())
    return str(error.value)


def misfits() -> tuple[str, str]:
    return misfit({"batch_norm_ranks": 3}), misfit({"batch_norm_ranks": 2}, sync_batchnorm=True)


def test_mistakes_are_said() -> None:
    with pytest.raises(InputError, match=r"`batch_norm_ranks` must be >= 1; got 0"):
        SimCLR(tiny_model().encoder, batch_norm_ranks=0)
    for first, second in on_ranks(2, misfits):
        assert "a multiple of `batch_norm_ranks`; got 2 and 3" in first
        assert "got `sync_batchnorm` and 2" in second
