"""The notebook runs from top to bottom, and is committed as it ran."""

import importlib.util
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / "notebooks" / "sparse_to_dense.ipynb"


def read():
  return nbformat.read(PATH, as_version=4)


def written(cell):
  """All that a code cell printed or showed as text; progress bars and warnings are apart."""
  return "".join(output.get("text", "") or str(output.get("data", {}).get("text/markdown", ""))
                 for output in cell.outputs if output.get("name") != "stderr")


def check(cells):
  """A whole run shows curves, answers, the ladder, its figure, an exported folder."""
  _, job, answers, ladder, figure, export = cells
  assert any("image/png" in output.get("data", {}) for output in job.outputs)
  rows = written(answers).splitlines()
  assert rows[0].split(" | ")[2:] == ["teacher", "teacher_grpo", "student", "forward_kl",
                                      "reverse_kl", "student_grpo |"]
  assert len(rows) == 8 and all(len(re.findall("[✓✗] `", row)) == 6 for row in rows[2:])
  assert all(arm in written(ladder) for arm in ("cold_grpo", "raw_bridge", "half_bridge_grpo_2h"))
  assert "image/png" in figure.outputs[0].data
  assert "model.safetensors" in written(export) and "tokenizer.json" in written(export)
  if importlib.util.find_spec("torch"):
    # transformers' greedy answers in float32 are ours.
    assert written(export).count("as here") == 6


@pytest.mark.slow
def test_top_to_bottom(tmp_path, monkeypatch):
  notebook = read()
  for cell in notebook.cells:
    cell.source = cell.source.replace('ARG = ""', 'ARG = "tiny"').replace(
        'f"runs/notebook', f'f"{tmp_path}/notebook')
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3",
                                   resources={"metadata": {"path": str(PATH.parent)}})
  client.execute()
  check([cell for cell in notebook.cells if cell.cell_type == "code"])


def test_it_is_committed_with_the_outputs_of_one_whole_run():
  cells = [cell for cell in read().cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
  assert 'ARG = ""' in cells[1].source
  check(cells)


@pytest.mark.medium
def test_the_first_cell_clones_where_there_is_no_checkout(tmp_path, monkeypatch):
  first = next(cell.source for cell in read().cells if cell.cell_type == "code")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  with pytest.raises(ValueError, match="no checkout here: set REPO"):
    exec(first, {})
  if not (ROOT / ".git").exists():
    pytest.skip("a source archive has no history to clone")
  exec(first.replace('REPO = ""', f"REPO = {str(ROOT)!r}"), {})
  assert pathlib.Path.cwd() == (tmp_path / "s2d_jax").resolve()
  assert (pathlib.Path.cwd() / "configs" / "arithmetic.py").exists()
