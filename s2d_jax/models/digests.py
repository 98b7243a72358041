"""A hash that identifies a folder's weights, and the checksums that its files are compared with.

The hash is cheap enough to be taken at every start.
"""

import contextlib
import hashlib
import pathlib

from s2d_jax import checksums, files
from s2d_jax.models import folders, shards
from s2d_jax.models.folders import Path

SUMS = checksums.SUMS
# Files beside the weights that are read with them.
_SMALL = (".json", ".jinja", ".txt", ".model")
_WHOLE = 1 << 26  # bytes of a file that is hashed whole, in about a tenth of a second
# Of every tensor of a larger file: pieces, spread evenly, and the bytes of each. A model of 70 B
# parameters has 723 tensors, so 24 MB of it are read.
_PIECES = 8
_PIECE = 4096


def identity(folder: Path) -> str:
  """A hash that identifies a folder's config.json and its weights.

  It covers config.json, the index and the checksums that `hf.save` wrote. Of each safetensors file
  it covers name, size, header and the checksum that a Hugging Face download recorded. It covers all
  bytes of a file of at most 64 MiB, and some bytes of every tensor of a larger one.

  Raises:
    InputError: the folder or its weights are missing, or a header is damaged.
  """
  folder = pathlib.Path(folder)
  folders.read_json(folder)
  files = shards.files(folder)
  digest = hashlib.sha256((folder / "config.json").read_bytes())
  for name in (shards.INDEX, SUMS):
    if (folder / name).is_file():
      digest.update((folder / name).read_bytes())
  sums = _sums(folder)
  for file in files:
    _, header = shards.header_of(file)
    for item in (file.name, str(file.stat().st_size), header, _download_checksum(file)):
      digest.update(item if isinstance(item, bytes) else item.encode())
      digest.update(b"\0")
    values = _values_hash(file)
    # A right checksum is in the hash already, and folders that `hf.save` wrote keep their identity.
    if values != sums.get(file.name):
      digest.update(values.encode())
  return digest.hexdigest()


def reading(folder: Path, weights: bool = True,
            together: bool = False) -> contextlib.AbstractContextManager[None]:
  """A block that reads a folder, whose files are compared with their checksums meanwhile.

  The checksums are those of the finished stage that the folder is of, or its SHA256SUMS; a folder
  without any is read as it is.

  Args:
    weights: False where the block reads none.
    together: as `checksums.reading` takes it.

  Raises:
    InputError: a file is damaged, or the checksums are; names it, with the remedy.
  """
  folder = pathlib.Path(folder)
  stage = pathlib.Path(folder.absolute()).parent
  finished = stage / checksums.FOLDER / checksums.FINISHED
  if folder.name == "hf" and finished.is_file():
    remedy = checksums.redo(stage)
    recorded = {name.removeprefix("hf/"): of_file
                for name, of_file in files.read_json(finished, remedy, sealed=True).items()
                if name.startswith("hf/")}
  elif (folder / SUMS).is_file():
    remedy = f"get it again, or delete {folder / SUMS} if you changed it yourself"
    recorded = _published(folder)
  else:
    return contextlib.nullcontext()
  compared = {name: of_file for name, of_file in recorded.items()
              if weights or not name.endswith(".safetensors")}
  return checksums.reading(folder, compared, remedy, together)


def _published(folder: pathlib.Path) -> checksums.Record:
  """The record of a folder's SHA256SUMS, of the files that are read; a part may be downloaded."""
  return {name: {"sha256": digest} for name, digest in checksums.published(folder / SUMS).items()
          if name.endswith((".safetensors", *_SMALL)) and (folder / name).is_file()}


def _sums(folder: pathlib.Path) -> dict[str, str]:
  """{file: its SHA-256} of a folder's checksums; they may be stale."""
  if not (folder / SUMS).is_file():
    return {}
  text = (folder / SUMS).read_text(errors="replace")
  # A line is the sum, two characters, and the name. Another form finds no file here, whose values
  # are then hashed too; a change would give every such folder another identity.
  return {line[66:]: line[:64] for line in text.splitlines()}


def _values_hash(file: pathlib.Path) -> str:
  """A hash of a file's tensors: of all bytes of a small file, of pieces of every tensor of another.
  """
  with open(file, "rb") as data:
    if file.stat().st_size <= _WHOLE:
      return hashlib.file_digest(data, "sha256").hexdigest()
    # Training changes most numbers of a tensor, and a fine-tune may leave most tensors unchanged:
    # pieces of each one find every change that is not of a few numbers.
    digest = hashlib.sha256()
    for start, end in sorted(shards.spans(file).values()):
      last = max(start, end - _PIECE)
      step = max(_PIECE, -(-(last - start) // (_PIECES - 1)))
      for offset in [*range(start, last, step), last]:
        data.seek(offset)
        digest.update(data.read(min(_PIECE, end - offset)))
  return digest.hexdigest()


def _download_checksum(file: pathlib.Path) -> str:
  """The checksum that the Hugging Face client recorded for a file; "" where there is none."""
  record = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
  # The client records the revision and then the file's checksum, a line each.
  if record.is_file():
    return [*record.read_text(errors="replace").splitlines(), "", ""][1]
  # In the client's cache a file is a link to a blob whose name is the checksum.
  target = file.resolve()
  return target.name if target.parent.name == "blobs" else ""
