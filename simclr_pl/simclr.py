"""The LightningModule.

Symbols: B images on this rank, V views, E feature width, D projection width, h features, z projections.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from simclr_pl.chunks import encode_in_chunks
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream, keys
from simclr_pl.losses import NTXentLoss, Statistics
from simclr_pl.models import Projector, feature_width
from simclr_pl.optim import LARS, LRScaling, lr_factor, parameter_groups, warmup_cosine
from simclr_pl.secrets import masked, plain
from simclr_pl.strategies import check_strategy, pays_to_compile, ranks_to_share, shard

if TYPE_CHECKING:
    from simclr_pl.callbacks.step_log import StepLog

Batch = dict[str, Tensor]


class SimCLR(LightningModule):
    """SimCLR: encoder, projection head and the NT-Xent loss over the images of all ranks.

    Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual
    Representations", arXiv:2002.05709.

    Args:
        encoder: maps views, of images (n, C, H, W), to features (n, E), e.g. `Encoder` or `ConvEncoder`.
        projector: maps features to projections (n, D): a module, or a callable that makes one from E.
        temperature: divides the similarities in the loss.
        loss: makes the loss from the temperature, or is the loss.
        encode_chunk: views encoded at a time, to train with batches whose activations do not fit; see
            `simclr_pl.chunks.encode_in_chunks`. By default all at once.
        optimizer: makes the optimiser from parameter groups; its learning rate is the base rate.
        lr_scaling: how the base rate grows with the global batch: "linear" batch / 256, "sqrt"
            sqrt(batch), or "none".
        warmup_epochs: epochs of linear warm-up; a cosine to 0 follows, step by step.
        lr_cycles: cosines after the warm-up, of equal length, each from the peak to 0.
        seed: fixes dropout and the like; a step's random numbers depend on (seed, step, rank) alone.
        batch_norm_ranks: ranks that share the statistics of batch norm, in groups of so many; by default
            each has its own. For all ranks set `trainer.sync_batchnorm` to true instead.
        compile: train encoder and projector as `torch.compile` makes them, once for each size of views,
            which takes about a minute; by default on a GPU, where a run has 5,000 steps or more and
            neither `encode_chunk`, nor shared statistics, nor shards of weights. Results then differ
            by rounding.

    Attributes:
        num_features: the feature width E.

    Raises:
        InputError: temperature <= 0, warmup_epochs < 0, lr_cycles < 1, encode_chunk < 1,
            batch_norm_ranks < 1, or the encoder's output is no feature vector.
    """

    _step_log: "StepLog | None" = None

    def __init__(
        self,
        encoder: nn.Module,
        projector: Callable[[int], nn.Module] = Projector,
        temperature: float = 0.5,
        loss: Callable[[float], NTXentLoss] = NTXentLoss,
        encode_chunk: int | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] = LARS,
        lr_scaling: LRScaling = "linear",
        warmup_epochs: float = 10.0,
        lr_cycles: int = 1,
        seed: int = 0,
        batch_norm_ranks: int = 1,
        compile: bool | None = None,
    ) -> None:
        super().__init__()
        if warmup_epochs < 0:
            raise InputError(
                f"`warmup_epochs` must be >= 0; got {warmup_epochs}. Set `model.warmup_epochs`."
            )
        if lr_cycles < 1:
            raise InputError(f"`lr_cycles` must be >= 1; got {lr_cycles}. Set `model.lr_cycles`.")
        if encode_chunk is not None and encode_chunk < 1:
            raise InputError(
                f"`encode_chunk` must be >= 1; got {encode_chunk}. Set `model.encode_chunk`, or null."
            )
        if batch_norm_ranks < 1:
            raise InputError(
                f"`batch_norm_ranks` must be >= 1; got {batch_norm_ranks}. Set "
                "`model.batch_norm_ranks`."
            )
        # From the command line the hyper-parameters are its plain values, class paths included. From
        # Python the objects among the arguments would be pickled into every checkpoint: leave them.
        from_python = _given_hyperparameters.get() is None
        self.save_hyperparameters(
            ignore=["encoder", "projector", "loss", "optimizer"] if from_python else []
        )
        # What trackers and checkpoints get, which a checkpoint that runs nothing can hold
        parameters = masked(plain(dict(self.hparams)))
        self._set_hparams(parameters)
        self._hparams_initial = copy.deepcopy(self.hparams)
        self.encoder = encoder.to(memory_format=torch.channels_last)  # quicker on CPU and GPU
        self.num_features = feature_width(encoder)
        self.projector = (
            projector if isinstance(projector, nn.Module) else projector(self.num_features)
        )
        self.loss = loss if isinstance(loss, NTXentLoss) else loss(temperature)
        self.encode_chunk = encode_chunk
        self.optimizer = optimizer
        self.lr_scaling = lr_scaling
        self.warmup_epochs, self.lr_cycles = warmup_epochs, lr_cycles
        self.seed = seed
        self.batch_norm_ranks = batch_norm_ranks
        self.compile_encoder = compile
        self._compiled: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # while training

    def setup(self, stage: str) -> None:
        """Checks that there are pairs to learn from; lets ranks share the statistics of batch norm.

        Raises:
            InputError: the data module gives one view of each image; the strategy or `batch_norm_ranks`
                does not fit.
        """
        views = getattr(getattr(self.trainer, "datamodule", None), "n_views", 2)
        if stage == "fit" and views < 2:
            raise InputError(
                f"contrastive training needs >= 2 views of each image; got {views}. Set "
                "`data.n_views`."
            )
        source = getattr(getattr(self.trainer, "datamodule", None), "source", None)
        check: Any = getattr(self.encoder, "check_source", None)
        if source is not None and check is not None:
            check(source)  # an encoder may know what it cannot take, e.g. a larger vocabulary
        check_strategy(self.trainer)
        if stage == "fit" and (ranks := ranks_to_share(self.trainer, self.batch_norm_ranks)) > 1:
            from simclr_pl.batch_norm import share_batch_norm

            share_batch_norm(self, ranks, self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Shards the weights under the strategy `FullySharded`.

        Raises:
            InputError: the temperature is learnable, and a single number cannot be sharded.
        """
        if self.device_mesh is None:
            return
        if any(p.requires_grad for p in self.loss.parameters()):
            raise InputError(
                "what is sharded must have rows; got a learnable temperature. Set `trainer.strategy` to "
                "ddp, or `model.loss.learnable` to false."
            )
        for part in (self.encoder, self.projector):
            shard(part, self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        """Maps views (n, ...), of images (n, C, H, W), to features (n, E), what downstream tasks use."""
        if x.is_floating_point():  # as the weights, also in the precisions 64-true and bf16-true
            x = x.to(next(self.encoder.parameters()).dtype)
        if x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        return self.encoder(x)  # type: ignore[no-any-return]

    def on_train_start(self) -> None:
        """Has torch compile what encodes, at the first step."""
        wanted = self.compile_encoder
        if wanted is None:
            wanted = self.encode_chunk is None and pays_to_compile(self.trainer, self)
        self._compiled = torch.compile(self._encode, dynamic=False) if wanted else None

    def on_train_end(self) -> None:
        """Leaves a module that can be copied and pickled."""
        self._compiled = None

    def configure_callbacks(self) -> list[Callback]:
        """Adds what brings the numbers of steps to the loggers, where it is missing."""
        from simclr_pl.callbacks.step_log import StepLog

        self._step_log = StepLog.of(self.trainer)
        return [] if self._step_log in self.trainer.callbacks else [self._step_log]  # type: ignore[attr-defined]

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Lightning's; a step's number goes by `StepLog`, without a wait for the device."""
        log = None if args else self._step_log
        if log is None or not log.take(self.trainer, name, value, **options):
            super().log(name, value, *args, **options)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds torch for this step, so that a resumed run draws what an uninterrupted one does."""
        step = self.trainer.fit_loop.total_batch_idx
        seed = int(keys(self.seed, Stream.STEP, step, self.global_rank) >> 1)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 75 us, for all devices
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def on_train_batch_end(self, *_: Any) -> None:
        """Sends off what the step has logged."""
        if self._step_log is not None:
            self._step_log.end_step(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One step on the views of a batch: one forward for each size of views.

        All views of an image are each other's positives, small ones too: each is compared with every
        other one, and the loss of a view is the mean over its positives.

        Args:
            batch: ``views`` (V*B, ...), all of view 0 first; where there are small views, also
                ``small_views`` (V'*B, ...); ``label`` and ``index`` (B,); where views may show other
                samples than their own, ``ids`` (V, B), what each shows, and ``row_label`` (V*B,).
            batch_idx: not used.

        Returns:
            ``loss``; of all views, detached, ``features`` (V*B, E) and ``projections`` (V*B, D);
            ``label`` (B,), ``index`` (B,), ``row_label`` (V*B,), and ``ids`` if given.
        """
        sizes = [batch[name] for name in ("views", "small_views") if name in batch]
        encode = self._compiled or self._encode
        parts = [encode_in_chunks(encode, x, self.encode_chunk, self) for x in sizes]
        h, z = (torch.cat(rows) if len(sizes) > 1 else rows[0] for rows in zip(*parts, strict=True))
        statistics: list[Statistics] | None = [] if self._logs_this_step() else None
        views = z.view(-1, len(batch["index"]), z.shape[1])  # (V, B, D)
        loss = self.loss(views, batch.get("ids"), statistics=statistics)
        self.log("train/loss", loss.detach(), prog_bar=True)
        for seen in statistics or ():
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            values = {"learning_rate": rate, **seen._asdict()}
            self.log_dict({f"train/{name}": value for name, value in values.items()})
        label = batch["label"]
        outputs = {"loss": loss, "features": h.detach(), "projections": z.detach()}
        outputs |= {"label": label, "index": batch["index"]}
        if "ids" in batch:
            return outputs | {"row_label": batch["row_label"], "ids": batch["ids"]}
        return outputs | {"row_label": label.repeat(len(views))}

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self(x)  # (n, E)
        return h, self.projector(h)  # (n, D)

    def _logs_this_step(self) -> bool:
        every = int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % max(1, every) == 0

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Features of clean views, without the sampler's padding.

        Returns:
            ``features`` (n, E), ``label`` (n,), ``index`` (n,), where n <= B.
        """
        real = batch["index"] >= 0
        features = self(batch["views"])[real]
        return {
            "features": features,
            "label": batch["label"][real],
            "index": batch["index"][real],
        }

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The same as `validation_step`."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """The same as `validation_step`."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def configure_optimizers(self) -> Any:
        """The optimiser on the paper's parameter groups, its rate scaled, and the schedule by step."""
        self.trainer.fit_loop.setup_data()  # Lightning skips it where only `max_steps` is given
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise InputError(
                "the length of training must be known for the cosine; got no limit. Set "
                "`trainer.max_epochs` or `trainer.max_steps`."
            )
        groups, _ = parameter_groups(self)
        optimizer = self.optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= lr_factor(self.lr_scaling, self._images_per_update())
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        schedule = LambdaLR(
            optimizer,
            lambda step: warmup_cosine(step, warmup_steps, int(total_steps), self.lr_cycles),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _images_per_update(self) -> int:
        batch: int | None = getattr(
            getattr(self.trainer, "datamodule", None), "global_batch_size", None
        )
        if batch is None:
            if self.lr_scaling == "none":
                return 1
            raise InputError(
                "scaling the learning rate needs the global batch size; got a data module without "
                "`global_batch_size`. Set `model.lr_scaling` to none, or use ContrastiveDataModule."
            )
        return batch * self.trainer.accumulate_grad_batches

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> "SimCLR":
        """Lightning's, which runs nothing that the file holds (its own would, for addresses).

        Raises:
            InputError: ``weights_only`` is False.
        """
        if options.setdefault("weights_only", True) is not True:
            raise InputError(
                "`weights_only` must be true, or a checkpoint could run any code; got "
                f"{options['weights_only']}. Leave `weights_only` out."
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **options)  # type: ignore[return-value]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this model.

        Raises:
            InputError: it names other parameters, or other shapes.
        """
        theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        different = sorted(
            name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
        )
        if different:
            name = different[0]
            raise InputError(
                f"a checkpoint must be of the model that is configured; got one that differs in "
                f"{len(different)} tensors, first {name!r} ({theirs.get(name, 'absent')} in the "
                f"checkpoint, {ours.get(name, 'absent')} in the model). Set `model.encoder` and "
                "`model.projector` as in the run that wrote it."
            )
