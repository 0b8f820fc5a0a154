"""Chunked encoding: the gradient of the whole batch, batch norm updated once, less memory."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from ranks import on_ranks
from tiny import tiny_fit, tiny_model, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_pl import ConvEncoder, InputError, NTXentLoss, SimCLR, nt_xent
from simclr_pl.chunks import encode_in_chunks


class TwoParts(nn.Module):
    """A small encoder with dropout, and a head."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.encoder = nn.Sequential(nn.Linear(6, 16), norm, nn.Tanh(), nn.Dropout(0.3))
        self.projector = nn.Linear(16, 5)
        self.rows: list[int] = []

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(len(x))
        h = self.encoder(x)
        return h, self.projector(h)

    def forward(self, x: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
        return encode_in_chunks(self.encode, x, chunk, self)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


class FixedDropout(nn.Module):
    """Dropout whose mask depends on the rows, so that it is the same at any chunk size."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.sin(1e4 * x.detach()) > -0.5)


@pytest.mark.parametrize("chunk", [1, 5, 7, 12, 13, 14, 100])
def test_gradient_equals_the_whole_batch_in_float64(chunk: int) -> None:
    model = TwoParts().double()
    model.encoder[3] = FixedDropout()
    x = torch.randn(14, 6, dtype=torch.float64)
    results = []
    for size in (None, chunk):
        model.zero_grad()
        h, z = model(x, size)
        loss = nt_xent(z.view(2, 7, 5), temperature=0.2)
        loss.backward()
        results.append([h.detach(), z.detach(), loss.detach(), *gradients(model)])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


def test_dropout_draws_the_same_mask_in_both_runs_of_a_chunk() -> None:
    model = TwoParts().double()
    x = torch.randn(12, 6, dtype=torch.float64)
    torch.manual_seed(3)
    _, z = model(x, 5)
    nt_xent(z.view(2, 6, 5), temperature=0.2).backward()
    chunked = gradients(model)
    # The oracle: the same three calls, in the same order, without recomputation.
    model.zero_grad()
    torch.manual_seed(3)
    z = torch.cat([model.encode(part)[1] for part in x.split(5)])
    nt_xent(z.view(2, 6, 5), temperature=0.2).backward()
    for a, b in zip(chunked, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_every_chunk_but_the_last_runs_twice() -> None:
    model = TwoParts()
    _, z = model(torch.randn(12, 6), 5)
    assert model.rows == [5, 5, 2]
    z.sum().backward()
    assert sorted(model.rows) == [2, 5, 5, 5, 5]


def test_nothing_runs_twice_without_gradient() -> None:
    model = TwoParts()
    with torch.no_grad():
        model(torch.randn(12, 6), 5)
    assert model.rows == [5, 5, 2]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_takes_chunk_statistics_and_moves_once(momentum: float | None) -> None:
    model, oracle = TwoParts(batch_norm=True).double(), TwoParts(batch_norm=True).double()
    oracle.load_state_dict(model.state_dict())
    for m in (model, oracle):
        m.encoder[1].momentum = momentum
        m.encoder[3] = nn.Identity()
    x = torch.randn(12, 6, dtype=torch.float64)
    _, z = model(x, 5)
    nt_xent(z.view(2, 6, 5), temperature=0.2).backward()
    z = torch.cat([oracle.encode(part)[1] for part in x.split(5)])
    nt_xent(z.view(2, 6, 5), temperature=0.2).backward()
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)
    assert model.state_dict()["encoder.1.num_batches_tracked"] == 3
    assert model.encoder[1].momentum == momentum
    for a, b in zip(gradients(model), gradients(oracle), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def chunked_step_on_a_rank(chunk: int | None) -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    model = TwoParts().double()
    model.encoder[3] = FixedDropout()
    ddp = DistributedDataParallel(model)
    reduced = []
    ddp.register_comm_hook(reduced, count_and_average)
    x = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = slice(4 * torch.distributed.get_rank(), 4 * torch.distributed.get_rank() + 4)
    _, z = ddp(x[:, share].flatten(0, 1), chunk)
    nt_xent(z.view(2, 4, 5), temperature=0.2).backward()
    return gradients(model), len(reduced)


def count_and_average(
    reduced: list[int], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    reduced.append(bucket.buffer().numel())
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    size = torch.distributed.get_world_size()
    return work.get_future().then(lambda future: future.value()[0] / size)


def test_ddp_reduces_once_and_gives_the_gradient_of_the_whole_batch() -> None:
    whole = on_ranks(2, chunked_step_on_a_rank, None)
    chunked = on_ranks(2, chunked_step_on_a_rank, 3)
    for (a, calls_a), (b, calls_b) in zip(whole, chunked, strict=True):
        assert calls_a == calls_b == 1
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_chunks_clipping_and_precision(precision: str) -> None:
    runs = [
        weights(
            tiny_fit(
                [],
                tiny_model(batch_norm=False, encode_chunk=chunk),
                precision=precision,
                gradient_clip_val=0.05,
                limit_train_batches=2,
            ).lightning_module
        )
        for chunk in (None, 48)
    ]
    tolerance = 1e-6 if precision == "32-true" else 1e-3
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=0, atol=tolerance)
    fresh = tiny_model(batch_norm=False).state_dict()
    assert any(not torch.equal(runs[1][name], fresh[name]) for name in fresh)


def test_float16_scaler_skips_an_infinite_step_and_takes_the_next() -> None:
    """The logic of 16-mixed on the CPU: one scale, chunks, one optimiser step."""
    model = TwoParts()
    solver = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = weights(model)
    for poison in (float("inf"), 1.0):
        solver.zero_grad()
        with torch.autocast("cpu", torch.float16):
            _, z = model(torch.randn(12, 6), 5)
            loss = nt_xent(z.view(2, 6, 5), temperature=0.2)
        scaler.scale(loss * poison).backward()
        scaler.step(solver)
        scaler.update()
        moved = any(not torch.equal(start[n], v) for n, v in model.state_dict().items())
        assert moved == (poison == 1.0)
    assert scaler.get_scale() == 2.0**9


def test_chunk_must_be_positive() -> None:
    with pytest.raises(InputError, match="`encode_chunk` must be >= 1; got 0"):
        SimCLR(ConvEncoder(4), encode_chunk=0)


def test_statistics_and_learnable_temperature_are_logged() -> None:
    class Logged(Callback):
        def __init__(self) -> None:
            self.names: list[set[str]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.names.append(set(trainer.callback_metrics))

    logged = Logged()
    model = tiny_model(loss=lambda t: NTXentLoss(t, learnable=True))
    start = model.loss.log_temperature.detach().clone()
    trainer = tiny_fit([logged], model, log_every_n_steps=2)
    new = {"train/top1", "train/positive_similarity", "train/negative_similarity", "train/entropy"}
    assert not new & logged.names[0]
    assert new <= logged.names[1]
    assert 0 <= trainer.callback_metrics["train/top1"] <= 1
    assert not torch.equal(model.loss.log_temperature, start)


PEAK = """
import os, sys, torch
from simclr_pl import ConvEncoder, nt_xent
from simclr_pl.chunks import encode_in_chunks
torch.set_num_threads(1)
model = ConvEncoder(16)
x = torch.randn(1024, 3, 32, 32)
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
def step(rows, chunk):
    def encode(part):
        h = model(part)
        return h, h
    _, z = encode_in_chunks(encode, rows, chunk, model)
    nt_xent(z.view(2, -1, 128)).backward()
for case in sys.argv[1:]:
    if os.fork():  # a process for each, with the imports of this one
        assert os.wait()[1] == 0
        continue
    rows, chunk = map(int, case.split("/"))
    step(x[:8], 4)  # libraries
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far was that of the imports
    before = peak()
    step(x[:rows], chunk)
    print((peak() - before) / 1024, flush=True)
    os._exit(0)
"""


def peaks_mib(*cases: str) -> list[float]:
    """Of a step with "rows/chunk", each."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *cases],
        capture_output=True,
        text=True,
        check=True,
        # glibc would raise this threshold as it goes, and then keep what was freed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return [float(line) for line in done.stdout.splitlines()]


def test_peak_memory_is_that_of_one_chunk() -> None:
    one_chunk, eight_chunks, whole = peaks_mib("128/128", "1024/128", "1024/1024")
    assert eight_chunks < 1.3 * one_chunk
    assert whole > 4 * one_chunk
