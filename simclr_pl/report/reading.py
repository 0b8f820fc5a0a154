"""A run's folder as plain data; whatever is missing or damaged is named, never an error."""

import csv
import json
import math
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from simclr_pl.report.curves import Curve, curve_of
from simclr_pl.report.map_data import MapData, read_map
from simclr_pl.secrets import masked

_STEP = re.compile(r"_(\d+)$")


@dataclass
class Run:
    """What a run's folder holds.

    Attributes:
        folder: of the run.
        name: for the page.
        summary: of summary.json; None without one that can be read, as the next two.
        environment: of environment.json.
        config: of config.yaml, with secrets masked.
        curves: by key of metrics.csv.
        histograms: of histograms.jsonl, each with ``step`` and the counts ``positive``, ``negative``.
        pictures: "views", "neighbours" and "map" to their files by step, in order.
        map: of pictures/map.npz.
        results: of the commands that were called on checkpoints: the file's name and what it holds.
        unreadable: names and reasons of samples.
        bad_steps: rows of bad_steps.tsv.
        problems: one line for each file that is missing or damaged.
    """

    folder: Path
    name: str
    summary: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    histograms: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, dict[int, Path]] = field(default_factory=dict)
    map: MapData | None = None
    results: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    unreadable: list[list[str]] = field(default_factory=list)
    bad_steps: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def has_pictures(self) -> bool:
        """Whether samples are to be seen: of texts, for example, a map is all that there is."""
        only_map = self.map is not None and self.map.thumbnails is None
        return not only_map or bool(self.pictures["views"] or self.pictures["neighbours"])

    @property
    def last_step(self) -> int | None:
        """The last step, from 0, that metrics.csv has."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=None)


def read_run(folder: Path, max_points: int = 600) -> Run:
    """Reads what there is.

    Args:
        folder: of the run.
        max_points: of each curve, at most.
    """
    path = folder.resolve()
    run = Run(folder, f"{path.parent.name}/{path.name}".lstrip("/"))

    def read(name: str, parse: Callable[[Path], Any], is_expected: bool = True) -> Any:
        file = folder / name
        if not file.exists():
            if is_expected:
                run.problems.append(f"{name} is missing")
            return None
        try:
            return parse(file)
        except Exception as error:  # zip, yaml, csv, json, PIL: each has its own
            run.problems.append(f"{name} cannot be read: {_one_line(error)}")
            return None

    run.summary = read("summary.json", _mapping)
    run.environment = read("environment.json", _mapping)
    run.config = masked(read("config.yaml", _yaml))
    table, lines = "metrics.csv", "histograms.jsonl"
    run.curves = read(table, lambda file: _curves(file, max_points, run.problems)) or {}
    run.histograms = read(lines, lambda file: _histograms(file, run.problems)) or []
    run.pictures = _pictures(folder / "pictures")
    run.map = read("pictures/map.npz", read_map)
    for kind in [kind for kind, files in run.pictures.items() if not files]:
        if run.has_pictures or kind == "map":
            run.problems.append(f"pictures/ has no {kind}")
    for file in sorted(folder.glob("checkpoints/*.json")):
        name = f"checkpoints/{file.name}"
        if (values := read(name, _mapping)) is not None:
            run.results.append((file.name, values))
    run.unreadable = read("unreadable.tsv", _unreadable, False) or []
    run.bad_steps = read("bad_steps.tsv", _bad_steps, False) or []
    return run


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _mapping(file: Path) -> dict[str, Any]:
    value = json.loads(_text(file))
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    found: dict[str, Any] = masked(value)
    return found


def _yaml(file: Path) -> dict[str, Any]:
    value = yaml.safe_load(_text(file))
    if not isinstance(value, dict):
        raise ValueError("it holds no mapping")
    return value


def _curves(file: Path, max_points: int, problems: list[str]) -> dict[str, Curve]:
    """Every column but step and epoch; of rows of the same step the last number counts."""
    points: dict[str, tuple[array[int], array[float]]] = {}  # lean: there may be millions
    broken = 0
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        for row in csv.DictReader(line.replace("\0", "") for line in lines):
            try:
                if None in row or None in row.values():
                    raise ValueError("too many cells, or too few")
                step = int(float(row.pop("step")))
                numbers = {k: float(v) for k, v in row.items() if k and k != "epoch" and v}
            except (KeyError, TypeError, ValueError, OverflowError):  # broken off
                broken += 1
                continue
            for key, value in numbers.items():
                steps, values = points.setdefault(key, (array("q"), array("d")))
                steps.append(step)
                values.append(value)
    if broken:
        problems.append(f"{file.name}: {broken} damaged rows are left out")
    found = {key: curve_of(*columns, max_points) for key, columns in points.items()}
    return {key: curve for key, curve in found.items() if len(curve.steps)}


def _histograms(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    broken = 0
    for line in _text(file).splitlines():
        try:
            value = json.loads(line)
            counts = {k: [max(0.0, float(c)) for c in value[k]] for k in ("positive", "negative")}
            if not all(len(c) > 1 and math.isfinite(sum(c)) and sum(c) for c in counts.values()):
                raise ValueError("no counts")
            found[int(value["step"])] = counts
        except (KeyError, TypeError, ValueError):  # broken off
            broken += 1
    if broken:
        problems.append(f"{file.name}: {broken} damaged lines are left out")
    return [{"step": step, **found[step]} for step in sorted(found)]


def _pictures(folder: Path) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = {"views": {}, "neighbours": {}, "map": {}}
    if (folder / "views.png").exists():
        found["views"][0] = folder / "views.png"
    for kind in ("neighbours", "map"):
        steps = {
            int(match[1]): file
            for file in folder.glob(f"{kind}_*.png")
            if (match := _STEP.search(file.stem))
        }
        found[kind] = dict(sorted(steps.items()))
    return found


def _unreadable(file: Path) -> list[list[str]]:
    parts = (line.partition("\t") for line in _text(file).splitlines() if line.strip())
    return [[name, reason] for name, _, reason in parts]


def _bad_steps(file: Path) -> list[dict[str, str]]:
    rows = csv.DictReader(_text(file).splitlines(), delimiter="\t")
    return [{k: v or "" for k, v in row.items() if isinstance(k, str)} for row in rows]
