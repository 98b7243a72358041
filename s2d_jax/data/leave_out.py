"""Problems that a run leaves out: `config.data.leave_out` names them by split and id.

The key holds entries such as "labelled:17,test:5", or the path of a file with one entry a line. An
id belongs to a split, because a problem that two splits share is left out of one of them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_jax.errors import InputError

NOT_SPLITS = ("dir", "leave_out", "overlap", "solutions")  # keys of config.data beside its splits
Entry = tuple[str, int]  # a split and an id
_ENTRY = re.compile(r"([\w-]+):(\d{1,19})", re.ASCII)
_MOST = 1000  # entries of an error message


def entries(text: str) -> list[Entry]:
  """The entries of the key's value, a list with commas or the path of a file.

  Raises:
    InputError: something is neither an entry nor a file; names it.
  """
  words = [word for word in text.split(",") if word.strip()]
  if all(_ENTRY.fullmatch(word.strip()) for word in words):
    return [_entry(word, "config.data.leave_out") for word in words]
  path = Path(text).expanduser()
  if not path.is_file():
    raise InputError(f"config.data.leave_out is {text!r}: give entries such as labelled:17,test:5, "
                     "or a file with one of them a line.")
  try:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
  except UnicodeDecodeError as error:
    raise InputError(f"{path} is not a text in UTF-8: write one entry a line, such as labelled:17."
                     ) from error
  return [_entry(line, f"{path} line {number}") for number, line in enumerate(lines, 1)
          if line.strip()]


def _entry(word: str, origin: str) -> Entry:
  """An entry from its text; `origin` names it in error messages."""
  found = _ENTRY.fullmatch(word.strip())
  if found is None:
    raise InputError(f"{origin} has {word.strip()[:40]!r}: write a split, a colon and an id, as in "
                     "labelled:17.")
  return found[1], int(found[2])


def remaining(splits: Mapping[str, Sequence[Mapping[str, Any]]],
              data: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
  """The problems of each split without those that `leave_out` of config.data names.

  Args:
    splits: the problems that were read, by split.
    data: config.data, which may name more splits than the run reads.

  Raises:
    InputError: as `entries`, or an entry names an unknown split or an id that is not in its split.
  """
  left_out = dict.fromkeys(entries(data.get("leave_out", "")))
  names = {*splits, *data} - {*NOT_SPLITS}
  ids = {split: {row["id"] for row in rows} for split, rows in splits.items()}
  for split, number in left_out:
    if split not in names:
      raise InputError(f"config.data.leave_out names the split {split!r}: choose from "
                       f"{', '.join(sorted(names))}.")
    if split in splits and number not in ids[split]:
      raise InputError(f"config.data.leave_out names {split}:{number}, and {split} has no such id: "
                       "remove the entry.")
  return {split: [row for row in rows if (split, row["id"]) not in left_out]
          for split, rows in splits.items()}


def remedy(text: str, added: Sequence[Entry]) -> str:
  """The end of a message: how to add entries to the key's value, which is `text` so far."""
  words = [f"{split}:{number}" for split, number in dict.fromkeys(added)]
  if len(words) > _MOST:
    words = [*words[:_MOST], f"and {len(words) - _MOST:,} more"]
  listed = ",".join(words)
  if not text:
    return f"set config.data.leave_out={listed}"
  if Path(text).expanduser().is_file():
    return f"add to {text} the lines {listed}"
  return f"set config.data.leave_out={text},{listed}"
