"""Batches of samples of any kind, by what an augmentation of one's own says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr_pl import ContrastiveDataModule, InputError
from simclr_pl.augment import Augment, simclr_cifar
from simclr_pl.augmentation import Augmentation, Rows
from simclr_pl.data import Digits, Source
from simclr_pl.data.batches import guarded, to_tensors, with_floats
from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.sources import Reader, StoredSamples, held_out, in_memory

LENGTH = 5


class Shaken(Augmentation):
    """Adds keyed noise to a row of numbers; a row that starts with a NaN is unreadable, but late."""

    def prepare(self, samples: Sequence[Any], rows: Rows | None) -> dict[str, Any]:
        for sample in samples:
            if np.isnan(sample[0]):
                raise UnreadableSample("it is no number")
        values = np.stack(samples)  # (n, LENGTH) float64
        if rows is None:
            return {"values": values, "marks": np.zeros(len(values), np.int32)}
        noise = rows.uniforms(1000, LENGTH)
        return {"values": values + noise, "marks": rows.view.astype(np.int32)}

    def finish(self, table: dict[str, Any]) -> Tensor:
        marks: Tensor = table["marks"][:, None].float()
        return torch.cat([table["values"], marks], 1)


class Late(Reader):
    """Rows of a table, of which one cannot be opened."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def name(self, i: int) -> str:
        return f"row {i}"

    def open(self, i: int) -> Any:
        if i == 6:
            raise UnreadableSample("it is the sixth")
        return self.table[i]


class Table(Source):
    """60 rows, of which one is unreadable, one in parts, one left out in opening."""

    unit = "rows"
    channels = 1

    def open(self) -> None:
        table = np.random.default_rng(0).normal(size=(60, LENGTH))
        table[23, 0] = np.nan
        everything = StoredSamples(Late(table), np.arange(60) % 3)
        kept = held_out(60, 0.2)
        self.train = self.bank = everything.subset(np.flatnonzero(~kept))
        self.query = everything.subset(np.flatnonzero(kept))
        self.left_out = [("row 60", "it is empty")]
        self.converted = ["2 rows were turned over"]

    def default_augment(self) -> Augmentation:
        return Shaken()


def opened(**options: Any) -> ContrastiveDataModule:
    defaults = {"global_batch_size": 9, "num_workers": 0, "seed": 2, "max_bad_fraction": 0.2}
    data = ContrastiveDataModule(Table(), **{**defaults, **options})  # type: ignore[arg-type]
    data.setup()
    return data


def batches(data: ContrastiveDataModule, epoch: int = 0) -> list[dict[str, Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return [data.make_views(batch, "train") for batch in loader]


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("n_views", [2, 3])
def test_views_of_a_batch_are_those_made_one_by_one(n_views: int, p: float) -> None:
    data = opened(n_views=n_views, replace_probability=p)
    train = data.samples("train")
    marks = set()
    for epoch in range(2):
        for batch in batches(data, epoch):
            views = batch["views"].unflatten(0, (n_views, -1))
            shown = batch["ids"] if p else batch["index"].repeat(n_views, 1)
            for v, b in np.ndindex(n_views, len(batch["index"])):
                number = int(views[v, b, -1])
                marks.add(number)
                sample = shown[v, b : b + 1].numpy()
                rows = Rows(2, epoch, sample, np.array([number]))
                made = Shaken().prepare([train.open(int(sample[0]))], rows)
                alone = Shaken().finish(to_tensors(with_floats(to_tensors(guarded(made)))))[0]
                assert torch.equal(views[v, b], alone)
                assert number == v or (v == 1 and number >= n_views)
    assert (max(marks) >= n_views) == bool(p)


def test_views_of_an_epoch_are_those_of_its_own_augmentation() -> None:
    class Doubled(Shaken):
        def finish(self, table: dict[str, Any]) -> Tensor:
            return 2 * super().finish(table)

    class Negated(Shaken):
        def prepare(self, samples: Sequence[Any], rows: Rows | None) -> dict[str, Any]:
            return super().prepare([-sample for sample in samples], rows)

    until: Any = {3: Negated(), 2: Doubled()}
    data, plain = opened(augment_until=until), opened()
    samples = data.samples("train")
    for epoch in range(4):
        for one, other in zip(batches(data, epoch), batches(plain, epoch), strict=True):
            expected = other["views"].clone()
            if epoch < 2:
                expected *= 2
            elif epoch == 2:
                rows = np.stack([samples.open(i) for i in other["index"].tolist()])
                expected[:, :LENGTH] -= 2 * torch.from_numpy(rows).float().repeat(2, 1)
            torch.testing.assert_close(one["views"], expected)


def test_workers_and_batch_sizes_change_no_view() -> None:
    by_sample = []
    for options in ({}, {"num_workers": 2}, {"global_batch_size": 6}):
        data = opened(**options)
        rows = {}
        for batch in batches(data, 1):
            views = batch["views"].unflatten(0, (2, -1)).transpose(0, 1)
            rows.update(zip(batch["index"].tolist(), views.tolist(), strict=True))
        by_sample.append(rows)
    first, second, third = by_sample
    assert first == second
    assert all(first[i] == third[i] for i in first.keys() & third.keys())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_what_cannot_be_read_at_once_or_later_is_reported_once_and_replaced(
    p: float, caplog: pytest.LogCaptureFixture
) -> None:
    data = opened(replace_probability=p)
    train = data.samples("train")
    names = [train.name(i) for i in range(len(train))]
    for epoch in range(3):
        for batch in batches(data, epoch):
            shown = batch.get("ids", batch["index"])
            seen = {names[i] for i in shown.flatten().tolist()}
            assert not seen & {"row 6", "row 23"}
            assert len(set(batch["index"].tolist())) == 9
            assert batch["views"].isfinite().all()
    assert data.unreadable == {
        "row 60": "it is empty",
        "row 6": "it is the sixth",
        "row 23": "it is no number",
    }
    messages = [record.getMessage() for record in caplog.records]
    for name in data.unreadable:
        assert sum(repr(name) in message for message in messages) == 1
    assert messages.count("2 rows were turned over") == 1


def test_evaluation_leaves_out_what_cannot_be_read_and_shows_the_rest_clean() -> None:
    data = opened(eval_batch_size=7)
    for name, loader in zip(("bank", "query"), data.val_dataloader(), strict=True):
        part, found = data.samples(name), {}
        for batch in loader:
            got = data.make_views(batch, name)
            real = got["index"] >= 0
            assert (got["label"] >= 0).equal(real)
            found.update(zip(got["index"][real].tolist(), got["views"][real].tolist(), strict=True))
        readable = [i for i in range(len(part)) if part.name(i) not in ("row 6", "row 23")]
        assert sorted(found) == readable
        for i, values in found.items():
            assert values == [*np.float32(part.open(i)).tolist(), 0.0]


def test_a_set_without_a_readable_sample_is_an_error() -> None:
    class Nothing(Table):
        def open(self) -> None:
            self.train = self.bank = self.query = in_memory(np.full((20, LENGTH), np.nan), [0] * 20)

    data = ContrastiveDataModule(Nothing(), global_batch_size=4, num_workers=0)
    data.setup()
    with pytest.raises(InputError, match=r"a batch must be readable; got .* 'sample"):
        next(iter(data.train_dataloader()))
    with pytest.raises(InputError, match="must hold readable samples; got none of 20"):
        next(iter(data.predict_dataloader()))


def test_messages_call_the_samples_by_their_name() -> None:
    data = opened()
    assert data.describe() == "Table: 48 train, 48 bank, 12 query rows, read as they are needed"
    with pytest.raises(InputError, match="got 48 rows for `global_batch_size` 49"):
        opened(global_batch_size=49)
    with pytest.raises(InputError, match="views of rows; got Augment, which is for images"):
        opened(augment=simclr_cifar())
    with pytest.raises(InputError, match="small views are made of images alone; got Shaken"):
        opened(n_small_views=2)
    with pytest.raises(InputError, match=r"one label for each thing; got \(2,\) labels for 3"):
        in_memory([1, 2, 3], [0, 1], "thing")


def test_floats_travel_as_bits_and_integers_as_they_are() -> None:
    table = {
        "x": np.array([0.1, np.nan], np.float64),
        "n": np.array([1, 2], np.int32),
        "inner": {"y": np.array([[1.5]], np.float32)},
        "count": 3,
    }
    sent = to_tensors(guarded(table))
    assert sent["x"]["bits"].dtype == sent["inner"]["y"]["bits"].dtype == torch.int32
    back = with_floats(sent)
    torch.testing.assert_close(back["x"], torch.tensor([0.1, torch.nan]), equal_nan=True)
    assert back["n"].dtype == torch.int32
    assert (back["n"].tolist(), back["inner"]["y"].tolist(), back["count"]) == ([1, 2], [[1.5]], 3)


def test_the_general_way_and_the_quick_one_make_the_same_images() -> None:
    class Slow(Augmentation):
        """Images as if they were any samples."""

        def __init__(self, augment: Augment) -> None:
            self.augment = augment

        def prepare(self, samples: Sequence[Any], rows: Rows | None) -> dict[str, Any]:
            return self.augment.prepare(samples, rows)

        def finish(self, table: dict[str, Any]) -> Tensor:
            return self.augment.finish(table)

    augment = simclr_cifar(size=20, mean=(0.4,), std=(0.2,), rotation=9.0)
    quick, slow = (
        ContrastiveDataModule(Digits(), 32, augment=a, num_workers=0, replace_probability=0.3)
        for a in (augment, Slow(augment))
    )
    for data in (quick, slow):
        data.setup()
    for one, other in zip(batches(quick), batches(slow), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-6)
