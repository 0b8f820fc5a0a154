"""A bad update on any rank is as if it had been left out, to the bit; told once, and never saved.

On a GPU the guard keeps and puts back what it cannot ask about without waiting. The same code is run here
on a CPU: `asks` false has it treat the CPU so. That nothing is waited for is shown on the device "meta",
whose tensors have no values: whatever reads one is an error.
"""

import csv
import logging
from collections import Counter
from collections.abc import Callable
from functools import cache, partial, wraps
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from ranks import on_ranks
from tiny import differences, tiny_data, tiny_model, tiny_trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from simclr_pl import LARS, InputError, NTXentLoss
from simclr_pl.callbacks import FiniteGuard, delayed, finite_guard
from simclr_pl.simclr import SimCLR
from simclr_pl.strategies import FullySharded

NAN, INF = float("nan"), float("inf")
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": partial(AdamW, lr=1e-3),
    "lars": partial(LARS, lr=5.0, weight_decay=1e-3),
    "fused sgd": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True),
    "fused adamw": partial(AdamW, lr=1e-3, fused=True),
}


class Poison(Callback):
    """Makes a number of one rank bad, in given batches."""

    def __init__(self, what: str, batches: set[int], rank: int = 0) -> None:
        self.what, self.batches, self.rank = what, batches, rank

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
        self.now = trainer.fit_loop.total_batch_idx in self.batches
        self.now &= trainer.global_rank == self.rank
        if self.now and self.what == "views":
            batch["views"][3] = NAN

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        if self.now and self.what == "loss":
            loss.data.fill_(INF)  # its gradient stays finite
        if self.now and self.what == "gradient":
            loss.register_hook(lambda g: g * INF)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if self.now and self.what == "shard":
            module.encoder[0].weight.grad.to_local().flatten()[0] = INF


class Oracle(Callback):
    """Leaves the updates out by hand: the optimiser makes no step, the statistics are put back."""

    def __init__(self, updates: frozenset[int], accumulate: int = 1) -> None:
        self.updates, self.accumulate = updates, accumulate

    def on_train_start(self, trainer: Any, module: Any) -> None:
        optimizer, number = trainer.optimizers[0], count()
        step = optimizer.step

        @wraps(step)
        def leave_out(closure: Any = None) -> Any:
            if next(number) in self.updates:
                optimizer._opt_called = True  # or the schedule warns
                return closure()
            return step(closure)

        optimizer.step = leave_out

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
        if trainer.fit_loop.total_batch_idx % self.accumulate == 0:
            self.before = [b.clone() for b in module.buffers()]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        number, rest = divmod(trainer.fit_loop.total_batch_idx, self.accumulate)
        if number in self.updates and rest == self.accumulate - 1:
            for now, before in zip(module.buffers(), self.before, strict=True):
                now.copy_(before)


def fit(callbacks: list[Callback], model: SimCLR | None = None, **options: Any) -> Trainer:
    """Eight batches."""
    defaults = {"max_epochs": 1, "limit_train_batches": 8, "limit_val_batches": 0}
    trainer = tiny_trainer(callbacks, **{**defaults, **options})
    trainer.fit(model or tiny_model(), datamodule=tiny_data())
    return trainer


def state(trainer: Trainer) -> dict[str, Any]:
    """All that goes on from step to step."""
    strategy = trainer.strategy
    return {
        "module": strategy.lightning_module_state_dict(),
        "optimizer": strategy.optimizer_state(trainer.optimizers[0]),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "step": trainer.global_step,
    }


def table(folder: Path = Path()) -> list[list[str]]:
    with open(folder / "bad_steps.tsv", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


@pytest.fixture(params=[True, False], ids=["asks", "copies"])
def asks(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(finite_guard, "_FREE", ())
    return bool(request.param)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the model, of the trainer
    **{name: ({"optimizer": optimizer}, {}) for name, optimizer in OPTIMIZERS.items()},
    "chunks": ({"encode_chunk": 48}, {}),
    "temperature": ({"loss": partial(NTXentLoss, learnable=True)}, {}),
    "clipped": ({}, {"gradient_clip_val": 0.5}),
    "bfloat16": ({}, {"precision": "bf16-mixed"}),
    "accumulated": ({}, {"accumulate_grad_batches": 2}),
}


def run(callbacks: list[Callback], setting: str) -> Trainer:
    model, trainer = SETTINGS[setting]
    return fit(callbacks, tiny_model(**{"optimizer": OPTIMIZERS["sgd"], **model}), **trainer)


@cache
def oracle(updates: frozenset[int], setting: str) -> dict[str, Any]:
    batches = SETTINGS[setting][1].get("accumulate_grad_batches", 1)
    return state(run([Oracle(updates, batches)], setting))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_run_is_that_without_the_bad_updates(setting: str, asks: bool) -> None:
    bad = frozenset({0, 1, 3})
    batches = SETTINGS[setting][1].get("accumulate_grad_batches", 1)
    poison = Poison("views", {update * batches for update in bad})  # an update's first batch
    guarded = run([poison, FiniteGuard()], setting)
    assert differences(state(guarded), oracle(bad, setting)) == []
    images = SETTINGS[setting][0].get("encode_chunk", 64)  # batch norm spreads what is not finite
    assert Counter(int(row[0]) for row in table()[1:]) == dict.fromkeys(bad, images)


@pytest.mark.parametrize(
    ("what", "setting"), [("gradient", "sgd"), ("loss", "sgd"), ("loss", "accumulated")]
)
def test_loss_and_gradient_must_both_be_finite(what: str, setting: str, asks: bool) -> None:
    batch = 3 * SETTINGS[setting][1].get("accumulate_grad_batches", 1)  # an update's first one
    guarded = run([Poison(what, {batch}), FiniteGuard()], setting)
    assert differences(state(guarded), oracle(frozenset({3}), setting)) == []
    step, loss, norm, scale, _ = table()[1]
    assert (step, scale) == ("3", "1.0")
    assert (loss == "inf", norm in ("inf", "nan")) == (what == "loss", what == "gradient")


@pytest.mark.parametrize("setting", OPTIMIZERS)
def test_a_run_without_bad_updates_is_not_felt(setting: str, asks: bool) -> None:
    guarded = run([FiniteGuard()], setting)
    assert differences(state(guarded), oracle(frozenset(), setting)) == []
    assert not Path("bad_steps.tsv").exists()


def test_an_optimizer_that_counts_elsewhere_is_asked_about(monkeypatch: Any) -> None:
    """As AdamW on a GPU, whose counters are on the host: each stands for the other here."""
    monkeypatch.setattr(finite_guard, "_FREE", ())
    guard = FiniteGuard()
    guard._updated, guard._old = set(), []
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["step"] = torch.zeros((), device="meta")
    guard._updated = {id(p)}
    guard._leave_out(optimizer, [p], torch.tensor(True), scaled=False)
    assert p.grad is None
    assert guard._bad is None


# Several ranks.


CASES = [(what, asks) for what in ("views", "gradient", "shard") for asks in (True, False)]


def on_a_rank() -> dict[tuple[str, bool], tuple[Any, Any]]:
    """Each case, and the oracle, one after the other: a group of ranks takes long to start."""
    model = partial(tiny_model, batch_norm=False, optimizer=OPTIMIZERS["sgd"])
    found = {}
    for sharded in (False, True):
        expected = state(fit([Oracle(frozenset({0, 3}))], model(), **two_ranks(sharded)))
        for what, asks in CASES:
            if sharded is not (what == "shard"):
                continue
            finite_guard._FREE = ("cpu",) if asks else ()
            callbacks = [Poison(what, {0, 3}, rank=1), FiniteGuard()]
            folder = f"{what}-{asks}"
            guarded = fit(callbacks, model(), default_root_dir=folder, **two_ranks(sharded))
            found[what, asks] = (state(guarded), expected)
    return found


def two_ranks(sharded: bool) -> dict[str, Any]:
    strategy = FullySharded() if sharded else "ddp"
    return {"devices": 2, "strategy": strategy, "limit_train_batches": 5}


def test_one_ranks_bad_numbers_stop_the_update_on_both() -> None:
    first, second = on_ranks(2, on_a_rank)
    assert differences(first, second) == []
    assert list(first) == CASES
    for case, (guarded, expected) in first.items():
        assert differences(guarded, expected) == [], case
        rows = table(Path("{}-{}".format(*case)))[1:]
        images = {step: {row[-1] for row in rows if row[0] == step} for step in ("0", "3")}
        # the one on the second rank, or those of both
        assert [len(names) for names in images.values()] == [1 if case[0] == "views" else 64] * 2


def stopped_on_a_rank() -> str:
    poison = Poison("views", {1, 3, 4, 5}, rank=1)
    with pytest.raises(InputError) as error:
        fit([poison, FiniteGuard(max_in_a_row=3)], devices=2, strategy="ddp")
    return str(error.value)


def test_too_many_in_a_row_end_the_run_on_all_ranks() -> None:
    first, second = on_ranks(2, stopped_on_a_rank)
    assert first == second
    assert "got 3 updates in a row that are not, up to step 5," in first


# What is told.


def test_only_the_images_without_finite_features_are_named(caplog: Any) -> None:
    seen: list[int] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, out: Any, b: Any, i: int) -> None:
            seen.append(int(out["index"][3]))

    with caplog.at_level(logging.WARNING, logger=finite_guard.__name__):
        model = tiny_model(batch_norm=False)
        trainer = fit([Note(), Poison("views", {1, 5}), FiniteGuard()], model)
    name = trainer.datamodule.samples("train").name
    rows = [[str(step), "nan", "nan", "1.0", name(seen[step])] for step in (1, 5)]
    assert table() == [["step", "loss", "gradient_norm", "scale", "sample"], *rows]
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith(
        "step 1: loss nan, gradient norm nan, scale 1: no update. Its 1 image"
    )
    assert lines[0].endswith("bad_steps.tsv")


def test_a_view_that_stands_in_for_anothers_is_named_by_its_own_sample() -> None:
    shown: list[int] = []

    class Tear(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, out: Any, b: Any, i: int) -> None:
            ids = out["ids"]
            shown.append(int(ids[1, 3]))
            out["features"][len(ids[0]) + 3] = torch.nan  # the second view in the fourth place

    callbacks = [Poison("gradient", {1}), Tear(), FiniteGuard()]
    trainer = tiny_trainer(callbacks)
    trainer.fit(tiny_model(batch_norm=False), tiny_data(replace_probability=1.0))
    name = trainer.datamodule.samples("train").name
    assert [row[0] + row[-1] for row in table()[1:]] == [f"1{name(shown[1])}"]


def test_names_of_files_may_hold_anything() -> None:
    name = "a\tb\nc\udcff.png"
    samples = SimpleNamespace(name=lambda i: name)
    source = SimpleNamespace(unit="images")
    datamodule = SimpleNamespace(samples=lambda _: samples, source=source)
    trainer: Any = SimpleNamespace(
        log_dir=None, default_root_dir=".", is_global_zero=True, datamodule=datamodule
    )
    finite_guard._write(trainer, torch.tensor([[7, 1]]), [1, NAN, NAN, 1.0])
    with open("bad_steps.tsv", newline="", errors="surrogateescape") as file:
        assert list(csv.reader(file, delimiter="\t"))[1][-1] == name


@pytest.mark.parametrize("lag", [0, 2, 20])
def test_late_reports_are_the_same(lag: int, monkeypatch: Any) -> None:
    monkeypatch.setitem(delayed._LAG, "cpu", lag)
    fit([Poison("gradient", {1, 7}), FiniteGuard()])
    assert [int(row[0]) for row in table()[1:]] == [1] * 64 + [7] * 64


def test_the_stop_counts_bad_updates_in_a_row_however_late_they_are_read(monkeypatch: Any) -> None:
    monkeypatch.setitem(delayed._LAG, "cpu", 2)
    guard = FiniteGuard(max_in_a_row=3)
    with pytest.raises(InputError, match="got 3 updates in a row that are not, up to step 4,"):
        fit([Poison("views", {0, 2, 3, 4}), guard])


def test_an_option_that_is_no_count_is_refused() -> None:
    with pytest.raises(InputError, match="`max_in_a_row` must be >= 1; got 0"):
        FiniteGuard(0)


# 16-mixed precision.


def half(scale: float) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return MixedPrecision("16-mixed", "cpu", scaler)


def test_overflow_in_half_precision_counts_once_its_scale_is_1() -> None:
    model = tiny_model(batch_norm=False)
    with pytest.raises(InputError, match="got 3 updates in a row that are not, up to step 5,"):
        fit([Poison("gradient", set(range(1, 8))), FiniteGuard(3)], model, plugins=half(4.0))
    assert {(row[0], row[3]) for row in table()[1:]} == {("3", "1.0"), ("4", "0.5"), ("5", "0.25")}
    # Of one network: all alike, not times the scale
    losses = [float(row[1]) for row in table()[1:]]
    assert max(losses) < 1.2 * min(losses)


def test_a_bad_loss_in_half_precision_counts_at_any_scale(asks: bool) -> None:
    guarded = fit([Poison("loss", {0, 3}), FiniteGuard()], plugins=half(1024.0))
    assert {tuple(row[:2]) for row in table()[1:]} == {("0", "inf"), ("3", "inf")}
    assert {row[3] for row in table()[1:]} == {"1024.0"}
    assert guarded.global_step == 8
    batches = [v for k, v in state(guarded)["module"].items() if k.endswith("num_batches_tracked")]
    assert {int(n) for n in batches} == {6}


# What is saved.


@pytest.mark.parametrize("part", ["weights", "momentum"])
def test_a_checkpoint_that_is_not_finite_is_refused(part: str) -> None:
    trainer = fit([FiniteGuard()], tiny_model(optimizer=OPTIMIZERS["sgd"]))
    trainer.save_checkpoint("good.ckpt")
    bias = trainer.lightning_module.projector.get_parameter("0.weight")
    place = bias.data if part == "weights" else trainer.optimizers[0].state[bias]["momentum_buffer"]
    place.view(-1)[-1] = NAN
    with pytest.raises(InputError, match=r"what is saved must be finite; got .* at step 8"):
        trainer.save_checkpoint("bad.ckpt")
    assert sorted(p.name for p in Path().glob("*.ckpt")) == ["good.ckpt"]


# Nothing is waited for.


def copies_in_steps(device: str, optimizer: Callable[..., Optimizer]) -> bool:
    """Whether the guard went through a few updates of a network by copies; it may ask in the first."""
    module: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
    module.device = torch.device(device)
    made = optimizer(module.parameters())
    guard = FiniteGuard()
    trainer: Any = SimpleNamespace(optimizers=[made], precision_plugin=None, global_step=1)
    guard.on_train_start(trainer, module)
    x = torch.ones(6, 4, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    for number in range(4):
        guard.on_train_batch_start(trainer, module, None, 0)
        if number == 1 and device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        loss = module(x).square().sum()
        guard.on_before_backward(trainer, module, loss)
        made.zero_grad()
        loss.backward()
        if number == 0 and device == "meta":
            made.step()  # the one update of which the guard asks the device
            guard._updated = {id(p) for p in module.parameters()}
        guard.on_before_optimizer_step(trainer, module, made)
        made.step()
        outputs = {"index": index, "features": x}
        guard.on_train_batch_end(trainer, module, outputs, None, 0)
    return guard._bad is not None


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_no_value_on_the_device_is_asked_for_in_a_step(name: str) -> None:
    assert copies_in_steps("meta", OPTIMIZERS[name])


def test_asking_would_be_an_error_on_that_device(monkeypatch: Any) -> None:
    monkeypatch.setattr(finite_guard, "_FREE", ("cpu", "meta"))
    with pytest.raises(RuntimeError, match="meta"):
        copies_in_steps("meta", OPTIMIZERS["sgd"])


@pytest.mark.parametrize("name", ["sgd", "fused sgd", "fused adamw"])
def test_a_fused_optimizer_is_told_and_nothing_is_copied(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(finite_guard, "_FREE", ())
    assert copies_in_steps("cpu", OPTIMIZERS[name]) is (name == "sgd")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that may not be waited for")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", ["sgd", "lars", "fused sgd", "fused adamw"])
def test_a_gpu_is_not_waited_for(name: str) -> None:
    try:
        assert copies_in_steps("cuda", OPTIMIZERS[name]) is ("fused" not in name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
