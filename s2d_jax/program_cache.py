"""Compiled programs are used again: by the stages of one run from memory, by later runs from disk.

A run compiles a program once, however many stages and arms need it. `shared` finds it by all that
it is compiled for. JAX's persistent cache does that between runs, in the folder of
config.compilation_cache.
"""

import contextlib
import functools
import hashlib
import os
import platform
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from s2d_jax import sharding
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.sharding import Params

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])

_AUTO = "~/.cache/s2d_jax/xla"
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
# JAX's settings that `opened` changes while a run is open.
_SETTINGS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", _MIN_SECONDS)
# The programs of the run that is open, by their descriptions; None where no run is open.
_shared: dict[Hashable, Any] | None = None
_cached: list[Any] = []  # the functions that `cached` has made


def cached(function: _F) -> _F:
  """`functools.cache` for scripts too; the results are dropped when a run ends."""
  _cached.append(functools.cache(function))
  return _cached[-1]


def shared(description: Hashable, build: Callable[[], _T]) -> _T:
  """`build()`, or its earlier result in the run that is open for an equal description.

  Args:
    description: everything that the result depends on. Functions are compared by identity.
  """
  if _shared is None:
    return build()
  if description not in _shared:
    _shared[description] = build()
  return _shared[description]


def shapes_of(tree: Params) -> Hashable:
  """The structure, shapes, types and layouts of a tree of arrays, as a part of a description."""
  leaves, structure = jax.tree.flatten(sharding.abstract(tree))
  return structure, tuple(leaves)


@contextlib.contextmanager
def opened(path: str) -> Iterator[None]:
  """Opens a run: its stages share compiled programs, and the persistent cache is at `path`.

  On exit the run's programs are dropped with their memory, and JAX has its former settings. Within
  another open run the programs are dropped when that one ends.

  Args:
    path: the value of config.compilation_cache, as `KEY` describes it.

  Raises:
    InputError: the folder cannot be written.
  """
  global _shared
  outer = _shared
  before = {name: getattr(jax.config, name) for name in _SETTINGS}
  _set(before | _settings(path))
  _shared = {} if outer is None else outer
  try:
    yield
  finally:
    _shared = outer
    _set(before)
    if outer is None:
      for function in _cached:
        function.cache_clear()


def check(path: str) -> None:
  """Creates the folder of config.compilation_cache, as `opened` does, and changes no setting.

  Raises:
    InputError: the folder cannot be written.
  """
  _settings(path)


def _set(settings: dict[str, Any]) -> None:
  """Gives JAX these settings."""
  changed = {name for name, value in settings.items() if getattr(jax.config, name) != value}
  for name in changed:
    jax.config.update(name, settings[name])
  # JAX opens the folder at its first compilation, and would not look at the setting again.
  if changed - {_MIN_SECONDS}:
    compilation_cache.reset_cache()


def _settings(path: str) -> dict[str, Any]:
  """The settings of JAX for a value of config.compilation_cache."""
  if path == "":
    return {"jax_enable_compilation_cache": False}
  found: dict[str, Any] = {}
  # By default JAX stores only what took a second to compile: a small model has few such programs.
  if _MIN_SECONDS.upper() not in os.environ:
    found[_MIN_SECONDS] = 0.0
  # A folder that the user gave to JAX itself is taken as it is.
  if path == "auto" and jax.config.jax_compilation_cache_dir:
    return found
  folder = _folder(_AUTO if path == "auto" else path)
  problem = _create(folder)
  if problem is None:
    return found | {"jax_compilation_cache_dir": folder}
  if path != "auto":
    raise InputError(f"config.compilation_cache is {path!r}: {KEY.remedy}.")
  # A machine without a home to write to, such as a container, can run all the same.
  logging.warning("compiled programs are not stored, because %s cannot be written: set "
                  "config.compilation_cache to another folder.", folder)
  return {}


def _folder(path: str) -> str:
  """The folder of this machine's programs below `path`."""
  # Programs hold code for the CPU that compiled them, and JAX does not compare CPUs. A home folder
  # may serve several machines, so each kind of CPU has a folder of its own.
  return os.path.join(os.path.expanduser(path), f"cpu-{_cpu()}")


def _cpu() -> str:
  """Eight hexadecimal digits that stand for the machine's kind of CPU and its features."""
  try:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    # Lines of one core; "Features" is what ARM calls its flags.
    facts = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  # Only Linux has this file.
  except OSError:
    facts = {platform.machine(), platform.processor(), platform.node()}
  return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:8]


def _create(folder: str) -> OSError | None:
  """Creates a folder and writes to it; the error where that fails."""
  if "://" in folder:  # of an object store
    return None
  trial = Path(folder) / f".trial-{os.getpid()}"
  try:
    trial.parent.mkdir(parents=True, exist_ok=True)
    trial.touch()
    trial.unlink()
  except OSError as error:
    return error
  return None


def _writable(path: str) -> bool:
  """Whether a value of config.compilation_cache can be used; nothing is written to find out."""
  if path in ("", "auto") or "://" in path:
    return True
  existing = os.path.abspath(os.path.expanduser(path))
  # A folder that does not exist yet will be created in its nearest ancestor.
  while not os.path.lexists(existing):
    existing = os.path.dirname(existing)
  return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


KEY = Key(_writable, "name a folder that can be written, or choose 'auto', or '' to store no "
          "programs", hashed=False)
