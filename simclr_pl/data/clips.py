"""Sound files as clips: one channel of one rate, read whole or stretch by stretch.

Symbols: M files.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.sources import Reader
from simclr_pl.data.sweep import Bar
from simclr_pl.data.workers import cores
from simclr_pl.distributed import rank
from simclr_pl.errors import InputError

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_WHOLE = 2**17  # frames of a file up to which it is read at once, for all views: 8 s at 16 kHz
_TAIL = 0.05  # seconds on either side of a stretch that soxr's filter sees; it fades within half of that
_CHUNK = 64  # heads that a thread reads at a time


class Clip(NamedTuple):
    """A sound whose length is known and whose samples are read on demand.

    Attributes:
        rate: in hertz.
        frames: its length, in samples at that rate.
        read: ``read(start, count)`` returns (count,) float32, one channel, in [-1, 1] as a rule; raises
            `UnreadableSample`.
    """

    rate: int
    frames: int
    read: Callable[[int, int], np.ndarray]


class AudioReader(Reader):
    """Reads sound files, as one channel of one rate.

    Args:
        names: (M,) paths as bytes.
        sample_rate: of the clips, in hertz; files of another rate are resampled.
        max_seconds: longer files are not used.
    """

    def __init__(self, names: np.ndarray, sample_rate: int, max_seconds: float) -> None:
        self.names, self.sample_rate, self.max_seconds = names, sample_rate, max_seconds

    def name(self, i: int) -> str:
        """The path."""
        return os.fsdecode(self.names[i])

    def encoded(self, i: int) -> bytes:
        """The file's content."""
        try:
            return Path(self.name(i)).read_bytes()
        except OSError as error:
            raise UnreadableSample(error.strerror or str(error)) from error

    def open(self, i: int) -> Clip:
        """Reads the head of clip ``i``, and short clips whole: once for all views."""
        path = self.name(i)
        with _sound(path) as file:
            rate, frames, _ = _head(file, path)
            if frames > self.max_seconds * rate:
                raise UnreadableSample(
                    f"{frames / rate:,.0f} seconds are more than `max_seconds` {self.max_seconds:g}"
                )
            if frames <= _WHOLE:
                wave = self._resampled(_frames(file, 0, frames), rate)
                return Clip(self.sample_rate, len(wave), lambda at, count: wave[at : at + count])
            _frames(file, frames - 1, 1)  # a file that was cut short has no end
        length = frames * self.sample_rate // rate

        def read(start: int, count: int) -> np.ndarray:
            return self._stretch(path, rate, frames, start, count)

        return Clip(self.sample_rate, length, read)

    def _stretch(self, path: str, rate: int, frames: int, start: int, count: int) -> np.ndarray:
        """Samples [start, start + count) at our rate, of which only what is needed is read."""
        if rate == self.sample_rate:
            return self._read(path, start, count)
        # Each `theirs` frames of the file are `ours` of the clip: from a multiple on, both grids meet.
        ours, theirs = (n // gcd(rate, self.sample_rate) for n in (self.sample_rate, rate))
        tail = -(-int(_TAIL * rate) // theirs)
        first = max(0, start // ours - tail)
        end = min(frames, (-(-(start + count) // ours) + tail) * theirs)
        wave = self._resampled(self._read(path, first * theirs, end - first * theirs), rate)
        return wave[start - first * ours : start - first * ours + count]

    def _read(self, path: str, start: int, count: int) -> np.ndarray:
        with _sound(path) as file:
            return _frames(file, start, count)

    def _resampled(self, wave: np.ndarray, rate: int) -> np.ndarray:
        if rate == self.sample_rate:
            return wave
        wave = _package("soxr").resample(wave, rate, self.sample_rate)
        if not len(wave):
            raise UnreadableSample("it is shorter than one sample at `sample_rate`")
        return wave


@contextmanager
def _sound(path: str) -> Iterator[Any]:
    """An opened file of soundfile's."""
    soundfile = _package("soundfile")
    try:
        if not os.path.getsize(path):
            raise UnreadableSample("the file is empty")
        with soundfile.SoundFile(path) as file:
            yield file
    except OSError as error:
        raise UnreadableSample(error.strerror or str(error)) from error
    except soundfile.SoundFileError as error:
        raise UnreadableSample(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What libsndfile says, without the path; of some damage it says nothing."""
    said = getattr(error, "error_string", "") or ""
    return said.removeprefix("Error : ").rstrip(".") or "it cannot be decoded"


def _head(file: Any, path: str) -> tuple[int, int, int]:
    """The rate in hertz, the frames and the channels of an opened file."""
    if file.frames < 1:
        raise UnreadableSample("it has no frames")
    if file.format in ("WAV", "WAVEX") and (missing := _missing_bytes(path)):
        raise UnreadableSample(f"it is cut short: {missing:,} bytes are missing")
    return file.samplerate, file.frames, file.channels


def _missing_bytes(path: str) -> int:
    """Bytes by which a WAV file's data end too early: libsndfile corrects the head without a word."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 12  # after "RIFF", its size, "WAVE"
        while at + 8 <= size:
            file.seek(at)
            kind, length = file.read(4), int.from_bytes(file.read(4), "little")
            if kind == b"data":
                # Programs that write to a pipe leave the length open: as large as this, or more.
                return 0 if length >= 0x7FFFF000 else max(0, at + 8 + length - size)
            at += 8 + length + length % 2
    return 0


def _frames(file: Any, start: int, count: int) -> np.ndarray:
    """Frames of an opened file as (count,) float32, its channels averaged."""
    file.seek(start)
    wave = file.read(count, "float32", always_2d=True)
    if len(wave) < count:
        raise UnreadableSample(
            f"it is cut short: it ends after frame {start + len(wave):,} of {start + count:,} or more"
        )
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(1)
    if not np.isfinite(wave).all():
        raise UnreadableSample("it holds samples that are not finite")
    return np.ascontiguousarray(wave)


def heads_of(names: np.ndarray) -> list[tuple[int, int, int] | None]:
    """What `_head` returns for each file, None where one cannot be read; in threads, with a bar."""
    parts = [names[at : at + _CHUNK] for at in range(0, len(names), _CHUNK)]
    heads: list[tuple[int, int, int] | None] = []
    with (
        ThreadPoolExecutor(4 * cores()) as threads,
        Bar("Reading heads", len(names), "clips", hidden=rank() > 0 or len(names) < 5000) as bar,
    ):
        for part in threads.map(_part, parts):
            heads += part
            bar.advance(len(part))
    return heads


def _part(names: np.ndarray) -> list[tuple[int, int, int] | None]:
    return [_head_or_none(os.fsdecode(name)) for name in names]


def _head_or_none(path: str) -> tuple[int, int, int] | None:
    try:
        with _sound(path) as file:
            return _head(file, path)
    except UnreadableSample:
        return None


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"sounds need the package {name}, which is not installed. Run "
            "pip install 'simclr_pl[audio]'."
        ) from error
