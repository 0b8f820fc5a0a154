"""Sound files as clips: what is converted, and what cannot be read."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soxr
from sounds import BAD, RATE, cut, pitch_of, tone, write

from simclr_pl.data.clips import AUDIO_EXTENSIONS, AudioReader, Clip
from simclr_pl.data.decode import UnreadableSample
from simclr_pl.errors import InputError


def reader(*paths: Path, rate: int = RATE, max_seconds: float = 60.0) -> AudioReader:
    return AudioReader(np.array([str(p).encode() for p in paths]), rate, max_seconds)


def whole(clip: Clip) -> np.ndarray:
    return clip.read(0, clip.frames)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_is_one_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.wav", tone(300), 8000)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*pip install 'simclr_pl\[audio\]'"):
        reader(path).open(0)


# What is converted


@pytest.mark.parametrize("rate", [2000, 11025, 44100])
@pytest.mark.parametrize("seconds", [1.0, 70.0])  # read whole, and stretch by stretch
def test_a_resampled_tone_keeps_its_frequency_and_height(
    rate: int, seconds: float, tmp_path: Path
) -> None:
    wave = tone(440, seconds, rate)
    clip = reader(write(tmp_path / "a.wav", wave, rate), max_seconds=100).open(0)
    assert clip.frames == pytest.approx(seconds * RATE, abs=1)
    part = clip.read(clip.frames // 3, 1200)
    assert part.dtype == np.float32
    assert pitch_of(part, RATE) == pytest.approx(440, abs=RATE / 1200)
    assert np.abs(part).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("rate", [RATE, 5512, 11025])
def test_stretches_of_a_long_file_are_those_of_the_whole(rate: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wave = (0.2 * random.standard_normal((150_000, 2))).astype(np.float32)
    path = write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    expected = wave.mean(1)
    if rate != RATE:
        expected = soxr.resample(expected, rate, RATE)
    clip = reader(path).open(0)
    for start in (0, 1, 4321, clip.frames // 2 + 7, clip.frames - 1000):
        part = clip.read(start, 1000)
        np.testing.assert_allclose(part, expected[start : start + 1000], atol=2e-4)


def test_channels_are_averaged(tmp_path: Path) -> None:
    wave = tone(300, channels=3)
    clip = reader(write(tmp_path / "a.wav", wave, subtype="FLOAT")).open(0)
    np.testing.assert_allclose(whole(clip), wave.mean(1), atol=1e-7)


def test_silence_is_usable_and_bytes_are_the_file_s(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.zeros(500, np.float32))
    found = reader(path)
    assert not whole(found.open(0)).any()
    assert (found.name(0), found.encoded(0)) == (str(path), path.read_bytes())


# What cannot be read


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_used_says_why(kind: str, tmp_path: Path) -> None:
    suffix, make, reason = BAD[kind]
    make(tmp_path / f"a{suffix}")
    with pytest.raises(UnreadableSample, match=reason) as caught:
        reader(tmp_path / f"a{suffix}").open(0)
    assert "\n" not in str(caught.value)
    assert str(caught.value)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_long_file_that_was_cut_short_is_found_without_reading_it(
    suffix: str, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).standard_normal(200_000) * 0.1
    path = write(tmp_path / f"a{suffix}", noise)
    reader(path).open(0)
    cut(path)
    with pytest.raises(UnreadableSample):
        reader(path).open(0)


def test_samples_within_a_long_file_are_checked_as_they_are_read(tmp_path: Path) -> None:
    wave = np.zeros(200_000, np.float32)
    wave[150_000] = np.nan
    clip = reader(write(tmp_path / "a.wav", wave, subtype="FLOAT")).open(0)
    assert not clip.read(0, 1000).any()
    with pytest.raises(UnreadableSample, match="not finite"):
        clip.read(149_500, 1000)


@pytest.mark.parametrize("length", [0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_file_from_a_pipe_whose_length_was_left_open_is_read(
    length: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.wav", tone(300))
    data = path.read_bytes()
    at = data.index(b"data")
    path.write_bytes(data[: at + 4] + struct.pack("<I", length) + data[at + 8 :])
    np.testing.assert_allclose(whole(reader(path).open(0)), tone(300)[:, 0], atol=1e-4)


def test_extensions_are_in_small_letters() -> None:
    assert all(e == e.lower() and e[0] == "." for e in AUDIO_EXTENSIONS)
