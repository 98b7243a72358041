"""The command line: every mistake is one sentence and exit code 2, and nothing is written."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(module, *flags):
  done = subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, capture_output=True,
                        text=True, check=False, timeout=120, env={"JAX_PLATFORMS": "cpu",
                                                                  "PATH": "/usr/bin:/bin"})
  return done.returncode, [line for line in done.stderr.splitlines() if "s2d_jax: " in line]


@pytest.mark.medium
@pytest.mark.parametrize("flag, says", [
    ("--config.foo=1", "config has no key 'foo'"),
    ("--config.stages.reverse_kl.optim.lrr=1", "config has no key 'lrr'"),
    ("--config.seed=abc", "config.seed=abc"),
    ("stray", "is no flag"),
    ("--config=configs/arithmetic.py:tinny", "'tinny' is unknown: use seed, tiny"),
    ("--config=configs/none.py", "No such file or directory: 'configs/none.py'"),
    ("--config.arms=nope", "there is no arm 'nope': choose config.arms from"),
    ("--config.task=chess", "config.task is 'chess': choose arithmetic or math"),
    ("--config.mesh=(64, 64, 64)", "set config.mesh to"),
    ("--config.teacher=nowhere", "nowhere is not a folder"),
])
def test_one_sentence_and_nothing_written(tmp_path, flag, says):
  code, lines = run("s2d_jax.main", "--config=configs/arithmetic.py:tiny",
                    f"--config.data.dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'work'}",
                    flag)
  assert code == 2 and len(lines) == 1 and says in lines[0], (code, lines)
  assert not (tmp_path / "work").exists()


@pytest.mark.medium
def test_console_entry_point_names_its_commands():
  done = subprocess.run([sys.executable, "-c", "from s2d_jax import cli; cli.main()"], cwd=ROOT,
                        capture_output=True, text=True, check=False, timeout=120)
  assert done.returncode == 1
  for command in ("run", "report", "preflight", "doctor"):
    assert f"  {command} " in done.stderr
