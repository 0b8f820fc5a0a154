"""What strategies need of the model: shards of the weights, shared statistics of batch norm.

Symbols: W ranks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from simclr_pl.distributed import world_size
from simclr_pl.errors import InputError
from simclr_pl.gpu import triton_serves

_WHOLE = StateDictOptions(full_state_dict=True)
_STEPS_THAT_PAY = 5000  # a minute of compiling at a gain of 10 ms a step; guessed, not timed


class FullySharded(ModelParallelStrategy):
    """FSDP over all ranks: each keeps a part of every weight, its gradient and its momentum.

    It is torch's `fully_shard`, and `--trainer.strategy fsdp` on the command line.

    The maths are those of `ddp`: gradients are averaged, and `LARS` takes the norms of whole tensors.
    Checkpoints hold whole tensors, too, so that a run may go on with any strategy and number of ranks.

    Not Lightning's FSDPStrategy: that makes flat pieces of the weights, which no longer say what is a
    matrix and what a bias.
    """

    def setup_environment(self) -> None:
        """Puts all ranks into one group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        self._save_distributed_checkpoint = False
        super().setup_environment()

    # Lightning's own do not load by the `CheckpointIO`, and number the optimiser's states as the model
    # has its parameters, not as the optimiser's groups do.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """That `load_optimizer_state_dict` is to be called."""
        return True

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint as all strategies do."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights, whole, on every rank. Collective."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=_WHOLE)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this rank's parts of the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state, of whole tensors, on every rank. Collective."""
        return apply_to_collection(  # type: ignore[no-any-return]
            optimizer.state_dict(), DTensor, lambda part: part.full_tensor().cpu()
        )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's parts of the optimiser's state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            state = {i: _parts(values, params[i]) for i, values in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})


def _parts(values: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Splits the state of one parameter as the parameter is."""
    assert isinstance(like, DTensor)
    return {
        name: distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        if isinstance(value, Tensor) and value.shape == like.shape
        else value
        for name, value in values.items()
    }


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a network's blocks, each to be gathered by itself, and what is outside of them as one.

    Args:
        model: an encoder or a projector. Blocks are the modules in its lists and sequences that are made
            of others, e.g. of a ResNet or a transformer.
        mesh: of one dimension, W.
    """
    if isinstance(model, FSDPModule):
        return  # by an earlier `fit` or `validate`
    model.to(memory_format=torch.contiguous_format)  # fully_shard refuses channels_last
    lists = [m for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]
    for row in reversed(lists):  # the innermost first
        for block in row:
            if any(block.children()) and any(p.requires_grad for p in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def check_strategy(trainer: Trainer) -> None:
    """Refuses what would shard the weights otherwise.

    Raises:
        InputError: another strategy for sharding.
    """
    strategy = trainer.strategy
    others = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
    if others and not isinstance(strategy, FullySharded):
        raise InputError(
            "sharded weights must keep their shapes, which LARS and weight decay go by; got "
            f"{type(strategy).__name__}. Set `trainer.strategy` to simclr_pl.strategies.FullySharded."
        )


def pays_to_compile(trainer: Trainer, model: nn.Module) -> bool:
    """Whether torch can compile what encodes, and the run is long enough to win back the time.

    Not where layers talk to other ranks: there a compiler only finds pieces.

    Args:
        trainer: in ``on_train_start``.
        model: on its device.
    """
    if trainer.estimated_stepping_batches < _STEPS_THAT_PAY or not triton_serves(
        trainer.strategy.root_device
    ):
        return False
    from simclr_pl.batch_norm import SharedBatchNorm  # timm takes a while to import

    talking = (FSDPModule, nn.SyncBatchNorm, SharedBatchNorm)
    return not any(isinstance(module, talking) for module in model.modules())


def ranks_to_share(trainer: Trainer, batch_norm_ranks: int) -> int:
    """How many ranks share the statistics of batch norm; takes `sync_batchnorm` over from Lightning.

    Lightning would use torch's SyncBatchNorm, which cannot be used on a CPU, and not with
    every strategy.

    Raises:
        InputError: both are given.
    """
    strategy = trainer.strategy
    if type(getattr(strategy, "_layer_sync", None)) is not TorchSyncBatchNorm:
        return batch_norm_ranks
    if batch_norm_ranks > 1:
        raise InputError(
            "all ranks share batch norm, or groups of them; got `sync_batchnorm` and "
            f"{batch_norm_ranks} for `batch_norm_ranks`. Leave out `trainer.sync_batchnorm` or "
            "`model.batch_norm_ranks`."
        )
    strategy._layer_sync = None  # type: ignore[attr-defined]
    return world_size()
