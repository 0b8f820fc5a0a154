"""Operations of a step against a count by hand; what the device could do, against a product here."""

import time

import torch
from tiny import tiny_model, tiny_trainer, weights

from simclr_pl.callbacks.flops import FlopMeter, batch_flops, peak_flops


def test_flops_are_those_counted_by_hand() -> None:
    model = tiny_model(batch_norm=False)  # 8 kernels of 5 x 5 on a grid of 10 x 10; 800 to 8
    batch = {
        "views": torch.rand(6, 1, 32, 32),
        "small_views": torch.rand(3, 1, 32, 32),
        "label": torch.zeros(3),
    }
    row = 2 * 8 * 10 * 10 * 25 + 2 * 800 * 8
    assert batch_flops(tiny_trainer([]), model, batch) == 3 * row * 9


def test_counting_flops_changes_nothing() -> None:
    model = tiny_model()
    model.encoder.append(torch.nn.Dropout())
    model.encoder[1].eval()  # frozen by the user
    modes = [module.training for module in model.modules()]
    batch = {"views": torch.rand(4, 1, 32, 32)}
    before, state = weights(model), torch.get_rng_state()
    batch_flops(tiny_trainer([]), model, batch)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert torch.equal(state, torch.get_rng_state())


def test_steps_of_each_size_of_views_are_added_up() -> None:
    model, trainer, meter = tiny_model(), tiny_trainer([]), FlopMeter()
    large, small = ({"views": torch.rand(n, 1, s, s)} for n, s in ((6, 32), (4, 24)))
    for batch in (large, small, large):
        meter.add(trainer, model, batch)
    each = [batch_flops(trainer, model, batch) for batch in (large, small)]
    assert each[0] > each[1] > 0
    assert (meter.total, meter.batches) == (2 * each[0] + each[1], 3)
    assert meter.mean == meter.total / 3
    meter.start_anew()
    assert meter.mean == 0


def test_the_peak_is_that_of_a_large_product() -> None:
    a = torch.rand(512, 512)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    peak = peak_flops(tiny_trainer([]))
    assert peak is not None
    assert 0.1 < peak / (2 * 512**3 / min(seconds)) < 10  # the machine may have other work
    assert peak_flops(tiny_trainer([], precision="64-true")) != peak
