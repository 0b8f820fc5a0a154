"""`simclr report`: runs as one HTML page."""

from pathlib import Path

from simclr_pl.errors import InputError
from simclr_pl.report import write_report

_FILES = ("metrics.csv", "config.yaml", "summary.json", "environment.json")


def report(runs: list[str], out: str | None = None) -> None:
    """Show one run, or several side by side, as one HTML page.

    The page needs no network and no other file: scores against the encoder at initialisation and raw
    pixels, curves, similarities, pictures, a map of the images to walk through, where the time went,
    results of later commands, configuration and environment; of several runs also what differs between
    their configurations. Files that are missing or damaged are named on the page. For example:

    simclr report runs/simclr/version_0 runs/simclr/version_1

    Args:
        runs: Folders of runs, separated by spaces.
        out: The HTML file; by default report.html in the run's folder, of several runs in the working
            folder.
    """
    folders = [Path(run) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if not any((folder / name).is_file() for name in _FILES):
            raise InputError(
                f"`runs` must be folders of runs; got {run!r}, which holds none of "
                f"{', '.join(_FILES)}. Give folders such as runs/simclr/version_0."
            )
    if out is None:
        file = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    else:
        file = Path(out)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(
            f"`out` must be a file in a folder that exists; got {str(file)!r}. Set `--out`."
        )
    print(f"report: {write_report(folders, file)} ({file.stat().st_size / 1e6:.1f} MB)")
