"""Where the config of SmolLM2 looks for its models, and that its results' script starts."""

import os
import pathlib
import subprocess
import sys

import pytest

from configs import smollm2

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("arg, teacher, student", [
    ("", "models/SmolLM2-360M-Instruct", "models/SmolLM2-135M-Instruct"),
    ("models=m,teacher=A", "m/A", "m/SmolLM2-135M-Instruct"),
    ("models=m,teacher=own/A,student=./B", "own/A", "./B"),
    ("models=m,teacher=/own/A,layers=3", "/own/A", "m/A-3-layers"),
])
def test_a_name_with_a_slash_is_a_path_of_its_own(arg, teacher, student):
  config = smollm2.get_config(arg)
  assert (config.teacher, config.student) == (teacher, student)


def test_the_script_takes_the_callers_relative_paths(tmp_path):
  # In place of s2d-jax: prints its arguments.
  command = tmp_path / "bin" / "s2d-jax"
  command.parent.mkdir()
  command.write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], sep='\\n')\n")
  command.chmod(0o755)
  (tmp_path / "models" / "A").mkdir(parents=True)
  out = subprocess.run(
      ["bash", ROOT / "results" / "smollm2" / "run.sh", "models/A", "runs/a"], cwd=tmp_path,
      env=os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}, text=True,
      capture_output=True, check=True).stdout
  flags = dict(line.removeprefix("--").split("=", 1) for line in out.splitlines() if "=" in line)
  assert flags["workdir"] == f"{tmp_path}/runs/a/run"
  arg = flags["config"].partition(":")[2]
  config = smollm2.get_config(arg)
  assert config.teacher == f"{tmp_path}/models/A"
  assert config.student == f"{tmp_path}/runs/a/models/A-27-layers"
