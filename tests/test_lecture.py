"""The notebook: its source, what is shown of it in the documentation, and that it runs."""

import re

import jupytext
import pytest
from helpers import ROOT
from nbclient import NotebookClient

SOURCE = ROOT / "examples" / "lecture.py"
NOTEBOOK = ROOT / "examples" / "lecture.ipynb"


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_notebook_is_its_source_without_outputs():
    notebook = jupytext.read(NOTEBOOK)
    assert cells(notebook) == cells(jupytext.read(SOURCE)), "jupytext --to ipynb examples/lecture.py"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_the_documentation_shows_the_notebook_as_it_is():
    page = (ROOT / "docs" / "lecture.md").read_text()
    shown = re.findall(r"(?ms)^```python\n(.*?)\n```$", page)
    code = [source for kind, source in cells(jupytext.read(SOURCE)) if kind == "code"]
    assert shown == code, "see docs/development.md"
    for picture in re.findall(r"!\[\w+\]\((\S+)\)", page):
        assert (ROOT / "docs" / picture).stat().st_size > 5000


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = jupytext.read(SOURCE)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == sum("plt.show()" in cell.source for cell in notebook.cells)
