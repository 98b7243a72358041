"""The result file: one section per part, on disk as soon as it exists."""

import json
import os
import pathlib
from typing import Any

Json = dict[str, Any]


def read(path: pathlib.Path) -> Json:
  """The stored results; an empty record where there is no file."""
  if not path.exists():
    return {"benchmark": "accelerator", "parts": {}}
  return json.loads(path.read_text(encoding="utf-8"))


def origin(found: Json) -> Json:
  """The revision, date and jax of a file's run, as fields of each of its parts."""
  fields = {name: found[name] for name in ("revision", "date") if name in found}
  if "machine" in found:
    fields["jax"] = found["machine"].get("jax", "unknown")
  return fields


def write(path: pathlib.Path, found: Json) -> None:
  """Replaces the file at once, so that a killed process leaves the old one or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_suffix(".tmp")
  scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
  os.replace(scratch, path)


def update(path: pathlib.Path, part: str, **fields: Any) -> None:
  """Sets fields of a part's section."""
  found = read(path)
  found["parts"].setdefault(part, {"results": {}}).update(fields)
  write(path, found)


def add(path: pathlib.Path, part: str, name: str, values: Json) -> None:
  """Adds one result to a part's section."""
  found = read(path)
  found["parts"].setdefault(part, {"results": {}})["results"][name] = values
  write(path, found)
