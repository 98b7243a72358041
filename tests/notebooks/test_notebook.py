"""The notebook runs from top to bottom."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_top_to_bottom(tmp_path, monkeypatch):
  notebook = nbformat.read(ROOT / "notebooks" / "sparse_to_dense.ipynb", as_version=4)
  for cell in notebook.cells:  # the work folder alone is the test's own
    cell.source = cell.source.replace('f"runs/notebook', f'f"{tmp_path}/notebook')
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3",
                                   resources={"metadata": {"path": str(ROOT / "notebooks")}})
  client.execute()
  shown = [output.data for cell in notebook.cells for output in cell.get("outputs", [])
           if output.output_type in ("execute_result", "display_data")]
  assert any("text/markdown" in data and "half_bridge_grpo_2h" in data["text/markdown"]
             for data in shown)
  assert any("image/png" in data for data in shown)
  assert " -> " in notebook.cells[-1].outputs[0].text
