"""A line of `simclr doctor`, and how it says sizes and times."""

from typing import Literal, NamedTuple

Level = Literal["ok", "warning", "error"]


class Line(NamedTuple):
    """The outcome of one check.

    Attributes:
        level: "ok"; "warning", it will run, but not well; "error", it will not.
        name: of what was checked.
        text: what was found.
        remedy: what to do about it; empty where nothing is to be done.
    """

    level: Level
    name: str
    text: str
    remedy: str = ""


def size(count: float) -> str:
    """Bytes as "1.5 GiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return (
                f"{count / scale:,.3g} {unit}"
                if count < 1000 * scale
                else f"{count / scale:,.0f} {unit}"
            )
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as "3.2 h"."""
    for unit, scale in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * scale or unit == "s":
            number = seconds / scale
            return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"
    raise AssertionError


def number(value: float) -> str:
    """A number as "12,345" or "0.12"."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
