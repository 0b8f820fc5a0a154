"""Where a run stands in the order of its images."""

from typing import Any

from lightning.pytorch import Trainer

from simclr_pl.errors import InputError


def steps_done(trainer: Trainer | None) -> int:
    """Global batches of this epoch that the trainer has taken; 0 where there is no trainer.

    Its own count, so that data and loop agree after every resume. The loader cannot know: its workers
    run ahead, and Lightning hands a loader's state back too late, or not at all.
    """
    if trainer is None:
        return 0
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def next_position(trainer: Trainer) -> dict[str, int]:
    """The epoch, from 0, and the step within it, from 0, that come next."""
    step, epochs = steps_done(trainer), trainer.fit_loop.epoch_progress.current
    epoch: int = epochs.processed  # type: ignore[attr-defined]
    return {"epoch": epoch, "step": step if step < trainer.num_training_batches else 0}


def check_order(state: dict[str, Any], order: dict[str, int]) -> None:
    """Makes sure that an epoch goes on in the order that it began in.

    Args:
        state: of the data module, from a checkpoint.
        order: what fixes the global batches of an epoch now.

    Raises:
        InputError: the checkpoint is of the middle of an epoch in another order.
    """
    if state["step"] and state["order"] != order:
        raise InputError(
            f"an epoch must be resumed in the order that it began in; got a checkpoint of step "
            f"{state['step']} of epoch {state['epoch']} of {state['order']}, for {order}. Set "
            "`data.source`, `data.global_batch_size` and `data.seed` as in its run, or resume from "
            "the end of an epoch."
        )
