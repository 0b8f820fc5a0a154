"""Views of sounds against slow oracles, row by row."""

import math
import pickle
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_augment import DEVICES, NoHost, on_device, to_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from simclr_pl.audio_augment import AudioAugment
from simclr_pl.audio_kernels import change_speed
from simclr_pl.augmentation import Rows
from simclr_pl.errors import InputError

RATE = 4000
PLAIN: dict[str, Any] = {
    "speed": (1.0, 1.0),
    "pitch": (1.0, 1.0),
    "gain": (0.0, 0.0),
    "noise": 0.0,
    "time_masks": 0,
    "mel_masks": 0,
}


class Wave(NamedTuple):
    """An opened clip in memory that notes what is read."""

    wave: np.ndarray
    reads: list[tuple[int, int]]
    rate: int = RATE

    @property
    def frames(self) -> int:
        return len(self.wave)

    def read(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= len(self.wave)
        self.reads.append((start, count))
        return self.wave[start : start + count]


def clips(*lengths: int) -> list[Wave]:
    """Noise of about a third of the full scale."""
    random = np.random.default_rng(0)
    return [Wave((random.standard_normal(n) * 0.3).astype(np.float32), []) for n in lengths]


def rows(n: int, views: int = 1, epoch: int = 0) -> Rows:
    """N samples, all of view 0 first."""
    return Rows(7, epoch, np.tile(np.arange(n), views), np.repeat(np.arange(views), n))


def augment(**options: Any) -> AudioAugment:
    return AudioAugment(RATE, **{"seconds": 0.25, "n_mels": 20, "window": 32.0, **options})


def views_of(a: AudioAugment, samples: list[Wave], keys: Rows | None) -> torch.Tensor:
    return a.finish(to_tensors(a.prepare(samples, keys)))


def slow_wave(a: AudioAugment, clip: Wave, drawn: dict[str, Any], hiss: np.ndarray) -> np.ndarray:
    """One view (L,) float64 by the documented definitions."""
    length = round(a.seconds * a.sample_rate)
    needed = math.ceil(length * drawn["speed"]) + 1
    start = 0
    if clip.frames > needed:
        start = math.floor(drawn["at"] * (clip.frames - needed + 1))
    part = change_speed(clip.wave[start : start + needed], drawn["speed"])[:length]
    part = part.astype(np.float64) * drawn["gain"]
    place = math.floor(drawn["at"] * (length - len(part) + 1))
    view = np.zeros(length)
    view[place : place + len(part)] = part
    if drawn["snr"]:
        begin = math.floor(drawn["noise_at"] * (len(hiss) - length + 1))
        noise = hiss[begin : begin + length].astype(np.float64)
        wanted = (part**2).mean() * drawn["snr"] ** 2  # the noise's power
        view += noise * math.sqrt(wanted / (noise**2).mean())
    return view


def test_views_equal_a_slow_oracle_row_by_row() -> None:
    from simclr_pl.audio_augment import _NOISE, _hiss

    a = augment(time_masks=2, mel_masks=2, noise=0.6, mean=-9.0, std=3.0)
    samples, keys = clips(400, 999, 1000, 1001, 1300, 5000), rows(6, 3)
    drawn = a.draw(keys)
    found = views_of(a, samples * 3, keys)
    assert found.shape == (18, 1, 20, a.on_device(torch.device("cpu")).frames(1000))
    assert 0 < (drawn["snr"] > 0).sum() < 18  # both kinds are there
    for row in range(18):
        one = {name: value[row] for name, value in drawn.items()}
        wave = slow_wave(a, samples[row % 6], one, _hiss(_NOISE))
        warp = torch.tensor([one["pitch"]])
        mel = a.on_device(torch.device("cpu"))(torch.from_numpy(wave).float()[None], warp)[0]
        expected = (mel + 9) / 3
        for first, end in one["time_masks"]:
            expected[:, first:end] = 0
        for first, end in one["mel_masks"]:
            expected[first:end] = 0
        torch.testing.assert_close(found[row, 0], expected, rtol=0, atol=2e-3)


def test_noise_has_exactly_the_ratio_asked_for_to_the_clip_where_it_sounds() -> None:
    samples, keys = clips(300, 800, 4000), rows(3)
    options = {**PLAIN, "gain": (6.0, 6.0)}
    loud = augment(**{**options, "noise": 1.0, "snr": (7.0, 7.0)}).prepare(samples, keys)["waves"]
    clean = augment(**options).prepare(samples, keys)["waves"]
    noise = loud.astype(np.float64) - clean
    for row, length in enumerate((300, 800, 1000)):
        signal = (clean[row].astype(np.float64) ** 2).sum() / length
        ratio = 10 * np.log10(signal / (noise[row] ** 2).mean())
        assert ratio == pytest.approx(7.0, abs=1e-3)


def test_noise_is_white_and_silence_stays_silent() -> None:
    a = augment(**{**PLAIN, "noise": 1.0, "snr": (0.0, 0.0), "seconds": 8.0})
    tone = Wave(np.full(32000, 0.5, np.float32), [])
    noise = a.prepare([tone], rows(1))["waves"][0] - 0.5
    power = np.abs(np.fft.rfft(noise))[1:].reshape(16, -1) ** 2  # in 16 bands
    assert power.mean(1) == pytest.approx(power.mean(), rel=0.15)
    silence = Wave(np.zeros(500, np.float32), [])
    assert not a.prepare([silence], rows(1))["waves"].any()


def test_gain_is_in_decibels_of_the_amplitude() -> None:
    samples, keys = clips(1500, 700), rows(2)
    louder = augment(**{**PLAIN, "gain": (20.0, 20.0)}).prepare(samples, keys)["waves"]
    plain = augment(**PLAIN).prepare(samples, keys)["waves"]
    np.testing.assert_allclose(louder, 10 * plain, rtol=1e-6)


def test_higher_speed_raises_a_tone_and_shortens_a_clip() -> None:
    time = np.arange(6000) / RATE
    tone = Wave(np.sin(2 * np.pi * 400 * time).astype(np.float32), [])
    a = augment(**{**PLAIN, "speed": (1.25, 1.25), "seconds": 1.0})
    wave = a.prepare([tone], rows(1))["waves"][0]
    assert np.abs(np.fft.rfft(wave)).argmax() == 500
    short = Wave(tone.wave[:1000], [])
    sounding = np.flatnonzero(np.abs(a.prepare([short], rows(1))["waves"][0]) > 1e-3)
    assert sounding[-1] - sounding[0] == pytest.approx(800, abs=20)


def test_masks_are_zero_where_drawn_and_nothing_else_changes() -> None:
    samples, keys = clips(*[1200] * 40), rows(40)
    masked = augment(**{**PLAIN, "time_masks": 1, "mel_masks": 2})
    found, plain = (views_of(a, samples, keys) for a in (masked, augment(**PLAIN)))
    drawn = masked.draw(keys)
    frames = found.shape[3]
    for name, size, share in (("time_masks", frames, 0.2), ("mel_masks", 20, 0.25)):
        first, end = drawn[name][..., 0], drawn[name][..., 1]
        assert first.min() >= 0
        assert end.max() <= size
        assert {*np.unique(end - first)} == set(range(round(share * size) + 1))
    inside = np.zeros(found.shape, bool)
    for row in range(40):
        for first, end in drawn["time_masks"][row]:
            inside[row, :, :, first:end] = True
        for first, end in drawn["mel_masks"][row]:
            inside[row, :, first:end] = True
    assert not found.numpy()[inside].any()
    assert np.array_equal(found.numpy()[~inside], plain.numpy()[~inside])


def test_draws_reach_all_of_their_ranges() -> None:
    drawn = augment(noise=0.3, gain=(-6.0, 12.0)).draw(rows(4000))
    for name, low, high in (
        ("at", 0, 1),
        ("noise_at", 0, 1),
        ("speed", 0.9, 1.1),
        ("pitch", 0.9, 1.1),
    ):
        assert drawn[name].min() == pytest.approx(low, abs=2e-3)
        assert drawn[name].max() == pytest.approx(high, abs=2e-3)
    gain = 20 * np.log10(drawn["gain"])
    assert (gain.min(), gain.max()) == pytest.approx((-6, 12), abs=0.05)
    snr = -20 * np.log10(drawn["snr"][drawn["snr"] > 0])
    assert (snr.min(), snr.max()) == pytest.approx((10, 40), abs=0.1)
    assert len(snr) / 4000 == pytest.approx(0.3, abs=0.03)


def test_disabled_operations_are_absent_and_change_no_other() -> None:
    keys = rows(50, 2)
    everything = augment().draw(keys)
    assert augment(**PLAIN).draw(keys).keys() == {"at"}
    for name, gone in (
        ("speed", {"speed"}),
        ("pitch", {"pitch"}),
        ("gain", {"gain"}),
        ("noise", {"snr", "noise_at"}),
        ("time_masks", {"time_masks"}),
        ("mel_masks", {"mel_masks"}),
    ):
        some = augment(**{name: PLAIN[name]}).draw(keys)
        assert everything.keys() - some.keys() == gone
        assert all(np.array_equal(value, everything[key]) for key, value in some.items())


def test_a_view_depends_on_its_key_alone() -> None:
    a, samples, keys = augment(), clips(700, 1200, 2500, 999, 4000), rows(5, 2)
    whole = views_of(a, samples * 2, keys)
    order = np.random.default_rng(1).permutation(10)
    shuffled = Rows(7, 0, keys.index[order], keys.view[order])
    other = views_of(a, [(samples * 2)[i] for i in order], shuffled)
    torch.testing.assert_close(other, whole[order], rtol=0, atol=1e-5)
    for i in range(10):
        alone = Rows(7, 0, keys.index[i : i + 1], keys.view[i : i + 1])
        table = a.prepare([(samples * 2)[i]], alone)
        assert np.array_equal(table["waves"][0], a.prepare(samples * 2, keys)["waves"][i])
        view = a.finish(to_tensors(table))
        torch.testing.assert_close(view[0], whole[i], rtol=0, atol=1e-5)
    assert not torch.equal(whole[:5], whole[5:])
    assert not torch.equal(whole, views_of(a, samples * 2, rows(5, 2, epoch=1)))


def test_clean_views_are_the_middle_or_the_whole_between_zeros() -> None:
    samples = clips(400, 1000, 3000)
    waves = augment().prepare(samples, None)["waves"]
    assert np.array_equal(waves[0], np.pad(samples[0].wave, 300))
    assert np.array_equal(waves[1], samples[1].wave)
    assert np.array_equal(waves[2], samples[2].wave[1000:2000])
    found = views_of(augment(mean=-9.0, std=3.0), samples, None)
    mel = augment().on_device(torch.device("cpu"))(torch.from_numpy(waves))
    torch.testing.assert_close(found[:, 0], (mel + 9) / 3)


def test_no_more_of_a_long_clip_is_read_than_a_view_needs() -> None:
    samples = clips(100_000, 100_000, 1050, 500)
    augment(speed=(0.5, 1.05)).prepare(samples * 10, rows(4, 10))
    counts = [count for clip in samples[:2] for _, count in clip.reads]
    assert len(counts) == 20  # once for each view
    assert max(counts) <= 1000 * 1.05 + 2
    assert min(counts) < 700
    starts = [start for clip in samples[:2] for start, _ in clip.reads]
    assert min(starts) < 20_000 < 80_000 < max(starts)
    assert {*samples[3].reads} == {(0, 500)}


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_made_without_waiting_for_the_device(device: str) -> None:
    described = to_tensors(augment().prepare(clips(700, 1200, 3000), rows(3)))
    assert described.keys() == {"waves", "pitch", "time_masks", "mel_masks"}
    with FakeTensorMode() if device == "cuda" else nullcontext():
        a = augment()
        table = on_device(described, device)
        a.on_device(table["waves"].device)  # moved once
        with NoHost(device) as guard:
            views = a.finish(table)
    assert views.shape == (3, 1, 20, 26)
    assert views.device.type == device
    assert {"_fft_r2c", "bmm", "masked_fill"} <= guard.seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_gpu_makes_the_same_views_without_waiting() -> None:
    a = augment()
    table = a.prepare(clips(700, 1200, 3000), rows(3))
    expected, there = a.finish(to_tensors(table)), to_tensors(table, "cuda")
    a.finish(there)
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = a.finish(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)


def test_raw_is_the_mean_over_time() -> None:
    views = torch.randn(3, 1, 5, 7)
    assert AudioAugment.raw_name == "mean log-mel"
    torch.testing.assert_close(augment().raw(views), views.sum((1, 3)) / 7)


def test_pictures_are_grey_with_low_bands_at_the_bottom() -> None:
    views = torch.zeros(2, 1, 4, 6)
    views[0, 0, 0] = 3.0  # the lowest band, three deviations up
    views[0, 0, 3] = -9.0
    pictures = augment().pictures(views)
    assert pictures.shape == (2, 4, 6, 1)
    assert pictures.dtype == np.uint8
    assert pictures[0, :, 0, 0].tolist() == [0, 128, 128, 255]


@pytest.mark.parametrize(("length", "frames"), [(900, 23), (50_000, 1001)])
def test_picture_of_a_clip_shows_all_of_it_or_ten_seconds(length: int, frames: int) -> None:
    picture = augment().picture_of(clips(length)[0])
    assert picture is not None
    assert picture.shape == (20, frames, 1)
    assert picture.std() > 0


def test_workers_get_no_copy_of_what_lies_on_a_device() -> None:
    a = augment()
    a.on_device(torch.device("meta"))
    other = pickle.loads(pickle.dumps(a))
    assert not other.__dict__["_on_devices"]
    samples, keys = clips(900), rows(1)
    assert torch.equal(views_of(a, samples, keys), views_of(other, samples, keys))


def test_a_clip_of_another_rate_is_refused() -> None:
    clip = clips(900)[0]._replace(rate=16000)
    with pytest.raises(InputError, match=r"`sample_rate` must be .* 16000 Hz; got 4000"):
        augment().prepare([clip], None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"speed": (0.0, 1.0)}, "`speed`"),
        ({"speed": (1.1, 0.9)}, "`speed`"),
        ({"pitch": (0.9, 5.0)}, "`pitch`"),
        ({"gain": (-6.0, math.inf)}, "`gain`"),
        ({"snr": (math.nan, 10.0)}, "`snr`"),
        ({"noise": 1.5}, "`noise`"),
        ({"time_mask": -0.1}, "`time_mask`"),
        ({"mel_mask": 1.1}, "`mel_mask`"),
        ({"time_masks": -1}, "`time_masks`"),
        ({"mel_masks": -1}, "`mel_masks`"),
        ({"seconds": 0.0}, "`seconds`"),
        ({"seconds": 0.02}, "`seconds`"),
        ({"std": 0.0}, "`std`"),
        ({"mean": math.nan}, "`mean`"),
        ({"n_mels": 0}, "n_mels"),
        ({"f_max": 3000.0}, "f_max"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        augment(**options)
