"""Memory and time of a training step, measured at growing batches and carried on to the whole.

Symbols: B samples of a rank's batch, V views, D projection width.
"""

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simclr_pl.chunks import encode_in_chunks
from simclr_pl.doctor.children import Send
from simclr_pl.doctor.configured import Kind, build
from simclr_pl.doctor.lines import Level, Line, duration, size
from simclr_pl.optim import parameter_groups

_RESERVE = 0.8  # of the free memory that a measurement may take, and a run should


class Measured(NamedTuple):
    """One step at one batch.

    Attributes:
        samples: B.
        seconds: of the step.
        peak: bytes of memory, of the process on the CPU and of the tensors on a GPU.
    """

    samples: int
    seconds: float
    peak: int


class Forecast(NamedTuple):
    """A step at the whole batch.

    Attributes:
        seconds: of the step.
        peak: bytes.
        activations: bytes of one sample's views, which is what `encode_chunk` saves.
        measured: whether the whole was measured, not carried on from smaller batches.
    """

    seconds: float
    peak: float
    activations: float
    measured: bool


def measure(
    send: Send,
    rank: int,
    args: list[str],
    kinds: list[Kind],
    samples: int,
    memory: int,
    seconds: float,
    threads: int,
) -> None:
    """Sends what is known of the model, then a `Measured` for each batch that is tried.

    Args:
        send: gets a mapping, then tuples, the first of no sample; at last words, where a GPU is full.
        rank: not used.
        args: as those of `fit`.
        kinds: what the views of a sample are like.
        samples: B of the run, the last batch that is tried.
        memory: bytes that the steps may take.
        seconds: no batch is tried that would end later.
        threads: of torch on the CPU.
    """
    torch.set_num_threads(threads)
    cli = build(args)
    plugin, device = cli.trainer.precision_plugin, cli.trainer.strategy.root_device
    model: Any = plugin.convert_module(cli.model).to(device).train()
    optimizer = model.optimizer(parameter_groups(model)[0])
    began = time.perf_counter()
    tried: list[Measured] = []
    try:
        _one(model, optimizer, plugin, kinds, 2, device)  # compiles, makes the buffers
        send(_about(model, optimizer))
        tried.append(Measured(0, 0.0, _now(device)))
        for count in batches(samples):
            if len(tried) > 1 and not _goes_on(tried, count, memory, began + seconds):
                break
            send(tuple(tried[-1]))
            # once is enough to carry on from; of a quick whole batch, the best of three
            times = 3 if count == samples and tried[-1].seconds < 1 else 1
            steps = [_one(model, optimizer, plugin, kinds, count, device) for _ in range(times)]
            tried.append(min(steps, key=lambda m: m.seconds))
        send(tuple(tried[-1]))
    except torch.cuda.OutOfMemoryError:
        send("does not fit into the GPU's memory")


def batches(samples: int) -> list[int]:
    """2, 4, 8 ... samples, and at last all."""
    return [*(2**k for k in range(1, 31) if 2**k < samples), samples]


def _goes_on(tried: Sequence[Measured], count: int, memory: int, deadline: float) -> bool:
    last = tried[-1]
    seconds = last.seconds * count / last.samples
    peak = carry_on(tried, count, None, 0).peak
    return peak < _RESERVE * memory and time.perf_counter() + seconds < deadline


def _one(
    model: Any,
    optimizer: torch.optim.Optimizer,
    plugin: Any,
    kinds: Sequence[Kind],
    count: int,
    device: torch.device,
) -> Measured:
    _reset_peak(device)
    began = time.perf_counter()
    optimizer.zero_grad()
    sizes = [_made_up(kind, count, device) for kind in kinds]
    with plugin.forward_context():
        loss = _loss(model, sizes, count)
    loss.backward()
    optimizer.step()
    loss.item()  # waits for the device
    return Measured(count, time.perf_counter() - began, _peak(device))


def _made_up(kind: Kind, count: int, device: torch.device) -> Tensor:
    """Views (V*B, ...) of random numbers."""
    shape = (kind.number * count, *kind.shape)
    if kind.highest is None:
        return torch.rand(shape, device=device)
    return torch.randint(kind.highest + 1, shape, device=device)


def _loss(model: Any, sizes: Sequence[Tensor], count: int) -> Tensor:
    """As `SimCLR.training_step`, which needs a trainer at work."""
    parts = [encode_in_chunks(model._encode, x, model.encode_chunk, model)[1] for x in sizes]
    z = torch.cat(parts)
    loss: Tensor = model.loss(z.view(-1, count, z.shape[1]))
    return loss


def _about(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights = _bytes(model.state_dict().values())
    states = _bytes(v for s in optimizer.state.values() for v in s.values())
    return {
        "encoder": sum(p.numel() for p in model.encoder.parameters()),
        "head": sum(p.numel() for p in model.projector.parameters()),
        "gradients": _bytes(p for p in model.parameters() if p.requires_grad),
        "checkpoint": weights + states,
        "optimizer": type(optimizer).__name__,
        "rate": float(optimizer.param_groups[0]["lr"]),
    }


def _bytes(values: Any) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or not allowed: batches grow, and so does the peak
        Path("/proc/self/clear_refs").write_text("5")


def _now(device: torch.device) -> int:
    """Bytes between steps: weights, gradients, the optimiser's state and what the process is."""
    _reset_peak(device)
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def carry_on(
    tried: Sequence[Measured], samples: int, chunk: int | None, one_input: int
) -> Forecast:
    """Memory and time at ``samples``, by a straight line through what was measured.

    Args:
        tried: at growing batches, at least two; the first of no sample.
        samples: B of the run.
        chunk: samples that are encoded at a time; None for all.
        one_input: bytes of one sample's views, which are there for all samples.
    """
    whole = next((m for m in tried if m.samples == samples), None)
    last = tried[-1]
    within = [m for m in tried if chunk is None or m.samples <= chunk]
    within = within if len(within) > 1 else list(tried[:2])
    activations = _slope([(m.samples, m.peak) for m in within])
    if whole is not None:
        return Forecast(whole.seconds, whole.peak, activations, True)
    beyond = [m for m in tried if chunk is not None and m.samples > chunk]
    at_once = samples if chunk is None else min(samples, chunk)
    seconds = last.seconds + (samples - last.samples) * _slope(
        [(m.samples, m.seconds) for m in tried]
    )
    if beyond:
        slope: float = one_input
        if len(beyond) > 1:
            slope = max(slope, _slope([(m.samples, m.peak) for m in beyond]))
        peak = last.peak + (samples - last.samples) * slope
    else:
        peak = last.peak + max(0, at_once - last.samples) * activations
        peak += (samples - at_once) * one_input
        if chunk is not None and samples > chunk:
            seconds *= 4 / 3  # all chunks but the last run forward twice
    return Forecast(seconds, peak, activations, False)


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """The rise from one point to the next, at the last two."""
    (a, low), (b, high) = points[-2:]
    return max(0.0, (high - low) / (b - a))


class Asked(NamedTuple):
    """What a step is to hold.

    Attributes:
        samples: B of the run.
        kinds: what the views of a sample are like.
        chunk: `encode_chunk`, in views.
        memory: bytes that one rank may take.
        unit: what samples are called.
    """

    samples: int
    kinds: Sequence[Kind]
    chunk: int | None
    memory: int
    unit: str = "images"

    @property
    def one_input(self) -> int:
        """Bytes of one sample's views."""
        return sum(kind.bytes for kind in self.kinds)


def fit_line(tried: Sequence[Measured], ending: str, asked: Asked) -> tuple[Line, Forecast | None]:
    """Whether a batch fits, and what a step of it takes.

    Args:
        tried: at growing batches.
        ending: what ended the measurement before its time; empty for nothing.
        asked: the batch.
    """
    remedy = "Set --model.encode_chunk 2, a smaller encoder or smaller views."
    if len(tried) < 2:
        if "killed" not in ending and "memory" not in ending:  # an exception of the model's
            remedy = f"Make the encoder, the head and the {asked.unit} fit each other."
        return Line("error", "batch", f"not even 2 {asked.unit}: the step {ending}", remedy), None
    views = sum(kind.number for kind in asked.kinds)
    chunk = None if asked.chunk is None else max(1, asked.chunk // views)
    forecast = carry_on(tried, asked.samples, chunk, asked.one_input)
    text = f"{asked.samples:,} {asked.unit} a rank: {size(forecast.peak)} of {size(asked.memory)}, "
    text += f"{duration(forecast.seconds)} a step"
    last = tried[-1].samples
    text += "; measured" if forecast.measured else f"; carried on from {last:,}"
    if forecast.peak <= _RESERVE * asked.memory and not ending:
        return Line("ok", "batch", text), forecast
    fits = chunk_for(forecast, asked, views)
    if fits is not None:
        remedy = f"Set --model.encode_chunk {fits}: same batch, a third more time."
    if ending:
        text += f"; beyond {last:,} the step {ending}"
    level: Level = "error" if ending or forecast.peak > asked.memory else "warning"
    return Line(level, "batch", text, remedy), forecast


def chunk_for(forecast: Forecast, asked: Asked, views: int) -> int | None:
    """The most views, a power of two, that may be encoded at a time; None if even two are too many.

    Args:
        forecast: of the batch; with a chunk that is too large, or with none.
        asked: the batch.
        views: of a sample.
    """
    at_once = asked.samples if asked.chunk is None else min(asked.samples, asked.chunk // views)
    saved = max(1.0, forecast.activations - asked.one_input)  # by each sample that is not encoded
    room = _RESERVE * asked.memory - (forecast.peak - at_once * saved)
    rows = int(room / (saved / views))
    return 2 ** (rows.bit_length() - 1) if rows >= 2 else None
