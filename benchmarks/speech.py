"""Speech: kNN on speakers that were not learned from, and the speed of the views.

    python benchmarks/speech.py                    digits spoken by espeak-ng, which must be installed
    python benchmarks/speech.py --root FOLDER      a folder of your own
    python benchmarks/speech.py --views            the speed of the views alone
    python benchmarks/speech.py --trainer.max_epochs 20     other options are those of `simclr fit`

Without a folder, espeak-ng speaks: ten digits by twelve voices, fifteen takes each, of random pitch and
speed, at 8 kHz, cut to what sounds. Its voices share most of how they speak: cleanly recorded, even an
untrained encoder knows the digits. So each take goes through a filter of its own, which tilts the
spectrum, and has white noise at -5 to 10 dB. Two voices are kept for evaluation. The preset
`spoken-digits` is then trained from several seeds; printed is the accuracy of kNN (k = 20) on the trained
features, on those of the encoder at initialisation, and on the mean of the log-mel over time, and that of
a linear classifier.

The views are timed, in one thread and as CPU time, against the same operations clip by clip in plain
torch: two views of each of 256 clips of the preset's length.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
import yaml
from torch import Tensor

from simclr_pl.audio_augment import AudioAugment
from simclr_pl.augmentation import Rows
from simclr_pl.cli import main as simclr
from simclr_pl.data.clips import Clip
from simclr_pl.log_mel import LogMel

RATE = 8000
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VOICES = [  # the last two, by alphabet, are those for evaluation
    *("Alex", "Andy", "Annie", "Belinda", "Denis", "Linda"),
    *("Michael", "Pablo", "Steph", "aunty", "grandpa", "victor"),
]
PRESET = Path(__file__).parents[1] / "configs" / "spoken-digits.yaml"
OPTIONS: dict[str, Any] = yaml.safe_load(PRESET.read_text())["data"]["augment"]["init_args"]


# The set.


def speak(folder: Path, takes: int) -> None:
    """Writes ``digit_voice_take.wav`` files."""
    jobs = [(d, voice, take) for voice in VOICES for d in range(10) for take in range(takes)]
    seeds = np.random.SeedSequence(0).spawn(len(jobs))
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda job, seed: _speak(folder, *job, seed), jobs, seeds))


def _speak(folder: Path, digit: int, voice: str, take: int, seed: Any) -> None:
    random = np.random.default_rng(seed)
    path = folder / f"{digit}_{voice}_{take}.wav"
    pitch, speed = random.integers((25, 130), (75, 210))
    options = ["-v", f"en-us+{voice}", "-p", str(pitch), "-s", str(speed), "-w", str(path)]
    subprocess.run(["espeak-ng", *options, DIGITS[digit]], check=True)
    wave, rate = soundfile.read(path)
    wave = soxr.resample(wave, rate, RATE)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    wave = wave[loud[0] : loud[-1] + 1]
    wave[1:] += random.uniform(-0.9, 0.9) * wave[:-1]
    ratio = 10 ** (-random.uniform(-5, 10) / 20)
    wave += random.standard_normal(len(wave)) * ratio * np.sqrt(np.mean(wave**2))
    soundfile.write(path, wave * (random.uniform(0.1, 0.5) / np.abs(wave).max()), RATE)


# kNN.


def train(root: str, seed: int, options: list[str]) -> dict[str, float]:
    """Trains the preset, and returns the run's summary."""
    with tempfile.TemporaryDirectory() as runs:
        arguments = ["--config", "spoken-digits", "--data.source.root", root]
        arguments += ["--seed_everything", str(seed), "--trainer.default_root_dir", runs]
        simclr(["fit", *arguments, "--trainer.enable_progress_bar", "false", *options])
        (summary,) = Path(runs).glob("*/*/summary.json")
        found: dict[str, float] = json.loads(summary.read_text())
    return found


def report(summaries: list[dict[str, float]]) -> None:
    for protocol in ("knn", "linear"):
        for text, end in (
            ("trained", ""),
            ("at initialisation", "_init"),
            ("mean log-mel", "_raw"),
        ):
            values = [100 * summary[f"{protocol}_top1{end}"] for summary in summaries]
            each = ", ".join(f"{value:.1f}" for value in values)
            print(f"{protocol:<6} {text:<18} {statistics.mean(values):5.1f} %   ({each})")


# The views.


def plain(wave: Tensor, front_end: LogMel) -> Tensor:
    """A view of one clip (L,) by torch's own operations and generator: the way of most code."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(()).item()

    length = round(OPTIONS["seconds"] * RATE)
    speed = uniform(*OPTIONS["speed"])
    wave = torch.nn.functional.interpolate(wave[None, None], scale_factor=1 / speed, mode="linear")[
        0, 0
    ]
    if len(wave) > length:
        start = int(uniform(0, len(wave) - length + 1))
        wave = wave[start : start + length]
    left = int(uniform(0, length - len(wave) + 1))
    wave = torch.nn.functional.pad(wave, (left, length - len(wave) - left))
    wave = wave * 10 ** (uniform(-6, 6) / 20)
    if uniform(0, 1) < OPTIONS["noise"]:
        noise = torch.randn_like(wave)
        wave = wave + noise * wave.square().mean().sqrt() * 10 ** (-uniform(*OPTIONS["snr"]) / 20)
    mel = front_end(wave[None], torch.tensor([uniform(*OPTIONS["pitch"])]))[0]
    mel = (mel - OPTIONS["mean"]) / OPTIONS["std"]
    for axis, share in ((1, 0.2), (0, 0.25)):
        size = mel.shape[axis]
        width = int(uniform(0, round(share * size) + 1))
        first = int(uniform(0, size - width + 1))
        mel.narrow(axis, first, width).zero_()
    return mel[None]


def views() -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    waves = [
        (0.1 * random.standard_normal(int(n))).astype(np.float32)
        for n in random.uniform(0.25, 0.7, 256) * RATE
    ]
    clips = [Clip(RATE, len(w), lambda start, count, w=w: w[start : start + count]) for w in waves]
    augment = AudioAugment(**OPTIONS)
    keys = Rows(0, 0, np.tile(np.arange(256), 2), np.repeat(np.arange(2), 256))
    front_end = LogMel(RATE, OPTIONS["n_mels"], OPTIONS["window"], OPTIONS["hop"])
    tensors = [torch.from_numpy(w) for w in waves]

    def prepare() -> dict[str, Any]:
        return augment.prepare(clips * 2, keys)

    table = {name: torch.from_numpy(value) for name, value in prepare().items()}
    times = {
        "loader": cpu_seconds(prepare),
        "device stage, on the CPU": cpu_seconds(lambda: augment.finish(table)),
        "plain torch": cpu_seconds(lambda: torch.stack([plain(w, front_end) for w in tensors * 2])),
    }
    for text, seconds in times.items():
        print(f"{text:<26} {512 / seconds:10,.0f} views/s")
    own = times["loader"] + times["device stage, on the CPU"]
    print(
        f"{'together':<26} {512 / own:10,.0f} views/s, {times['plain torch'] / own:.1f} times plain torch"
    )


def cpu_seconds(work: Callable[[], Any], repeats: int = 9) -> float:
    """Median CPU time of a call."""
    times = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return statistics.median(times[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--root", help="folder of digit_speaker_number.wav files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--takes", type=int, default=15, help="of a digit by a voice")
    parser.add_argument("--views", action="store_true", help="time the views alone")
    options, others = parser.parse_known_args()
    views()
    if not options.views:
        with tempfile.TemporaryDirectory() as spoken:
            if not options.root:
                speak(Path(spoken), options.takes)
            root = options.root or spoken
            report([train(root, seed, others) for seed in range(options.seeds)])
