"""Linear heads on fresh crops: what is learned, held out, chosen and reported."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import tiny_model, tiny_trainer, weights
from torch import nn

from simclr_pl import ContrastiveDataModule, InputError, SimCLR
from simclr_pl.data import Digits
from simclr_pl.data.labels import LabelledSubset
from simclr_pl.evaluation.crops import LinearOnCrops
from simclr_pl.evaluation.finetune import crop_and_flip
from simclr_pl.evaluation.linear import LinearResult, hold_out
from simclr_pl.heads import LinearHeads

RATES, DECAYS, EPOCHS, BATCH = (0.01, 0.1), (0.0, 1e-3), 2, 100


def data(fraction: float = 0.3) -> ContrastiveDataModule:
    source = LabelledSubset(Digits(), fraction)
    return ContrastiveDataModule(
        source, 2, n_views=1, augment=crop_and_flip(source.default_augment()), eval_batch_size=64
    )


def encoders() -> dict[str, nn.Module]:
    first, second = tiny_model(), tiny_model(batch_norm=False)
    return {"one": SimCLR(first.encoder, nn.Identity()), "two": second.encoder}


def trained(seed: int = 0) -> dict[str, Any]:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    module = LinearOnCrops(encoders(), RATES, DECAYS, BATCH, seed)
    trainer = tiny_trainer(
        [],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=EPOCHS,
        check_val_every_n_epoch=EPOCHS,
        limit_train_batches=None,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data())
    return {name: result._asdict() for name, result in module.results.items()}


@cache
def by_hand(name: str) -> dict[str, Any]:
    """A plain loop over the same batches."""
    encoder, module = encoders()[name].eval(), data()
    module.setup("validate")
    train = module.samples("train")
    steps = math.ceil(len(train) / BATCH)
    module.global_batch_size = len(train) // steps
    held = hold_out(torch.from_numpy(train.labels))
    options = [(lr, decay) for lr in RATES for decay in DECAYS]
    total, step, heads = EPOCHS * steps, 0, []
    for epoch in range(EPOCHS):
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in (module.make_views(b, "train") for b in loader):
            with torch.no_grad():
                x = encoder(batch["views"])
            if not heads:
                heads = [
                    LinearHeads(x.shape[1], 10, *zip(*options, strict=True), online=True)
                    for _ in range(2)
                ]
            masked = batch["label"].clone()
            masked[[i in held for i in batch["index"].tolist()]] = -1
            factor = 0.5 * (1 + math.cos(math.pi * step / total))
            for head, label in zip(heads, (masked, batch["label"]), strict=True):
                head.update(x, label, factor)
            step += 1
    right = []
    for head, loader, chosen in zip(heads, module.val_dataloader(), (held, None), strict=True):
        name = "bank" if chosen is not None else "query"
        batches = [module.make_views(b, name) for b in loader]
        with torch.no_grad():
            x = encoder(torch.cat([b["views"] for b in batches]))
        label = torch.cat([b["label"] for b in batches])
        if chosen is not None:
            x, label = x[chosen], label[chosen]
        order = head.logits(x).argsort(-1, descending=True)
        right.append([(order[..., :n] == label[:, None]).any(-1).double().mean(1) for n in (1, 5)])
    return {
        "held_out": right[0][0].tolist(),
        "options": options,
        "top1": right[1][0].tolist(),
        "top5": right[1][1].tolist(),
        "counts": (len(train), len(held), len(label)),
    }


def test_heads_are_those_of_a_plain_loop_on_one_and_two_ranks() -> None:
    # sums of another order may turn answers that are nearly tied: so early there are some
    for run, turned in ((trained(), 0), (on_ranks(2, trained)[1], 5)):
        for name in ("one", "two"):
            expected, found = by_hand(name), LinearResult(**run[name])
            assert [cell["held_out"] for cell in found.grid] == pytest.approx(
                expected["held_out"], abs=(1.1 * (turned > 0) + 0.1) / expected["counts"][1]
            )
            assert (found.bank, found.held_out, found.query) == expected["counts"]
            held_out = [cell["held_out"] for cell in found.grid]
            assert found.chosen == dict(list(found.grid[held_out.index(max(held_out))].items())[:2])
            chosen = expected["options"].index(tuple(found.chosen.values()))
            assert found.top5 is not None
            for share, shares in ((found.top1, "top1"), (found.top5, "top5")):
                assert share.value == pytest.approx(
                    expected[shares][chosen], abs=(turned + 0.1) / 450
                )
                assert share.low < share.value < share.high


def test_the_encoders_stay_as_they_are() -> None:
    given = encoders()
    before = {name: weights(encoder) for name, encoder in given.items()}
    module = LinearOnCrops(given, (0.1,), (0.0,), BATCH)
    trainer = tiny_trainer([], max_epochs=1, limit_train_batches=3, num_sanity_val_steps=0)
    trainer.fit(module, data())
    for name, encoder in given.items():
        after = weights(encoder)
        assert all(torch.equal(value, after[key]) for key, value in before[name].items())
    assert module.results["one"].bank == len(module._held)


def test_wrong_options_are_named() -> None:
    for lr, decay in (((0.0,), (0.0,)), ((), (0.0,)), ((0.1,), (-1.0,)), ((0.1,), ())):
        with pytest.raises(InputError, match="`lr` must be numbers > 0 and `weight_decay` >= 0"):
            LinearOnCrops({}, lr, decay)
