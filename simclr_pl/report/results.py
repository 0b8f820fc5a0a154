"""Results of the commands that were called on a run's checkpoints, as rows of one table."""

from collections.abc import Sequence
from typing import Any

HEADINGS = ("command", "checkpoint", "of what", "top-1, %", "95 % interval", "top-5, %")
_OF_WHAT = {
    "": "this encoder",
    "_init": "at initialisation",
    "_raw": "no encoder",
    "_random": "from random initialisation",
    "_teacher": "its teacher",
}


def result_rows(results: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Rows of cells, under `HEADINGS`.

    Args:
        results: file names, ``<checkpoint>.<command>.json``, and what the files hold; what has no top-1
            has no row.
    """
    rows = []
    for file, values in results:
        checkpoint, _, command = file.removesuffix(".json").rpartition(".")
        named = {**_OF_WHAT, "_raw": str(values.get("raw_name") or _OF_WHAT["_raw"])}
        for suffix, what in named.items():
            top1 = _percent(values.get(f"top1{suffix}"))
            if top1:
                where = (command, checkpoint, _where(values)) if not suffix else ("", "", "")
                name = f"{what}{where[2]}" if not suffix else what
                ends = _interval(values.get(f"top1_interval{suffix}"))
                top5 = _percent(values.get(f"top5{suffix}")) or "\N{EN DASH}"
                rows.append([*where[:2], name, top1, ends, top5])
    return rows


def _where(values: dict[str, Any]) -> str:
    """What else the result is of, as far as the file says."""
    labels, data = values.get("labels"), values.get("dataset")
    step = values.get("step")
    parts = [f"step {step:,}"] if isinstance(step, int) else []
    parts += [f"{labels:,} labels"] if isinstance(labels, int) else []
    parts += [data] if isinstance(data, str) else []
    return f" ({', '.join(parts)})" if parts else ""


def _percent(share: Any) -> str:
    return f"{100 * share:.1f}" if isinstance(share, int | float) else ""


def _interval(ends: Any) -> str:
    if isinstance(ends, list) and len(ends) == 2 and all(map(_percent, ends)):
        return f"{_percent(ends[0])} to {_percent(ends[1])}"
    return "\N{EN DASH}"
