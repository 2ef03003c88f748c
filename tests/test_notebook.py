"""The notebook in examples/ runs from top to bottom and prints what it shows."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
for module in ("accelerate", "bm25s", "datasets", "fastapi", "ipykernel", "ir_measures", "uvicorn"):
    pytest.importorskip(module)

NOTEBOOK = Path(__file__).parents[1] / "examples" / "folder_of_texts.ipynb"


def read_printed(notebook):
    """What each code cell prints, and the values that it shows. Libraries write warnings to standard error."""
    return [
        "".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
            if output.get("name") != "stderr"
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def first_line(text):
    return re.sub(r" *-?\d+(\.\d+)?(e-\d+)?", " #", text.partition("\n")[0])


@pytest.mark.slow
def test_the_notebook_prints_what_it_shows(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = read_printed(notebook)
    for cell in notebook.cells:  # fewer steps learn enough to show that all parts work
        cell.source = cell.source.replace("max_steps=700", "max_steps=300")
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = read_printed(notebook)
    # Scores and times differ between machines, and close passages may change places. The first lines do not.
    assert [first_line(text) for text in printed] == [first_line(text) for text in shown]
    (measures,) = [text for text in printed if "reranked" in text]
    before, after = re.search(r"nDCG@10 +BM25 (\S+) +reranked (\S+)", measures).groups()
    assert float(before) < 0.3
    assert float(after) > 0.6
