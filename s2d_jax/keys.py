"""Keys of a config as records, kept beside the code that reads them.

A record maps each key's name to a `Key`, or to another record where the key holds a block:

  KEYS = {"steps": keys.at_least(0), "optim": optim.KEYS}

The doctor checks a config against the records, and a stage's name is hashed from what they say.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Union

from ml_collections import ConfigDict

from s2d_jax.errors import InputError

# Marks a Key without a neutral value, or without a default. An object of its own equals no value
# that a config can hold, None included.
_ABSENT = object()


class Key(NamedTuple):
  """One key of a config: its range, and what it means for a stage's name."""
  check: Callable[[Any], bool]  # value -> whether it is in range; an error in it counts as False
  remedy: str                   # ends the error message: "choose it above 0"
  neutral: Any = _ABSENT       # the value at which the key changes nothing: it is not hashed
  default: Any = _ABSENT       # the value where a caller gives none; else the neutral value
  hashed: bool = True           # False where no value changes a result beyond rounding and logs
  optional: bool = False        # a block may lack it: it then has its neutral value


class Optional(NamedTuple):
  """A block that a config may leave out: what reads it is then off, and no stage is renamed."""
  record: Mapping[str, Key]


Record = Mapping[str, Union[Key, Optional, "Record"]]
# Any value: other code checks it where it is read, because the range depends on more than the key.
ANY = Key(lambda value: True, "")


def at_least(low: float, **fields: Any) -> Key:
  """A Key for whole numbers of at least `low`; `fields` are further fields of the Key."""
  def check(value: Any) -> bool:
    # True and 1.5 would pass a plain comparison and fail, or count as 1, much later.
    return not isinstance(value, bool) and value >= low and value % 1 == 0
  return Key(check, f"set it to a whole number of at least {low}", **fields)


def one_of(choices: Iterable[str], **fields: Any) -> Key:
  """A Key for one of a few names; `fields` are further fields of the Key."""
  names = tuple(choices)
  return Key(lambda value: value in names, f"choose it from {', '.join(names)}", **fields)


def check_block(path: str, block: ConfigDict, record: Record,
                example: str = "configs/arithmetic.py has them all") -> None:
  """Checks that a block has exactly the keys of its record, each in range.

  Args:
    path: names the block in messages, such as "config.stages.sft".
    example: says where its keys stand.

  Raises:
    InputError: a key is missing, unknown or out of range.
  """
  # A loop over the record's names would neither see an unknown key nor explain a missing one.
  if not isinstance(block, ConfigDict | Mapping):
    raise InputError(f"{path} is {block!r}: write a block of settings ({example}).")
  record = present(block, record)
  check_names(path, block, record, example)
  for name, key in record.items():
    if isinstance(key, Key):
      check_value(f"{path}.{name}", block[name], key)
    elif isinstance(key, Optional):
      check_block(f"{path}.{name}", block[name], key.record, "docs/losses.md has one")
    else:
      check_block(f"{path}.{name}", block[name], key)


def present(block: Mapping[str, Any], record: Record) -> Record:
  """The record without the optional keys and blocks that a block lacks."""
  def is_optional(key: Any) -> bool:
    return isinstance(key, Optional) or isinstance(key, Key) and key.optional

  return {name: key for name, key in record.items() if name in block or not is_optional(key)}


def check_names(path: str, names: Iterable[str], expected: Iterable[str],
                example: str = "configs/arithmetic.py has them all") -> None:
  """Raises InputError unless a block at `path` has exactly the expected names."""
  missing = sorted(set(expected) - set(names))
  unknown = sorted(set(names) - set(expected))
  if missing:
    raise InputError(f"{path} lacks the key {missing[0]!r}: add it ({example}).")
  if unknown:
    raise InputError(f"{path} has the key {unknown[0]!r}, which nothing reads: remove it, or "
                     "correct its spelling.")


def check_values(values: Any, record: Mapping[str, Key]) -> None:
  """Checks the attributes of any object against a flat record; messages name the bare key.

  Args:
    values: has an attribute for each key: a ConfigDict, a NamedTuple or a namespace.

  Raises:
    InputError: a value is out of range.
  """
  for name, key in record.items():
    check_value(name, getattr(values, name), key)


def check_value(path: str, value: Any, key: Key) -> None:
  """Raises InputError, naming `path` and the remedy, unless the value is in the key's range."""
  # A value of another type, such as a text where a number is compared, makes the check itself
  # fail, with an error that names neither the key nor the remedy.
  try:
    fits = key.check(value)
  except (TypeError, AttributeError, ValueError):
    fits = False
  if not fits:
    absent = ", or leave it out" if key.optional else ""
    # A block as one line.
    shown = value.to_dict() if isinstance(value, ConfigDict) else value
    raise InputError(f"{path} is {shown!r}: {key.remedy}{absent}.")
  # A bound on one side alone lets an infinity pass, which no report could write down.
  if isinstance(value, float) and not math.isfinite(value) and value != key.neutral:
    raise InputError(f"{path} is {value}: choose a finite number.")


@contextlib.contextmanager
def prefixed(path: str) -> Iterator[None]:
  """Puts `path` before the message of an InputError that is raised within.

  A layer's messages begin with the name of its own field; the caller knows where the field stands.
  """
  try:
    yield
  except InputError as error:
    raise InputError(f"{path}{error}") from error


def defaults(record: Mapping[str, Key], **changes: Any) -> ConfigDict:
  """A locked block of a flat record: the named values, and every other key at its default.

  Raises:
    InputError: an unknown name, a value out of range, or a key that has no default and no value.
  """
  block = ConfigDict(changes)
  for name, key in record.items():
    value = key.neutral if key.default is _ABSENT else key.default
    if name not in changes:
      if value is _ABSENT:
        raise InputError(f"{name} has no default: give a value for it.")
      block[name] = value
  check_names("the block", block, record)
  check_values(block, record)
  return block.lock()


def hashed(block: ConfigDict, record: Record) -> dict[str, Any]:
  """The part of a checked block that names a result.

  A key at its neutral value is left out, so that a new key renames no finished stage.
  """
  found: dict[str, Any] = {}
  for name, key in present(block, record).items():
    if isinstance(key, Optional):
      # All of it, also default values: a block that is there is never neutral.
      found[name] = block[name].to_dict()
      continue
    value = block[name]
    if not isinstance(key, Key):
      inner = hashed(value, key)
      # A block of neutral values is neutral itself, so that a new block renames nothing either.
      if inner:
        found[name] = inner
    elif key.hashed and value != key.neutral:
      found[name] = value
  return found
