"""Reads JSON that others wrote: whole files, single lines, and the typed keys of an object.

Every fault is an InputError that names the file, or the file and the line. A byte-order mark is
refused, because the libraries that read a model's files refuse it too.
"""

import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from s2d_jax.errors import InputError

Json = dict[str, Any]  # a JSON object

_DEPTH = 100  # levels of nesting; a tokenizer.json has about ten
_DIGITS = 300  # of an integer; a float64 holds no larger one
_SHOWN = 80  # characters of a value in a message
_INT32 = 2**31 - 1
# The first bytes of a file that is not JSON -> (its kind, the remedy).
_KINDS = {
    b"\x1f\x8b": ("compressed with gzip", "decompress it with gunzip"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "decompress it with unzstd"),
    b"\xfd7zXZ": ("compressed with xz", "decompress it with unxz"),
    b"BZh": ("compressed with bzip2", "decompress it with bunzip2"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("a parquet file", "name it .parquet where parquet is read, or convert it to JSON"),
    b"ARROW1": ("an Arrow file", "convert it to JSON"),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file itself with git lfs pull"),
    b"<": ("a page of HTML or XML", "download the file itself"),
    b"\xef\xbb\xbf": ("UTF-8 with a byte-order mark", "save it without the mark"),
    # The mark of UTF-32 begins with that of UTF-16, so it is looked for first.
    b"\xff\xfe\0\0": ("UTF-32", "save it as UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32", "save it as UTF-8"),
    b"\xff\xfe": ("UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16", "save it as UTF-8")}
# Only a text with such an escape can hold half of a surrogate pair.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Fault(ValueError):
  """A reason for which a text is refused; the message lacks the file's name."""


class _Empty(ValueError):
  """A text without a character."""


def read(path: str | os.PathLike, remedy: str = "download it again") -> Json:
  """The object in a JSON file.

  Args:
    remedy: of a file that is damaged, for the message.

  Raises:
    InputError: the file is absent or unreadable, or `parse` refuses its text.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise InputError(f"{path} cannot be read ({error.strerror}): {remedy}.") from error
  return parse(str(path), data, remedy)


def parse(name: str, data: bytes | str, remedy: str = "download it again") -> Json:
  """The object in a JSON text, such as a line of a file.

  Args:
    name: of the file, or of the file and the line, for the message.

  Raises:
    InputError: `value` refuses the text, or it holds something other than an object.
  """
  found = value(name, data, remedy)
  if not isinstance(found, dict):
    raise InputError(f"{name} is not a JSON object: {remedy}.")
  return found


def value(name: str, data: bytes | str, remedy: str = "download it again") -> Any:
  """The value in a JSON text: a number, a text, a list, an object, a boolean or None.

  Raises:
    InputError: the text is not UTF-8, or not JSON; an object has a key twice; a number is NaN,
      infinite or of too many digits; a text has half a surrogate pair; values are nested too
      deeply. Names `name` and the remedy.
  """
  try:
    text = _decoded(name, data)
    found = _DECODER.decode(text)
    _check_depth(text, found)
    # A file cannot hold half a pair itself, but an escape can stand for it.
    if _SURROGATE.search(text):
      json.dumps(found, ensure_ascii=False).encode()
  except json.JSONDecodeError as error:
    raise InputError(f"{name} is not JSON ({error}): {remedy}.") from error
  except UnicodeEncodeError as error:
    raise InputError(f"{name} has half a surrogate pair "
                     f"(\\u{ord(error.object[error.start]):04x}), half of a character: remove it."
                     ) from error
  except RecursionError as error:
    raise InputError(f"{name} is nested too deeply: use at most {_DEPTH} levels.") from error
  except _Empty as error:
    raise InputError(f"{name} is empty: {remedy}.") from error
  except _Fault as error:
    raise InputError(f"{name} {error}") from error
  return found


def _decoded(name: str, data: bytes | str) -> str:
  """The text of UTF-8 bytes; raises a `_Fault` that says what other bytes are."""
  if isinstance(data, str):
    data.encode()  # an argument of a command line may hold halves of surrogate pairs
    return data
  start = data[:64].lstrip(b" \t\r\n")
  for magic, (kind, remedy) in _KINDS.items():
    if start.startswith(magic):
      raise InputError(f"{name} is {kind}, not JSON: {remedy}.")
  # ASCII characters of UTF-16 without a mark have a zero as one of their two bytes.
  if b"\0" in data[:4]:
    raise InputError(f"{name} has zero bytes, as UTF-16 has: save it as UTF-8.")
  if not data.strip():
    raise _Empty
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise InputError(f"{name} is not UTF-8 (the byte 0x{data[error.start]:02x} at offset "
                     f"{error.start}), perhaps Latin-1: save it as UTF-8.") from error


def _check_depth(text: str, found: Any) -> None:
  """Raises RecursionError where values are nested deeper than `_DEPTH`."""
  # The parser's own limit depends on the caller's stack, and later readers recurse too.
  if text.count("[") + text.count("{") <= _DEPTH:
    return
  level = [found]
  for _ in range(_DEPTH + 1):
    inner = []
    for item in level:
      if isinstance(item, dict):
        inner += [x for x in item.values() if isinstance(x, dict | list)]
      elif isinstance(item, list):
        inner += [x for x in item if isinstance(x, dict | list)]
    level = inner
  if level:
    raise RecursionError


def _object(pairs: list[tuple[str, Any]]) -> Json:
  """The object of its pairs; raises a `_Fault` where a key comes twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise _Fault(f"has the key {shown(twice)} twice in one object: keep one of them.")
  return found


def _integer(digits: str) -> int:
  if len(digits) > _DIGITS:
    raise _Fault(f"has an integer of {len(digits)} digits: write a number of at most {_DIGITS}.")
  return int(digits)


def _float(digits: str) -> float:
  # Python reads 1e999 as infinity.
  if not math.isfinite(float(digits)):
    raise _Fault(f"has the number {shown(digits)}, which is beyond a float64: write a smaller one.")
  return float(digits)


def _refuse_constant(name: str) -> None:
  raise _Fault(f"has {name}, which JSON lacks: write a finite number, null or a text.")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float,
                            parse_constant=_refuse_constant)


def shown(found: Any) -> str:
  """A value for a message: its `repr`, cut where it is long."""
  text = repr(found)
  return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


_REQUIRED: Any = object()  # the default of a key that must be there


class Fields(NamedTuple):
  """The keys of a JSON object, read by type.

  A key whose value is null counts as absent. An absent key has the caller's default, or is refused
  where there is none. Every method raises InputError, which names the file and the key.
  """
  name: str  # of the file
  json: Json

  def integer(self, key: str, low: int = 1, high: int = _INT32,
              default: int | None = _REQUIRED) -> int | None:
    """The integer of a key, from `low` to `high`."""
    found = self._get(key, default)
    # To Python a boolean is an integer.
    whole = isinstance(found, int) and not isinstance(found, bool)
    if found is not default and not (whole and low <= found <= high):
      raise self._wrong(key, f"an integer from {low} to {high}")
    return found

  def number(self, key: str, low: float, high: float,
             default: float | None = _REQUIRED) -> float | None:
    """The number of a key as a float, from `low` to `high`."""
    found = self._get(key, default)
    if found is default:
      return found
    numeric = isinstance(found, int | float) and not isinstance(found, bool)
    # A comparison with NaN is false, so NaN is refused too.
    if not (numeric and low <= found <= high):
      raise self._wrong(key, f"a number from {low:g} to {high:g}")
    return float(found)

  def boolean(self, key: str, default: bool | None = _REQUIRED) -> bool | None:
    """The boolean of a key."""
    return self._of_type(key, bool, "true or false", default)

  def text(self, key: str, default: str | None = _REQUIRED) -> str | None:
    """The text of a key."""
    return self._of_type(key, str, "a text", default)

  def object(self, key: str, default: Json | None = _REQUIRED) -> Json | None:
    """The object of a key."""
    return self._of_type(key, dict, "an object", default)

  def list(self, key: str, default: list[Any] | None = _REQUIRED) -> list[Any] | None:
    """The list of a key."""
    return self._of_type(key, list, "a list", default)

  def _of_type(self, key: str, kind: type, words: str, default: Any) -> Any:
    found = self._get(key, default)
    if found is not default and not isinstance(found, kind):
      raise self._wrong(key, words)
    return found

  def _get(self, key: str, default: Any) -> Any:
    found = self.json.get(key)
    if found is not None:
      return found
    if default is _REQUIRED:
      state = "has no" if key not in self.json else "has null under"
      raise InputError(f"{self.name} {state} {key!r}: take the file that came with the weights.")
    return default

  def _wrong(self, key: str, words: str) -> InputError:
    return InputError(f"{self.name} has {shown(self.json[key])} under {key!r}: make it {words}.")
