"""What names a stage's folder and what it records: hashes, revision, versions, devices."""

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import jax
from etils import epath

from s2d_jax import files

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
            "tensorflow-datasets", "ml-collections", "numpy", "safetensors")


def digest(value):
  """SHA-256, in hex, of a value made of dicts, lists, strings and numbers."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def name(row, inputs):
  """The folder of a stage: its row and a hash of all that determines its result."""
  return f"{row}-{digest(inputs)[:12]}"


@functools.cache  # of this process: a later commit is not the code that runs
def revision():
  """The code's git commit, with "+" where the checkout differs from it; "unknown" outside git.

  Read once, so call it before the work begins.
  """
  here = Path(__file__).parent
  def git(*words):
    done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
  try:
    commit = git("rev-parse", "HEAD")
    changed = commit and git("status", "--porcelain", "--untracked-files=no", "--", here,
                             here.parent / "configs")
  except FileNotFoundError:  # a machine without git
    return "unknown"
  return commit + ("+" if changed else "") or "unknown"


def provenance(mesh):
  """The code, packages, devices and mesh of this process; nothing of its environment variables."""
  return {
      "revision": revision(), "python": platform.python_version(),
      "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
      "device": jax.devices()[0].device_kind, "platform": jax.default_backend(),
      "devices": jax.device_count(), "processes": jax.process_count(),
      "mesh": dict(mesh.shape)}


def read(folder):
  """The manifest of a finished folder, or None where there is none yet.

  Raises:
    ValueError: the manifest does not hash to the folder's name, or is none.
  """
  path = epath.Path(folder) / "manifest.json"
  if not path.exists():
    return None
  try:
    found = files.read_json(path)
    named = name(path.parent.name.rpartition("-")[0], found["inputs"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not a manifest this code wrote: delete the folder, or put the "
                     "right manifest back.") from error
  if named != path.parent.name:
    raise ValueError(f"{path} disagrees with its folder's name: it was edited or moved, so delete "
                     "the folder, or put the right manifest back.")
  return found
