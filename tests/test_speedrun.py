"""The speed run, at a length that a CPU manages: from the command to its table."""

import os
import re
import subprocess
import sys
from pathlib import Path

from pictures import noise, write

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "speedrun.py"
SHORT = {
    "trainer.max_steps": 2,
    "trainer.enable_progress_bar": "false",
    "data.global_batch_size": 4,
    "data.bank_size": 12,
    "checkpoint": "null",
    "pictures": "null",
    "report": "null",
}


def test_a_run_goes_from_images_of_mixed_sizes_to_its_figures(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        for i in range(2 * count):
            file = tmp_path / "set" / split / f"class {i % 2}" / f"{i}.png"
            write(file, noise(i, 40, 30 + i))
    words = [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    given = ["--config", "speedrun/cifar10", "--data", str(tmp_path / "set"), "--", *words]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *given],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "12 train, 12 bank, 6 query images, 0 MiB resident on cpu" in done.stdout
    assert "2 steps in" in done.stdout
    *_, row = (line for line in done.stdout.splitlines() if line.startswith("│"))
    cells = [float(cell.replace(",", "")) for cell in re.findall(r"[\d.,]+", row)]
    seed, wall, training, knn, linear, speed, *_, memory = cells
    assert seed == 0
    assert wall > training >= 0
    assert knn in [round(100 * hits / 6, 1) for hits in range(7)]
    assert linear in [round(100 * hits / 6, 1) for hits in range(7)]
    assert speed > 0
    assert memory > 100
