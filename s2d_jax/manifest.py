"""Manifests: the hash that names a folder, and the revision, versions and devices of its run."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import jax
from etils import epath

from s2d_jax import checksums, files, hosts
from s2d_jax.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
            "tensorflow-datasets", "ml-collections", "numpy", "safetensors")
NAME = "manifest.json"
REPLACED = "replaced"  # the folder within a workdir that --redo moves folders to
ROW = ("name", "actor", "learner", "guide")  # fields of a Stage that its inputs have as "row"


digest = checksums.digest  # of values that a name or a manifest has


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


def write(folder: epath.PathLike, content: dict,
          recorded: checksums.Record = MappingProxyType({})) -> None:
  """Marks a folder finished: writes the checksums of its files, and then its manifest.

  On several processes it is a collective, as `checksums.record` is.

  Args:
    recorded: the checksums of files that were hashed before, on every process.
  """
  folder = epath.Path(folder)
  # The leader has written all files before another process reads its share.
  hosts.barrier(f"files of {folder}")
  names = [name for name in checksums.listed(folder) if not _is_passing(name)]
  hashed = _exported(folder) | recorded
  found = checksums.record(folder, [name for name in names if name not in hashed]) | hashed
  if hosts.leader():
    files.write_json(folder / checksums.FOLDER / checksums.FINISHED, found, sealed=True)
    files.write_json(folder / NAME, files.plain(content), sealed=True)
  hosts.barrier(f"manifest of {folder}")


def _exported(folder: epath.Path) -> checksums.Record:
  """The checksums of a stage's exported weights, which `hf.save` hashed when it wrote them."""
  # They are as many bytes as the checkpoint, and of a store each one would be downloaded again.
  model = folder / "hf"
  if not (model / checksums.SUMS).exists():
    return {}
  return {f"hf/{name}": {"bytes": (model / name).stat().length, "sha256": digest}
          for name, digest in checksums.published(model / checksums.SUMS).items()}


def _is_passing(name: str) -> bool:
  """Whether a file of a finished folder is the manifest, will be gone soon, or is never read."""
  top = name.partition("/")[0]
  return (name in (NAME, files.LOCK)
          or top in (checksums.FOLDER, "tensorboard", "profile", "damaged")
          or top == "checkpoints" and not name.startswith("checkpoints/final/"))


def check_files(folder: epath.PathLike, weights: bool, together: bool = True) -> None:
  """Compares the files of a finished folder with its checksums; an older folder may have none.

  Args:
    weights: compares the final weights alone; False: everything but weights.
    together: as `checksums.damage` takes it.

  Raises:
    InputError: a file is damaged; the message has the remedy.
    WriteError: a file cannot be read.
  """
  folder = epath.Path(folder)
  path = folder / checksums.FOLDER / checksums.FINISHED
  remedy = checksums.redo(folder)
  if not path.exists():
    # A manifest with a seal was written after the checksums, and one without before there were any.
    if files.has_seal(folder / NAME, remedy):
      raise InputError(f"{path} is missing: {remedy}.")
    return
  compared = {name: of_file for name, of_file in files.read_json(path, remedy, sealed=True).items()
              if name.startswith("checkpoints/") == weights
              and (weights or not name.endswith(".safetensors"))}
  # A model that was deleted as a whole, to save space, is not damaged.
  if not (folder / "hf").exists():
    compared = {name: of_file for name, of_file in compared.items() if not name.startswith("hf/")}
  damage = checksums.damage(folder, compared, together)
  if damage is not None:
    raise InputError(f"{damage.text}: {remedy}.")


def set_aside(workdir: epath.PathLike, names: Sequence[str]) -> None:
  """Moves finished folders out of the way, into `replaced`, so that a run makes them again.

  A launcher starts a run again by the same command. So a folder that is in `replaced` already is
  moved again only where it is damaged.

  Raises:
    InputError: there is no such folder, it is not finished, a live process writes it, or it is in
      an object store; then none is moved.
    WriteError: it cannot be moved.
  """
  workdir = epath.Path(workdir)
  if hosts.leader():
    with contextlib.ExitStack() as stack:
      moved = [name for name in dict.fromkeys(names) if _is_redone(workdir, name)]
      for name in moved:
        stack.enter_context(files.without_writer(workdir / name))
      for name in moved:
        _replace(workdir, name)
  hosts.barrier("set aside")


def _is_redone(workdir: epath.Path, name: str) -> bool:
  """Whether a folder is to be moved; prints why not where an earlier start has moved it.

  Raises:
    InputError: there is no such folder, it is not finished, or it is in an object store.
  """
  earlier = workdir / REPLACED
  # One that was moved by an earlier start may not have been begun yet.
  if earlier.is_dir() and name in [path.name for path in checksums.entries(earlier)]:
    if _damaged(workdir / name):
      return _can_move(workdir, name)
    print(f"--redo={name}: {earlier / name} is of an earlier start, so this one goes on; delete it "
          "to begin again.", flush=True)
    return False
  # A name alone: a path could lead out of the folder.
  there = [path for path in checksums.entries(workdir) if path.name != REPLACED and path.is_dir()]
  if name not in [path.name for path in there]:
    done = ", ".join(path.name for path in there if (path / NAME).exists())
    raise InputError(f"--redo={name} names no folder of {workdir}: "
                     + (f"choose from {done}." if done else "none is finished, so leave it out."))
  if not (workdir / name / NAME).exists():
    raise InputError(_not_finished(workdir / name))
  return _can_move(workdir, name)


def _not_finished(folder: epath.Path) -> str:
  """Why a folder without a manifest is not made again, with the remedy."""
  redo = f"--redo={folder.name}"
  # Stored samples, and entries of arms, have no manifest: each file is compared by itself.
  parts = {path.suffix: path.name for path in files.finished_files(folder)}
  if ".npz" in parts:
    return (f"{redo} names stored samples, which no stage owns: delete the damaged part, such as "
            f"{folder / parts['.npz']}, leave --redo out, and its responses are sampled again.")
  if folder.name == "arms":
    return (f"{redo} names the records of the arms: delete the damaged one in {folder}, leave "
            "--redo out, and the command writes it again.")
  return (f"{redo} names a folder that is not finished, as {folder} has no {NAME}: leave --redo "
          "out, and the command goes on with it.")


def _can_move(workdir: epath.Path, name: str) -> bool:
  """True; raises InputError where the work folder is in an object store, which cannot rename."""
  if "://" in os.fspath(workdir):
    raise InputError(f"--redo={name} cannot move a folder of an object store: delete or copy "
                     f"{workdir / name} by the store's own tool, and the command without --redo "
                     "makes it again.")
  return True


def _replace(workdir: epath.Path, name: str) -> None:
  """Moves a folder into `replaced`; raises WriteError where it cannot be moved."""
  target = workdir / REPLACED / name
  try:
    while target.exists():
      target = target.with_name(f"{target.name}+")
    target.parent.mkdir(exist_ok=True)
    (workdir / name).rename(target)
  except OSError as error:
    raise files.not_written(target, error.strerror) from error


def _damaged(folder: epath.Path) -> bool:
  """Whether a folder is finished, and a file of it is damaged."""
  try:
    if read(folder) is not None:
      for weights in (False, True):
        check_files(folder, weights, together=False)
  except InputError:
    return True
  return False


def load(folder: epath.PathLike) -> dict:
  """The manifest of a finished folder, as it stands there; `read` also compares it with the name.

  Raises:
    InputError: it is damaged.
  """
  path = epath.Path(folder) / NAME
  # Without a manifest a folder is not finished, and its run makes it again.
  if not path.exists():
    raise InputError(f"{path} is missing: put it back, or make {path.parent.name} again by the "
                     "command of its run.")
  # The checksums are written just before a manifest with a seal.
  sealed = (path.parent / checksums.FOLDER / checksums.FINISHED).exists()
  manifest = files.read_json(path, _remedy(path), sealed)
  if not isinstance(manifest, dict) or not isinstance(manifest.get("inputs"), dict):
    raise InputError(f"{path} is not a manifest this code wrote: {_remedy(path)}.")
  row = manifest["inputs"].get("row")
  # The first manifests have the values alone.
  if isinstance(row, list) and len(row) == len(ROW):
    manifest["inputs"]["row"] = dict(zip(ROW, row, strict=True))
  return manifest


def _remedy(path: epath.Path) -> str:
  """The remedy for a damaged manifest."""
  name = path.parent.name
  return (f"put the right manifest back, or make {name} again by the command of its run with "
          f"--redo={name}")


def read(folder: epath.PathLike) -> dict | None:
  """The manifest of a finished folder; None where the folder is not finished.

  Raises:
    InputError: the manifest cannot be read, or does not hash to the folder's name.
  """
  path = epath.Path(folder) / NAME
  if not path.exists():
    return None
  manifest = load(folder)
  # The name is a hash of the inputs, so an edited or moved manifest does not match it.
  try:
    named = name(path.parent.name.rpartition("-")[0], manifest["inputs"])
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f"{path} is not a manifest this code wrote: {_remedy(path)}.") from error
  if named != path.parent.name:
    raise InputError(f"{path} disagrees with its folder's name: it was edited or moved, so "
                     f"{_remedy(path)}.")
  return manifest
