"""`simclr report`: where the page goes, and what is no run."""

from pathlib import Path

import pytest
from test_report import write_run

from simclr_pl.cli import main


def test_one_run_has_its_page_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    main(["report", str(run)])
    assert (run / "report.html").stat().st_size > 50_000
    assert f"report: {run / 'report.html'} (" in capsys.readouterr().out


def test_several_runs_have_theirs_in_the_working_folder_or_where_asked(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    main(["report", *runs])
    assert Path("report.html").is_file()
    main(["report", *runs, "--out", str(tmp_path / "both.html")])
    assert "What differs between the configurations" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nothing"], "`runs` must be folders of runs; got"),
        (["{}/run", "--out", "{}/no/x.html"], "`out` must be a file in a folder that exists"),
        (["{}/run", "--out", "{}"], "`out` must be a file in a folder that exists"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(SystemExit) as error:
        main(["report", *(a.format(tmp_path) for a in arguments)])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
