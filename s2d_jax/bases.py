"""The folders of the base models: downloaded where they are absent, and a student of fewer layers.

Planning calls `prepare` before it reads config.teacher and config.student.
"""

import contextlib
import dataclasses
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
from ml_collections import ConfigDict

from s2d_jax import files, hosts, models
from s2d_jax.errors import InputError
from s2d_jax.keys import Key, Record
from s2d_jax.models import folders, hf, shards

# No file of another kind is read, so none is downloaded, pickled weights above all.
_READ_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")
_LINEAGE = "lineage.json"

KEYS: Record = {
    "hub": Key(lambda owner: isinstance(owner, str) and "/" not in owner,
               'name an owner of huggingface.co, as in "HuggingFaceTB", or set it to ""'),
    "student_layers": Key(lambda count: not isinstance(count, bool) and count >= 0
                          and count % 1 == 0,
                          "set it to the student's number of layers, or to 0"),
}


def prepare(config: ConfigDict) -> None:
  """Makes the folders config.teacher and config.student where they are absent.

  With config.hub each is downloaded from the repository OWNER/FOLDER-NAME. With
  config.student_layers the student is that many layers of the teacher, evenly spaced. On several
  hosts the first one writes, to a file system that all of them read.

  Raises:
    InputError: the download fails, or the student's folder holds another model.
  """
  if hosts.leader():
    roles = ["teacher"] if config.student_layers else ["teacher", "student"]
    for role in roles:
      if config.hub and not Path(config[role]).exists():
        download(config.hub, Path(config[role]))
    if config.student_layers:
      thin(config.teacher, config.student, config.student_layers)
  hosts.barrier("bases")


def download(owner: str, folder: Path) -> None:
  """Downloads OWNER/FOLDER-NAME from the Hugging Face hub; a killed download continues.

  Raises:
    InputError: there is no network, or no such repository; the message says where to place it.
  """
  repository = f"{owner}/{folder.name}"
  with _locked(folder):
    if folder.exists():
      return
    # Renamed at the end, so that a folder of this name is whole.
    partial = folder.with_name(f".{folder.name}.partial")
    print(f"downloading {repository} to {folder}", flush=True)
    try:
      huggingface_hub.snapshot_download(repository, local_dir=partial, allow_patterns=_READ_FILES)
    # No network, no such repository, or one whose licence was not accepted.
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
      reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
      raise InputError(
          f"{folder} is absent and {repository} could not be downloaded ({reason}): where there is "
          f"a network, run hf download {repository} --local-dir {folder.name}, and copy the folder "
          f"to {folder.parent}.") from error
    partial.rename(folder)


def thin(teacher: str | Path, folder: str | Path, layers: int) -> None:
  """Writes a model of `layers` of the teacher's layers, the first and last among them.

  All other weights, config.json, tokenizer and template are the teacher's. The folder's bytes are a
  function of the teacher's and of `layers`. It is left as it is where it stands already.

  Raises:
    InputError: the teacher has no more layers than that; the folder holds something else, or
      cannot be written.
  """
  folder = Path(folder)
  config = hf.read_config(teacher)
  if not 0 < layers < config.layers:
    raise InputError(f"config.student_layers is {layers} and {teacher} has {config.layers} layers: "
                     "choose fewer, or 0 for a student folder of your own.")
  lineage = {"teacher": hf.identity(teacher), "layers": chosen(config.layers, layers)}
  with _locked(folder):
    if folder.exists():
      if _lineage(folder) != lineage:
        raise InputError(f"{folder} is not the student of {layers} layers of {teacher}: remove it, "
                         "or name another folder as config.student.")
      return
    model, params = hf.load(teacher)
    indices = np.array(lineage["layers"])
    params = params | {"layers": jax.tree.map(lambda x: jax.device_get(x)[indices],
                                              params["layers"])}
    small = models.build(dataclasses.replace(model.config, layers=layers))
    # One type where the teacher has one; a mixture is saved without loss.
    types = {tensor.dtype for tensor in shards.headers(Path(teacher)).values()}
    dtype = str(folders.STORED[types.pop()]) if len(types) == 1 else "float32"
    with tempfile.TemporaryDirectory() as source:
      _describe(Path(teacher), Path(source), layers)
      hf.save(folder, small, params, source, lineage, dtype)


def _describe(teacher: Path, folder: Path, layers: int) -> None:
  """Copies all of the teacher's folder but its weights, config.json for the given layers."""
  shutil.copytree(teacher, folder, dirs_exist_ok=True,
                  ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", ".*"))
  config = hf.read_json(teacher) | {"num_hidden_layers": layers}
  # One entry a layer, all of them alike in the models that are read.
  if isinstance(config.get("layer_types"), list):
    config["layer_types"] = config["layer_types"][:layers]
  (folder / "config.json").write_text(json.dumps(config))


def chosen(count: int, layers: int) -> list[int]:
  """Indices of `layers` of `count` layers: the first, the last and evenly spaced ones between."""
  if layers == 1:
    return [count - 1]
  return [round(i * (count - 1) / (layers - 1)) for i in range(layers)]


def _lineage(folder: Path) -> dict | None:
  """The object of lineage.json, or None where the folder has none."""
  path = folder / _LINEAGE
  return files.read_json(path) if path.is_file() else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Lets one process of this machine write a folder; the others wait.

  Raises:
    InputError: the folder's parent cannot be written.
  """
  # Beside the folder, because the folder appears by a rename.
  path = folder.with_name(f".{folder.name}.lock")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
  except OSError as error:
    raise InputError(f"{folder} cannot be written ({error.strerror}): name a folder elsewhere, as "
                     "config.student or config.teacher.") from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
