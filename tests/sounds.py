"""Sound files, good and bad, for the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 4000


def tone(hertz: float, seconds: float = 0.3, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """A sine of half the scale; further channels are weaker."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave / (1 + c) for c in range(channels)], 1).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate: int = RATE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **options)
    return path


def pitch_of(wave: np.ndarray, rate: int) -> float:
    """Of the strongest tone, in hertz."""
    return float(np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax() * rate / len(wave))


def digits(root: Path, takes: int = 2, speakers: tuple[str, ...] = ("ann", "bob", "cy")) -> Path:
    """Harmonic tones with a formant of the digit, at a pitch of the speaker."""
    for s, speaker in enumerate(speakers):
        for digit in range(10):
            for take in range(takes):
                time = np.arange(1000 + 37 * take) / RATE
                pitch, formant = 90 + 40 * s + 3 * take, 300 + 150 * digit
                wave = sum(
                    np.exp(-(((k * pitch - formant) / 150) ** 2))
                    * np.sin(2 * np.pi * k * pitch * time)
                    for k in range(1, 15)
                )
                write(root / f"{digit}_{speaker}_{take}.wav", (0.3 * wave).astype(np.float32))
    return root


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * share)])


def spoilt(value: float) -> np.ndarray:
    wave = tone(300)
    wave[700] = value
    return wave


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "empty": (".wav", lambda p: p.write_bytes(b""), "the file is empty"),
    "text": (".flac", lambda p: p.write_bytes(b"no sound" * 50), "Format not recognised"),
    "no frames": (".wav", lambda p: write(p, np.zeros((0, 1), np.float32)), "no frames"),
    "cut wav": (".wav", lambda p: (write(p, tone(300)), cut(p)), "cut short: .* bytes are missing"),
    "cut float": (
        ".wav",
        lambda p: (write(p, tone(300), subtype="FLOAT"), cut(p)),
        "cut short",
    ),
    "cut head": (".wav", lambda p: (write(p, tone(300)), cut(p, 0.01)), "."),
    "cut flac": (
        ".flac",
        lambda p: (write(p, tone(300, 3.0)), cut(p)),
        "flac decoder lost sync|decoded|short",
    ),
    "cut mp3": (".mp3", lambda p: (write(p, tone(300, 3.0), 8000), cut(p)), "cut short"),
    "cut ogg": (
        ".ogg",
        lambda p: (write(p, tone(300, 3.0), 8000), cut(p)),
        "malformed|no frames|short",
    ),
    "nan": (".wav", lambda p: write(p, spoilt(np.nan), subtype="FLOAT"), "not finite"),
    "inf": (".wav", lambda p: write(p, spoilt(np.inf), subtype="FLOAT"), "not finite"),
    "long": (".wav", lambda p: write(p, tone(300, 61.0)), "61 seconds are more than `max_seconds`"),
    "folder": (".wav", lambda p: p.mkdir(), "."),
    "gone": (".wav", lambda p: None, "No such file"),
}
