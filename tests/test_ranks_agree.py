"""Whatever the number of ranks: the same images, views and losses."""

import hashlib
from typing import Any, NamedTuple

import pytest
from lightning.pytorch import Callback
from ranks import on_ranks
from tiny import tiny_fit, tiny_model
from torch.distributed import get_world_size, is_initialized

STEPS = 20


class Seen(NamedTuple):
    """Each step's loss, and the hash of each view by step, image and view."""

    losses: list[float]
    views: dict[tuple[int, int, int], str]


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen = Seen([], {})

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = len(self.seen.losses)
        self.seen.losses.append(float(outputs["loss"]))
        index = batch["index"].tolist()
        for row, view in enumerate(batch["views"]):  # (C, S, S)
            key = step, index[row % len(index)], row // len(index)
            self.seen.views[key] = hashlib.sha256(view.numpy().tobytes()).hexdigest()


def fit() -> Seen:
    ranks, recorder = get_world_size() if is_initialized() else 1, Recorder()
    tiny_fit(
        [recorder],
        tiny_model(batch_norm=False),
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=STEPS // 4,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    return recorder.seen


@pytest.fixture(scope="module")
def alone() -> Seen:
    return fit()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_see_the_views_of_one_process_and_have_its_losses(
    world_size: int, alone: Seen
) -> None:
    assert len(alone.losses) == STEPS
    assert len(set(alone.views.values())) == len(alone.views) == STEPS * 64 * 2
    results = on_ranks(world_size, fit)
    views: dict[Any, str] = {}
    for losses, own in results:
        assert losses == pytest.approx(alone.losses, rel=0, abs=1e-6)
        assert len(own) == len(alone.views) / world_size
        views |= own
    assert views == alone.views
