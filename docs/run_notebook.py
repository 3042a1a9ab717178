"""Runs docs/quickstart.ipynb and stores what its cells print and plot in it.

pip install nbclient ipykernel matplotlib
python docs/run_notebook.py

Takes a few minutes, and replaces the run in runs/quickstart.
"""

import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"


def run() -> None:
    """Executes the notebook in place. Only what goes to stdout is kept, one output for each cell that prints."""
    shutil.rmtree(NOTEBOOK.parents[1] / "runs" / "quickstart", ignore_errors=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    for cell in notebook.cells:
        printed = "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout")
        others = [output for output in cell.get("outputs", []) if output.output_type != "stream"]
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text=printed)] * bool(printed) + others
    notebook.metadata.language_info = {"name": "python"}  # not the version, which changes nothing
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    run()
