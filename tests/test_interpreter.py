"""A forked program runs as one that the shell starts: status, output, folder, environment, path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import interpreter

PROGRAM = """
import os, sys
import added
print(os.getcwd(), sys.argv[1:], added.NAME, __name__, os.environ.get("SHADE"))
print("s2d_jax" in sys.modules, "s2d_jax" in dir())
print("late", file=sys.stderr)
END
"""


def facts(done):
  return done.returncode, done.stdout, done.stderr.splitlines()[:1], done.stderr.splitlines()[-1]


@pytest.mark.parametrize("end", ["sys.exit(3)", "raise ValueError('why')", "pass",
                                 "os.kill(os.getpid(), 9)"])
def test_a_program_is_run_as_by_a_new_python(tmp_path, end):
  (tmp_path / "added.py").write_text("NAME = 'x'")
  program = PROGRAM.replace("END", f"sys.stdout.flush(); sys.stderr.flush(); {end}")
  environment = os.environ | {"SHADE": "red"}
  words = ["-c", program, "a", "2"]
  done = interpreter.run(*words, cwd=tmp_path, env=environment)
  new = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, text=True,
                       capture_output=True, check=False)
  assert facts(done) == facts(new)
  assert done.stdout.startswith(f"{tmp_path} ['a', '2'] x __main__ red\nFalse False\n")


def test_settings_of_jax_are_read_again():
  program = "import jax; print(jax.config.jax_compilation_cache_dir, jax.config.jax_platforms)"
  done = interpreter.run("-c", program, env={"JAX_COMPILATION_CACHE_DIR": "there",
                                             "JAX_PLATFORMS": "cpu"})
  assert done.stdout == "there cpu\n"


def test_a_program_that_does_not_end_is_killed():
  program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
  running = interpreter.start("-c", program)
  with pytest.raises(subprocess.TimeoutExpired) as late:
    running.wait(5)
  assert not Path(f"/proc/{int(late.value.output)}").exists()


@pytest.mark.medium
def test_no_library_starts_a_thread():
  # Those of NumPy's products are started again after a fork. Others would be absent.
  program = f"""
import importlib, threading
for name in {interpreter.LIBRARIES}:
  importlib.import_module(name)
print(threading.active_count())
"""
  done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True)
  assert done.stdout == "1\n"
