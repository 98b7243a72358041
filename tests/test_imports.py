"""The arrows between the package's files, read from its imports: they point down, and stay few."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "s2d_jax"

# The units that each unit may import. It may also import everything that those may import, and
# `errors`. A file or folder that is not named here imports nothing else of ours.
ARROWS = {
  "cli": {"main", "preflight", "evaluate", "export", "supervisor"},
  "main": {"recipe", "sweep", "report", "command"},
  "preflight": {"recipe", "sweep", "command"},
  "evaluate": {"problem_sets", "evals", "sampler", "chat", "command"},
  "problem_sets": {"tasks"},
  "export": {"checkpoint", "manifest", "models", "command"},
  "assets": {"recipe"},  # the script that trained them
  "recipe": {"walk", "tasks", "placement"},
  "walk": {"scoring", "budget", "ladder", "stops"},
  "stops": {"hosts", "supervisor"},
  "scoring": {"stage", "losses"},
  "tasks": {"planning", "rewards"},
  "budget": {"planning", "files"},
  "bases": {"models", "files"},
  "planning": {"splits", "doctor", "manifest", "data", "identity"},
  "splits": {"doctor", "manifest"},
  "doctor": {"loop", "objectives", "bases", "options", "combinations", "placement"},
  "combinations": {"sampler"},
  "stage": {"planning", "loop", "objectives", "manifest"},
  "loop": {"selection", "probing", "updates", "evals", "rewards", "chat", "checkpoint", "timing",
           "ledger", "optim", "stops"},
  "updates": {"guides", "placement"},
  "placement": {"allocate", "metrics", "timing", "roles"},
  "options": {"foresee", "allocate", "guides", "hints", "objectives"},
  "guides": {"compiling", "chat"},
  "probing": {"ledger", "metrics"},
  "compiling": {"foresee", "allocate", "hints", "roles", "sampler", "remat"},
  "roles": {"training"},
  "remat": {"models", "hosts", "metrics"},
  "allocate": {"rollouts", "keys", "manifest"},
  "hints": {"models", "chat", "rollouts", "keys"},
  "foresee": {"losses", "rollouts", "keys"},
  "training": {"microbatches", "keys", "program_cache"},
  "microbatches": {"rollouts", "sharding"},
  "program_cache": {"sharding", "keys"},
  "ledger": {"compiling"},
  "selection": {"rollouts", "keys"},
  "evals": {"prefixes", "stats"},
  "prefixes": {"compiling"},
  "rollouts": {"data", "sharding", "files"},
  "sampler": {"program_cache", "command", "models", "chat", "rollouts", "data", "keys", "hosts"},
  "objectives": {"losses", "keys", "rollouts"},
  "optim": {"keys"},
  "losses": {"sharding"},
  "models": {"sharding", "keys", "json_objects", "writable", "files"},
  "data": {"rewards", "json_objects"},
  "chat": {"end_ids", "templates", "tokenizer_files"},
  "tokenizer_files": {"json_objects"},
  "end_ids": {"json_objects"},
  # These write files whole or not at all, and by one process.
  "metrics": {"files"},
  "timing": {"metrics", "manifest", "keys", "chips"},
  "manifest": {"files", "checksums"},
  "checkpoint": {"orbax_errors", "metrics"},
  "orbax_errors": {"files", "sharding", "checksums"},
  "checksums": {"hosts"},
  "files": {"hosts", "json_objects", "checksums"},
  "sweep": {"planning", "manifest"},
  "command": {"chips", "writable"},
  "report": {"command", "ladder", "figures", "timing", "paper", "probe_table", "option_costs",
             "targets"},
  "probe_table": {"ladder"},
  "option_costs": {"ladder"},
  "targets": {"ladder", "metrics"},
  "paper": {"ladder"},
  "figures": {"ladder", "metrics"},
  "ladder": {"stats", "manifest"},
  "stats": {"intervals"},
}
# These get functions as arguments and import no loss and no model.
NEVER = {unit: {"models", "losses", "objectives"}
         for unit in ("loop", "compiling", "program_cache", "rollouts", "training")}
# Each of these libraries is imported in one place.
HOMES = {
  "flax": "models",
  "orbax": "checkpoint",
  "transformers": "chat",
  "tensorflow_datasets": "data",
  "pyarrow": "data",
  "safetensors": "models",
  "tensorboardX": "metrics",
  "math_verify": "rewards",
}
NOWHERE = {"torch", "tensorflow", "grain", "chex"}


def below(unit):
  """Every unit that lies below this one along the arrows."""
  found, ahead = set(), [unit]
  while ahead:
    new = ARROWS.get(ahead.pop(), set()) - found
    found |= new
    ahead += new
  return found


def allowed(unit):
  return below(unit) - NEVER.get(unit, set()) | {unit, "errors"}


def unit_of(path, package=PACKAGE):
  """The top-level file or folder of the package that holds a file; the package itself is ''."""
  first = path.relative_to(package).parts[0].removesuffix(".py")
  return "" if first == "__init__" else first


def imported_by(path):
  """The dotted names a file imports anywhere in it, each as far as the statement spells it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: write the import out from s2d_jax"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def units_imported_by(path):
  """The units of the package a file imports; '' stands for the package itself."""
  parts = [name.split(".") for name in imported_by(path)]
  return {(part[1:] or [""])[0] for part in parts if part[0] == "s2d_jax"}


def wrong_arrows(path, package=PACKAGE):
  unit = unit_of(path, package)
  return {f"{unit or 's2d_jax'} -> {other or 's2d_jax'}"
          for other in units_imported_by(path) - allowed(unit)}


def misplaced_libraries(path, package=PACKAGE):
  """The libraries a file imports although another unit, or none, may import them."""
  libraries = {name.split(".")[0] for name in imported_by(path)}
  unit = unit_of(path, package)
  return {name for name in libraries if name in NOWHERE or HOMES.get(name, unit) != unit}


def modules():
  return sorted(PACKAGE.rglob("*.py"))


def test_arrows_point_down():
  wrong = {str(path.relative_to(ROOT)): wrong_arrows(path) for path in modules()}
  assert {path: arrows for path, arrows in wrong.items() if arrows} == {}


def test_the_arrows_make_no_circle():
  assert [unit for unit in ARROWS if unit in below(unit)] == []


def test_a_large_library_is_imported_by_one_unit():
  wrong = {str(path.relative_to(ROOT)): misplaced_libraries(path) for path in modules()}
  assert {path: names for path, names in wrong.items() if names} == {}


def test_a_report_needs_no_checkpoint_library():
  assert "checkpoint" not in below("report")
  code = "import sys, s2d_jax.report; sys.exit('orbax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_run_starts_without_torch():
  # tensorboardX and transformers import it where it is installed, which takes seconds.
  code = "import sys\nfrom s2d_jax import main\nsys.exit('torch' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_configs_import_ml_collections_alone():
  for path in sorted((ROOT / "configs").glob("*.py")):
    libraries = {name.split(".")[0] for name in imported_by(path)} - sys.stdlib_module_names
    assert libraries <= {"ml_collections", "configs"}, path


@pytest.mark.parametrize("file, line, arrow", [
  ("loop.py", "from s2d_jax import models", "loop -> models"),
  ("loop.py", "from s2d_jax.losses import kl", "loop -> losses"),
  ("training.py", "import s2d_jax.objectives", "training -> objectives"),
  ("losses/kl.py", "from s2d_jax.losses import tokens\nfrom s2d_jax import rollouts",
   "losses -> rollouts"),
  ("models/hf.py", "def f():\n  from s2d_jax.chat import Chat", "models -> chat"),
  ("sharding.py", "import s2d_jax", "sharding -> s2d_jax"),
  ("recipe.py", "from s2d_jax import main", "recipe -> main"),
])
def test_a_wrong_arrow_is_found(tmp_path, file, line, arrow):
  path = tmp_path / file
  path.parent.mkdir(exist_ok=True)
  path.write_text(line)
  assert wrong_arrows(path, tmp_path) == {arrow}


@pytest.mark.parametrize("file, line, names", [
  ("loop.py", "import flax.linen as nn", {"flax"}),
  ("models/hf.py", "import torch, flax", {"torch"}),
  ("chat.py", "from transformers import AutoTokenizer", set()),
  ("data/sources.py", "from orbax.checkpoint import v1", {"orbax"}),
])
def test_a_misplaced_library_is_found(tmp_path, file, line, names):
  path = tmp_path / file
  path.parent.mkdir(exist_ok=True)
  path.write_text(line)
  assert misplaced_libraries(path, tmp_path) == names
