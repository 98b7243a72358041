"""A scratch copy of the package and its configs, to which a test adds something as a user would."""

import os
import shutil
import subprocess
from pathlib import Path

from tests import interpreter

ROOT = Path(__file__).parents[2]


class Checkout:
  """A copy of s2d_jax/ and configs/ under a folder.

  Attributes:
    touched: the files of the edits outside the new code, one entry for each edit.
    new_code: the files that the new code itself was added to or put into, one for each piece.
    Tables of the tests, such as tests/configs/keys.json, and docs are not in the copy or counted.
  """

  def __init__(self, folder: Path) -> None:
    self.folder = folder
    self.touched: list[str] = []
    self.new_code: list[str] = []
    for name in ("s2d_jax", "configs"):
      # With the compiled modules, which Python takes for each file that is then left as it is. One
      # that another worker is writing has a longer name.
      shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))

  def write(self, path: str, text: str) -> None:
    """Adds a file, the user's own code: not a touched place."""
    (self.folder / path).write_text(text)
    self.new_code.append(path)

  def append(self, path: str, text: str) -> None:
    """Adds code at the end of a file: the new code itself, not a touched place."""
    (self.folder / path).write_text((self.folder / path).read_text() + text)
    self.new_code.append(path)

  def edit(self, path: str, old: str, new: str, is_new_code: bool = False) -> None:
    """Replaces a text that stands once in a file of ours: a touched place, or a piece of new code.
    """
    text = (self.folder / path).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
    (self.folder / path).write_text(text.replace(old, new))
    (self.new_code if is_new_code else self.touched).append(path)

  def run(self, program: str) -> subprocess.CompletedProcess:
    """Runs a Python program that imports this copy; its output is text."""
    environment = os.environ | {"PYTHONPATH": str(self.folder), "JAX_PLATFORMS": "cpu"}
    return interpreter.run("-c", program, cwd=self.folder, env=environment)

  def plan(self, arm: str, before: str = "") -> subprocess.CompletedProcess:
    """Plans an arm of the tiny config, as `s2d-jax doctor` would, and prints its stages.

    `before` is a line that changes `config` first.
    """
    return self.run(PLAN.format(arm=arm, before=before))

  def check_plan(self, arm: str, stages: list[str], before: str = "") -> None:
    """Asserts that at most two places were touched, and that the arm has these stages."""
    assert len(self.touched) <= 2
    planned = self.plan(arm, before)
    assert planned.stdout == f"{stages}\n", planned.stderr

  def check_refusal(self, arm: str, message: str) -> None:
    """Asserts that the arm is refused with a message."""
    planned = self.plan(arm)
    assert planned.returncode and message in planned.stderr


PLAN = """
from configs import arithmetic
from s2d_jax import recipe, tasks
from s2d_jax.data.arithmetic import problems

config = arithmetic.get_config("tiny").unlock()
config.arms = "{arm}"
{before}
splits = problems.splits(sizes={{"labelled": 64, "validation": 8, "test": 8}})
plan = recipe.plan(config, tasks.get(config)._replace(source=splits.__getitem__))
print([node.stage.name for node in plan.nodes.values()])
"""
