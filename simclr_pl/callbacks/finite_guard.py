"""Updates that are not finite are not made.

Symbols: B samples of this rank's batch, V views, E feature width, N samples of an update on all ranks.
"""

import csv
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from simclr_pl.callbacks.delayed import DelayedReader, Read
from simclr_pl.distributed import gather_uneven_rows
from simclr_pl.errors import InputError

_log = logging.getLogger(__name__)

_FREE = ("cpu",)  # devices on which a look at a number waits for nothing
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class FiniteGuard(Callback):
    """Makes no update whose loss or gradient is not finite on any rank.

    Weights, the optimiser's state and the running statistics then stay as they were, on all ranks, to
    the bit. The batch is used up and the step counts, so that the learning rate goes on. The step, its
    loss, the norm of its gradient, the gradient's scale and the samples are reported, where there are
    any those whose features are not finite, and written to `bad_steps.tsv` in the run's folder. What is
    not finite is never saved.

    A GPU is not waited for, and reports come four steps later. One of torch's `fused` optimisers is told
    on the device to leave out a bad update. Of any other the guard keeps what an update changes, another
    copy of weights and optimiser state (0.2 GB for a ResNet-50 with momentum), and takes it back; one
    that counts its steps on the host, as torch's AdamW does, makes it wait in every step. In 16-mixed
    precision gradients that overflow are normal, and count only once their scale has come down to 1.

    Args:
        max_in_a_row: bad updates in a row that stop the run.

    Raises:
        InputError: `max_in_a_row` < 1; so many bad updates in a row; what is to be saved is not finite.
    """

    def __init__(self, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise InputError(
                f"`max_in_a_row` must be >= 1; got {max_in_a_row}. Set `finite.max_in_a_row`."
            )
        self.max_in_a_row = max_in_a_row

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares for the run's device and optimiser."""
        self._in_a_row = 0
        self._reader = DelayedReader(pl_module.device)
        self._losses: list[Tensor] = []  # of the batches of one update, () each
        # Of these, (B, 2) or (V*B, 2) int64: index, 1 where features are finite
        self._samples: list[Tensor] = []
        self._seen: tuple[Tensor, int, float] | None = None  # (3,) bad, loss, norm; step; scale
        self._buffers = list(pl_module.buffers())
        self._old_buffers = [torch.empty_like(b) for b in self._buffers]
        self._updated: set[int] = set()  # parameters that the last update changed, by id
        self._old: list[Tensor] = []
        self._bad: Tensor | None = None  # () bool, of an update that may have to be taken back
        trainer.optimizers[0].register_step_post_hook(self._take_back)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the running statistics as they are before the first batch of an update."""
        if self._buffers and not self._losses:
            torch._foreach_copy_(self._old_buffers, self._buffers)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Notes the loss of a batch."""
        self._losses.append(loss.detach().float())

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Looks at loss and gradient.

        Both are the same on all ranks, so that these need not agree: the loss is that of all rows, and
        the gradient is averaged, or, where it is sharded, its norm is that of the whole.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # It waits for the device, but so does the scaler itself in the next moment.
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        loss = torch.stack(self._losses).sum() / scale
        norm = get_total_norm([p.grad for p in params])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        bad = ~loss.isfinite()
        if scale <= 1:
            bad = bad | ~norm.isfinite()
        self._seen = (torch.stack([bad.float(), loss, norm.float()]), trainer.global_step, scale)
        if bad.device.type not in _FREE or bad:
            _put_back(self._buffers, self._old_buffers, bad)
        self._leave_out(optimizer, params, bad, scaled=scaler is not None)

    def _leave_out(self, optimizer: Any, params: list[Tensor], bad: Tensor, scaled: bool) -> None:
        """Takes the gradients away where the update is bad, or keeps what it is about to change."""
        tells = getattr(optimizer, "_step_supports_amp_scaling", False) and not scaled
        changed = [] if tells else _changed(optimizer)
        before, self._updated = self._updated, {id(p) for p in params}
        # A first update makes the optimiser's state: there is nothing yet that could be put back.
        first = before != self._updated
        if bad.device.type in _FREE or first or any(t.device != bad.device for t in changed):
            self._bad = None
            if bad:
                self._updated = set()
                for p in params:
                    p.grad = None
            return
        if tells:  # as a gradient scaler does
            self._bad, optimizer.found_inf = None, bad.float()
            return
        self._bad = bad
        if len(self._old) != len(changed):
            self._old = [torch.empty_like(t) for t in changed]
        torch._foreach_copy_(self._old, changed)

    def _take_back(self, optimizer: Optimizer, *_: Any) -> None:
        """Right after an update: nobody has seen the weights yet."""
        if self._bad is not None:
            _put_back(_changed(optimizer), self._old, self._bad)
        elif getattr(optimizer, "found_inf", None) is not None:
            optimizer.found_inf = None  # type: ignore[attr-defined]

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Reports the bad updates that are known by now."""
        index, h = outputs["index"], outputs["features"]  # (B,), (V*B, E)
        finite = h.isfinite().all(1)  # (V*B,)
        if "ids" in outputs:  # views stand in for those of other samples
            index = outputs["ids"].flatten()  # (V*B,)
        else:
            finite = finite.view(-1, len(index)).all(0)  # (B,)
        self._samples.append(torch.stack([index, finite.long()], 1))
        if self._seen is None:
            return  # gradients are being accumulated
        values, step, scale = self._seen
        self._reader.push(values, (step, scale, self._samples))
        self._seen, self._losses, self._samples = None, [], []
        self._report(trainer, self._reader.read())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports the last ones, and needs no memory any more."""
        self._old = []
        self._report(trainer, self._reader.read(everything=True))

    def _report(self, trainer: Trainer, reads: list[Read]) -> None:
        """Counts and reports; the same on all ranks, for they read the same."""
        for (bad, loss, norm), (step, scale, samples) in reads:
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if bad:
                _write(trainer, torch.cat(samples), [step, loss, norm, scale])
            if self._in_a_row == self.max_in_a_row:
                raise InputError(
                    f"loss and gradient must be finite; got {self._in_a_row} updates in a row that "
                    f"are not, up to step {step}, and made none of them. See bad_steps.tsv in the "
                    "run's folder for the samples; set `model.optimizer.lr` lower, or "
                    "`finite.max_in_a_row` higher."
                )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses what is not finite; all ranks have whole weights here, and the same."""
        saved = dict(checkpoint["state_dict"])
        for number, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
            for i, state in optimizer["state"].items():
                saved |= {f"optimizer {number}, {i}, {name}": v for name, v in state.items()}
        for name, value in saved.items():
            if isinstance(value, Tensor) and not value.isfinite().all():
                raise InputError(
                    f"what is saved must be finite; got {name!r} at step {trainer.global_step}, and "
                    "saved nothing. Resume from an earlier checkpoint with a lower "
                    "`model.optimizer.lr`."
                )


def _local(tensor: Tensor) -> Tensor:
    """Of a sharded tensor, this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _changed(optimizer: Optimizer) -> list[Tensor]:
    """What an update changes, in a fixed order: each parameter, then its state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in params for t in (p, *optimizer.state.get(p, {}).values())]
    return [_local(t) for t in tensors if isinstance(t, Tensor)]


@torch.no_grad()
def _put_back(now: Iterable[Tensor], before: Iterable[Tensor], bad: Tensor) -> None:
    """Gives tensors their old values where ``bad`` () is true, and uses up the memory of these.

    In a few launches, however many tensors there are: bits times 0 or 1 are taken as whole numbers, for
    which nothing is not finite. (`torch.where` is one launch for each: 480 a step for a ResNet-50.)
    """
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for pair in zip(now, before, strict=True):
        whole = _WHOLE[pair[0].element_size()]
        for group, tensor in zip(groups.setdefault(whole, ([], [])), pair, strict=True):
            group.append(tensor.view(whole))
    for whole, (new, old) in groups.items():
        torch._foreach_mul_(new, (~bad).to(whole))
        torch._foreach_mul_(old, bad.to(whole))
        torch._foreach_add_(new, old)


def _write(trainer: Trainer, samples: Tensor, numbers: list[float]) -> None:
    """Appends a bad update's samples to the file, from (n, 2) on each rank. Collective."""
    found = gather_uneven_rows(samples).tolist()  # of index, 1 where features are finite
    everything = dict.fromkeys(i for i, _ in found)  # N, in order
    suspects = dict.fromkeys(i for i, finite in found if not finite) or everything
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # collective
    if not trainer.is_global_zero:
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = trainer.datamodule  # type: ignore[attr-defined]
    names, unit = data.samples("train"), data.source.unit
    # Names of files need not be valid text.
    file = folder / "bad_steps.tsv"
    with open(file, "a", newline="", encoding="utf-8", errors="surrogateescape") as out:
        table = csv.writer(out, delimiter="\t", lineterminator="\n")
        if not out.tell():
            table.writerow(["step", "loss", "gradient_norm", "scale", "sample"])
        table.writerows([*numbers, names.name(i)] for i in suspects)
    step, loss, norm, scale = numbers
    _log.warning(
        "step %d: loss %g, gradient norm %g, scale %g: no update. Its %d %s are in %s",
        *(step, loss, norm, scale, len(suspects)),
        unit + ("" if suspects is everything else " without finite features"),
        file,
    )
