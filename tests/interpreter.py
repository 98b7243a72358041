"""Python programs in processes of their own, forked from one that has imported the libraries.

Importing JAX, Orbax, transformers and TFDS takes most of the processor time of a short command. A
fork server of `multiprocessing` imports them once for each of pytest's workers. It imports nothing
of this repository, so a program imports the package afresh, or a changed copy of it.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Libraries that the package imports; tensorboardX imports torch too, where that is installed. None
# of them may start a thread when it is imported, because a fork would not have it.
LIBRARIES = ("jax", "flax.linen", "optax", "orbax.checkpoint.experimental.v1", "transformers",
             "transformers.models.auto.tokenization_auto", "tensorflow_datasets", "tensorboardX",
             "ml_collections.config_flags", "scipy.special", "matplotlib.figure")
# JAX reads the environment when it is imported, so a process sets these again.
JAX_SETTINGS = {"JAX_PLATFORMS": str, "JAX_COMPILATION_CACHE_DIR": str,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": float,
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": int}

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(list(LIBRARIES))


class Running:
  """A program that was started.

  Attributes:
    process: its `multiprocessing.Process`.
  """

  def __init__(self, words: tuple[str, ...], cwd: Path, environment: Mapping[str, str]) -> None:
    self._folder = tempfile.TemporaryDirectory()
    self._words = words
    self.process = _SERVER.Process(
        target=_run, args=(words, str(cwd), dict(environment), self._folder.name))
    self.process.start()

  def wait(self, seconds: float) -> subprocess.CompletedProcess:
    """Its exit status and what it printed, as text.

    Raises:
      subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    self.process.join(seconds)
    status = self.process.exitcode
    if status is None:
      self.process.kill()
      self.process.join()
    printed = [Path(self._folder.name, name).read_text() for name in ("stdout", "stderr")]
    self._folder.cleanup()
    self.process.close()
    if status is None:
      raise subprocess.TimeoutExpired(self._words, seconds, *printed)
    return subprocess.CompletedProcess(self._words, status, *printed)

  def close(self) -> None:
    """Kills it where `wait` was not called."""
    with contextlib.suppress(ValueError):  # `wait` has closed it
      self.process.kill()
      self.wait(60)


def start(*words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Running:
  """Starts `python WORDS` without waiting for it: "-m", a module and its arguments, or "-c", code.

  Args:
    env: the whole environment; by default that of pytest.
  """
  return Running(tuple(map(str, words)), cwd, os.environ if env is None else env)


def run(*words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None,
        seconds: float = 600) -> subprocess.CompletedProcess:
  """Runs `python WORDS` to its end, as `start` and `Running.wait` do."""
  return start(*words, cwd=cwd, env=env).wait(seconds)


def _run(words: tuple[str, ...], cwd: str, environment: dict[str, str], folder: str) -> None:
  """Runs the program in this process, with what it prints in two files of `folder`."""
  for stream, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), stream)
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update(environment)
  import jax
  for name, read in JAX_SETTINGS.items():
    if name in environment:
      jax.config.update(name.lower(), read(environment[name]))
  # Where this program's environment has none, the server may have pytest's.
  jax.config.update("jax_disable_most_optimizations",
                    environment.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1")
  # As Python fills the path: the folder of the command, and those that the environment names.
  sys.path[:0] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
  kind, program, *arguments = words
  sys.argv = [program, *arguments]
  if kind == "-m":
    runpy.run_module(program, run_name="__main__", alter_sys=True)
  else:
    # From a file, so that a traceback shows its lines.
    path = Path(folder, "program.py")
    path.write_text(program)
    runpy.run_path(str(path), run_name="__main__")
