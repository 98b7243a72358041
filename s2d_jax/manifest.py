"""Manifests: the hash that names a folder, and the revision, versions and devices of its run."""

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from etils import epath

from s2d_jax import files
from s2d_jax.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
            "tensorflow-datasets", "ml-collections", "numpy", "safetensors")
ROW = ("name", "actor", "learner", "guide")  # fields of a Stage that its inputs have as "row"


def digest(value: Any) -> str:
  """SHA-256, in hex, of a value made of dicts, lists, strings and numbers."""
  # Keys are sorted, so that the order in which a config was written renames nothing.
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def name(stage: str, inputs: dict) -> str:
  """A folder's name: the stage's name and a hash of all that determines its result."""
  row = inputs.get("row")
  if isinstance(row, dict):
    # Hashed as a list, which it was in the first manifests: their folders keep their names.
    inputs = inputs | {"row": [row[field] for field in ROW]}
  return f"{stage}-{digest(inputs)[:12]}"


# Cached, because a commit that is made during a run is not the code that runs.
@functools.cache
def revision() -> str:
  """The code's git commit, with "+" where the checkout differs from it; "unknown" outside git.

  It is read once in a process, so call it before a long run begins.
  """
  here = Path(__file__).parent
  def git(*words: str | Path) -> str:
    done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
  try:
    commit = git("rev-parse", "HEAD")
    # Notes and results beside the code decide no result, so only these two folders count.
    changed = commit and git("status", "--porcelain", "--untracked-files=no", "--", here,
                             here.parent / "configs")
  # A machine without git, such as a slim container.
  except FileNotFoundError:
    return "unknown"
  return commit + ("+" if changed else "") or "unknown"


def provenance(mesh: jax.sharding.Mesh) -> dict:
  """The code, packages, devices and mesh of this process.

  Environment variables are left out, because they may hold secrets.
  """
  return {
      "revision": revision(), "python": platform.python_version(),
      "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
      "device": jax.devices()[0].device_kind, "platform": jax.default_backend(),
      "devices": jax.device_count(), "processes": jax.process_count(),
      "mesh": dict(mesh.shape)}


def load(folder: epath.PathLike) -> dict:
  """The manifest of a finished folder, as it stands there; `read` also compares it with the name.
  """
  manifest = files.read_json(epath.Path(folder) / "manifest.json")
  row = manifest["inputs"].get("row")
  # The first manifests have the values alone.
  if isinstance(row, list):
    manifest["inputs"]["row"] = dict(zip(ROW, row, strict=True))
  return manifest


def read(folder: epath.PathLike) -> dict | None:
  """The manifest of a finished folder; None where the folder is not finished.

  Raises:
    InputError: the manifest cannot be read, or does not hash to the folder's name.
  """
  path = epath.Path(folder) / "manifest.json"
  if not path.exists():
    return None
  # The name is a hash of the inputs, so an edited or moved manifest does not match it.
  try:
    manifest = load(folder)
    named = name(path.parent.name.rpartition("-")[0], manifest["inputs"])
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f"{path} is not a manifest this code wrote: delete the folder, or put the "
                     "right manifest back.") from error
  if named != path.parent.name:
    raise InputError(f"{path} disagrees with its folder's name: it was edited or moved, so delete "
                     "the folder, or put the right manifest back.")
  return manifest
