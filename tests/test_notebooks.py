"""The notebooks run as they are, hold what they claim, and only use the package."""

import ast
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NAMES = [file.stem for file in NOTEBOOKS]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def cells(file: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]


def test_the_three_notebooks_are_there() -> None:
    assert NAMES == ["01_first_run", "02_the_loss", "03_your_data"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=NAMES)
def test_notebook_defines_nothing_and_has_claims(file: Path) -> None:
    transform = TransformerManager().transform_cell
    nodes = [n for cell in cells(file) for n in ast.walk(ast.parse(transform(cell.source)))]
    assert not [node.name for node in nodes if isinstance(node, DEFINITIONS)]
    assert any(isinstance(node, ast.Assert) for node in nodes)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=NAMES)
def test_committed_outputs_are_whole_small_and_of_no_machine(file: Path) -> None:
    assert file.stat().st_size < 300_000
    assert [cell.execution_count for cell in cells(file)] == list(range(1, len(cells(file)) + 1))
    outputs = [output for cell in cells(file) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    for home in (str(Path(__file__).parents[1]), str(Path.home()), "/tmp/"):
        assert home not in file.read_text()


@pytest.mark.filterwarnings("ignore")  # of the kernel's client, not of the package
@pytest.mark.parametrize("file", NOTEBOOKS, ids=NAMES)
def test_notebook_runs_and_its_claims_hold(file: Path, tmp_path: Path) -> None:
    place = {"metadata": {"path": str(tmp_path)}}  # its runs go there
    done = NotebookClient(nbformat.read(file, 4), timeout=250, resources=place).execute()
    assert all(c.execution_count for c in done.cells if c.cell_type == "code")
