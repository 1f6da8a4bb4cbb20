"""docs/notebook.ipynb, run as Jupyter runs it: qtune trains, plots and merges in a kernel, and can be interrupted."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.long  # a kernel that imports, trains twice, merges and draws
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "notebook.ipynb"
INTERRUPTED = """\
import os, signal, threading
import qtune

recipe = qtune.load_recipe("medical", {"train.max_steps": 50, "data.max_rows": 40, "evaluate.rows": 0}, demo=True)

def interrupt(event):
    if isinstance(event, qtune.events.StepDone) and event.step == 2:
        os.kill(os.getpid(), signal.SIGINT)  # as the button of a notebook does

qtune.finetune(recipe, "stopped", interrupt)
"""


def shown(outputs: Any, kind: str) -> str:
    """All that a cell shows of one kind, such as text/html."""
    return "".join(output.data[kind] for output in outputs if "data" in output and kind in output.data)


def printed(outputs: Any, stream: str = "stdout") -> str:
    return "".join(output.text for output in outputs if output.get("name") == stream)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def cells(place: Path) -> list[list[dict[str, Any]]]:
    """The outputs of the page's code cells, and of two more in the same kernel."""
    notebook = nbformat.read(PAGE, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    more = (INTERRUPTED, "6 * 7")
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("IPYTHONDIR", str(place / "ipython"))
        for name in ("MPLBACKEND", "COLUMNS"):
            patch.delenv(name, raising=False)
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": place}}).execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def test_the_page_trains_the_demo_plots_its_loss_and_merges_it(place: Path, cells: list[Any]) -> None:
    checked, planned, trained, plotted, told, answers, merged = cells[1:8]
    assert "1 warning in 400 rows" in shown(checked, "text/plain")
    assert "<pre" in shown(checked, "text/html")  # rich, as Jupyter shows it
    assert "fits" in shown(planned, "text/plain")
    assert "step 12/12  loss " in printed(trained)
    assert shown(plotted, "image/png")
    assert shown(told, "text/markdown") == (place / "run" / "summary.md").read_text()
    assert "<table" in shown(answers, "text/html")
    assert shown(merged, "text/plain") == "True"
    assert (place / "merged" / "config.json").is_file()


def test_no_library_speaks_in_it(cells: list[Any]) -> None:
    assert "".join(printed(outputs, "stderr") for outputs in cells) == ""


def test_an_interrupted_kernel_stops_the_training_and_lives_on(place: Path, cells: list[Any]) -> None:
    *_, stopped, after = cells
    assert "stopped" in shown(stopped, "text/markdown")
    assert (place / "stopped" / "adapter" / "adapter_model.safetensors").is_file()
    assert os.listdir(place / "stopped" / "checkpoints")
    assert shown(after, "text/plain") == "42"
