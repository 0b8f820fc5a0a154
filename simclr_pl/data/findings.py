"""What `simclr data check` shows on the terminal."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from simclr_pl.data.cleaning import RECORD, Cleaned
from simclr_pl.data.inspection import DOUBTFUL, KINDS, UNUSABLE, Finding, Report
from simclr_pl.data.selection import COPIES

SHOWN = 20  # findings of a kind, or images that are left out


def console() -> Console:
    """The terminal, for paths as they are."""
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def show(src: str, report: Report) -> None:
    """What `examine` found in a set."""
    terminal = console()
    by_kind = Counter(finding.kind for finding in report.findings)
    for kind in KINDS:
        found = [finding for finding in report.findings if finding.kind == kind]
        for finding in found[:SHOWN]:
            terminal.print(_line(finding))
        if len(found) > SHOWN:
            terminal.print(f"{kind}: and {len(found) - SHOWN:,} more")
    table = Table(title=src, title_justify="left")
    for heading in ("split", report.unit, "classes", f"{report.unit} of a class"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, count in report.images.items():
        table.add_row(split, f"{count:,}", *_balance(report.classes.get(split, {})))
    terminal.print(table)
    if by_kind:
        summary = Table()
        summary.add_column("finding")
        summary.add_column(report.unit, justify="right")
        summary.add_column("")
        for kind in (kind for kind in KINDS if by_kind[kind]):
            summary.add_row(kind, f"{by_kind[kind]:,}", _judgement(kind))
        terminal.print(summary)
    which = "All" if report.usable else "Not all"
    terminal.print(f"{which} {report.unit} are usable.")


def show_cleaned(src: str, out: str, report: Report, cleaned: Cleaned) -> None:
    """What `clean` left out of a set, and wrote."""
    terminal = console()
    for finding in report.findings:
        if finding.position < 0:
            terminal.print(f"{_line(finding)}; its images are verified, labels and paths are not")
    by_kind = Counter(item.kind for item in cleaned.left_out.values())
    for item in list(cleaned.left_out.values())[:SHOWN]:
        terminal.print(f"{item.kind}: {item.split}: {item.path}: {item.reason}")
    if len(cleaned.left_out) > SHOWN:
        terminal.print(f"and {len(cleaned.left_out) - SHOWN:,} more")
    table = Table(title=src, title_justify="left")
    table.add_column("split")
    for heading in ("images", "left out", "kept"):
        table.add_column(heading, justify="right")
    for split, (before, after) in cleaned.images.items():
        table.add_row(split, f"{before:,}", f"{before - after:,}", f"{after:,}")
    terminal.print(table)
    kept = Counter(
        finding.kind
        for finding in report.findings
        if finding.kind not in (*UNUSABLE, *COPIES)
        and (finding.split, finding.position) not in cleaned.left_out
    )
    if by_kind or kept:
        summary = Table()
        summary.add_column("finding")
        summary.add_column("images", justify="right")
        summary.add_column("")
        for kind in (*UNUSABLE, *COPIES):
            if by_kind[kind]:
                summary.add_row(kind, f"{by_kind[kind]:,}", "left out")
        for kind in (kind for kind in KINDS if kept[kind]):
            summary.add_row(kind, f"{kept[kind]:,}", f"kept, {_judgement(kind)}")
        terminal.print(summary)
    terminal.print(f"Wrote {out}: {_written(cleaned)}. {out}/{RECORD} lists what is left out.")


def _written(cleaned: Cleaned) -> str:
    """E.g. "30 hard links to 1.2 MB and 2 copies of 30 KB"."""
    parts = (
        f"{count:,} {what} {'to' if what == 'hard links' else 'of'} {size_of(size)}"
        for what, (count, size) in cleaned.written.items()
    )
    return " and ".join(parts)


def _line(finding: Finding) -> str:
    where = f"{finding.split}: " if finding.split else ""
    return f"{finding.kind}: {where}{finding.path}: {finding.detail}"


def _judgement(kind: str) -> str:
    if kind in UNUSABLE:
        return "unusable"
    return "to be judged" if kind in DOUBTFUL else "converted on reading"


def _balance(counts: dict[str, int]) -> tuple[str, str]:
    if not counts:
        return "-", "-"
    low, high = min(counts, key=lambda c: counts[c]), max(counts, key=lambda c: counts[c])
    if counts[low] == counts[high]:
        return f"{len(counts):,}", f"{counts[low]:,} each"
    return f"{len(counts):,}", f"{counts[low]:,} ({low}) to {counts[high]:,} ({high})"


def size_of(count: int) -> str:
    """Bytes, in the unit that suits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
