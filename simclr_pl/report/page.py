"""The page: what was read, laid out for the template.

Symbols: n points of a map.
"""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import simclr_pl
from simclr_pl.durable import publish, temporary_of
from simclr_pl.report.configs import differences, flattened
from simclr_pl.report.curves import ABOUT, GROUPS, grouped
from simclr_pl.report.images import picture, sheet, spread
from simclr_pl.report.outcome import outcome_of
from simclr_pl.report.reading import Run, read_run
from simclr_pl.report.results import result_rows
from simclr_pl.report.ridges import ridges_of

_HERE = Path(__file__).parent
_POINTS = 1200  # of a curve, over all runs
_PICTURES = 12  # of a kind, over all runs
_MAP_POINTS = 4000  # over all runs
_ROWS = 50  # of unreadable images and of bad steps
_SHARES = ("data", "augment", "compute", "monitors", "other")
_PALETTE = 8  # colours of runs in style.css


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Writes the page of one or several runs.

    Args:
        folders: of the runs.
        out: the file.

    Returns:
        The file.
    """
    page = page_of([read_run(f, max(100, _POINTS // len(folders))) for f in folders])
    temporary_of(out).write_text(page, encoding="utf-8")
    publish(temporary_of(out), out)
    return out


def page_of(runs: Sequence[Run]) -> str:
    """The page as HTML, which needs no other file.

    Args:
        runs: at least one; their names are made distinct.
    """
    _name_apart(runs)
    template = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html")
    shown = [_shown(run, i, len(runs)) for i, run in enumerate(runs)]
    keys = grouped(key for run in runs for key in run.curves)
    data = {
        "runs": [{"name": run.name, "colour": i % _PALETTE} for i, run in enumerate(runs)],
        "charts": {key: _chart(key, runs) for group in keys.values() for key in group},
        "maps": [each["map"] for each in shown],
    }
    return template.render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=shown,
        groups=keys,
        about=GROUPS,
        differences=differences([run.config or {} for run in runs]) if len(runs) > 1 else [],
        shares=_SHARES,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=simclr_pl.__version__,
        styles=[_inlined(name) for name in ("uplot/uPlot.min.css", "style.css")],
        scripts=[
            _inlined(name) for name in ("uplot/uPlot.iife.min.js", "page.js", "charts.js", "map.js")
        ],
        data=_script_data(data),
    )


def _inlined(name: str) -> Markup:
    """A file of this folder, which is not escaped."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))


def _script_data(value: Any) -> Markup:
    """JSON that no browser takes for the end of a script, whatever its strings hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text))


def _name_apart(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    for i, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({names[:i].count(run.name) + 1})"


def _chart(key: str, runs: Sequence[Run]) -> dict[str, Any]:
    series = []
    for i, run in enumerate(runs):
        if key in run.curves:
            curve = run.curves[key]
            values = [float(f"{value:.6g}") for value in curve.values.tolist()]
            notes = []
            if curve.not_finite:
                notes.append(f"{curve.not_finite:,} values are no finite numbers")
            if curve.total > len(values):
                notes.append(f"{len(values):,} of {curve.total:,} points, extremes kept")
            series.append(
                {"run": i, "steps": curve.steps.tolist(), "values": values, "notes": notes}
            )
    return {"about": ABOUT.get(key, ""), "series": series}


def _shown(run: Run, number: int, count: int) -> dict[str, Any]:
    """What the template shows of a run."""
    config = flattened(run.config) if run.config else {}
    shown_map = _map(run, max(300, _MAP_POINTS // count))
    pictures = {kind: _kind(run, kind, max(3, _PICTURES // count)) for kind in run.pictures}
    return {
        "name": run.name,
        "folder": str(run.folder),
        "colour": number % _PALETTE,
        "outcome": outcome_of(run),
        "time": _time(run),
        "ridges": ridges_of(run.histograms),
        "map": shown_map,
        "pictures": pictures,
        "results": result_rows(run.results),
        "config": _by_first_word(config),
        "environment": flattened(run.environment) if run.environment else {},
        "unreadable": run.unreadable[:_ROWS],
        "unreadable_count": len(run.unreadable),
        "bad_steps": run.bad_steps[:_ROWS],
        "bad_steps_count": len(run.bad_steps),
        "problems": run.problems,  # last: reading pictures may add some
    }


def _by_first_word(config: dict[str, str]) -> dict[str, dict[str, str]]:
    """Groups of keys; those without further words are of the run."""
    found: dict[str, dict[str, str]] = {"run": {}}
    for key, value in config.items():
        word, *others = re.split(r"[.\[]", key, maxsplit=1)
        found.setdefault(word if others else "run", {})[key] = value
    return {word: rows for word, rows in found.items() if rows}


def _time(run: Run) -> dict[str, float]:
    """Shares of the time, by what it went to, of the whole run; without a summary, their means."""
    split = (run.summary or {}).get("time")
    if isinstance(split, dict) and all(isinstance(split.get(k), int | float) for k in _SHARES):
        return {name: max(0.0, float(split[name])) for name in _SHARES}
    curves = {name: run.curves.get(f"throughput/{name}") for name in _SHARES}
    return {name: float(c.values.mean()) for name, c in curves.items() if c is not None}


def _kind(run: Run, kind: str, most: int) -> dict[str, Any]:
    """The pictures of a kind, thinned where there are many."""
    files = run.pictures[kind]
    found = []
    for step in spread(list(files), most):
        try:
            found.append((step, *picture(files[step])))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's, of broken PNG files
            run.problems.append(f"pictures/{files[step].name} cannot be read: {error}")
    return {"shown": found, "total": len(files)}


def _map(run: Run, most: int) -> dict[str, Any] | None:
    """The map for the page's script, with fewer points where there are many."""
    found = run.map
    if found is None:
        return None
    n = len(found.xy)
    kept = np.array(spread(range(n), most), np.int64)
    place = np.full(n, -1)
    place[kept] = np.arange(len(kept))
    neighbours = place[found.neighbours[kept]]  # -1 where it is left out
    image, columns = "", 0
    try:
        if found.thumbnails is None:
            if run.has_pictures:
                run.problems.append("pictures/map_thumbnails.jpg is missing")
        else:
            image, columns = sheet(found.thumbnails, n, kept.tolist())
    except (OSError, ValueError) as error:
        run.problems.append(f"pictures/map_thumbnails.jpg cannot be read: {error}")
    return {
        "xy": [[float(f"{v:.4g}") for v in row] for row in found.xy[kept].tolist()],
        "label": found.label[kept].tolist(),
        "image": found.image[kept].tolist(),
        "neighbours": neighbours.tolist(),
        "similarity": np.nan_to_num(found.similarity[kept]).round(3).tolist(),
        "classes": found.classes,
        "axes": found.axes,
        "step": found.step,
        "total": n,
        "sheet": image,
        "columns": columns,
    }
