"""Names a function for a hash by its meaning, equally in every process.

A function may carry values: a partial its arguments, a callable object and a bound method their
instance. Each must have one text in every process, or a stage would have another name at each start
and a killed run would begin anew.
"""

import copyreg
import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from s2d_jax.errors import InputError


def identity_of(function: Callable[..., Any]) -> list[Any]:
  """Names a function for a hash, so that a change of its meaning renames what depends on it.

  A function of this package is its module, its qualified name and its attribute `version`, 1 where
  it has none: a new wording renames nothing, and whoever changes the meaning raises the version. A
  user's function is its module, name and source text (its own, not that of what it calls).

  A partial is its function and arguments. A callable object is its class, and its value where it
  has one; a bound method likewise. Where there is no text (typed at a prompt), the compiled code
  stands for it.

  Raises:
    InputError: an argument or an instance has no text that is equal in every process.
  """
  # A partial has no name or text of its own.
  if isinstance(function, functools.partial):
    owner = _name(function.func)
    return [identity_of(function.func), _text(function.args, owner),
            _text(sorted(function.keywords.items()), owner)]
  value = _carried(function)
  # An object with __call__ is named by its class.
  if not (inspect.isroutine(function) or inspect.isclass(function)):
    function = type(function)
  if (function.__module__ or "").split(".")[0] == __package__:
    return [function.__module__, function.__qualname__, getattr(function, "version", 1), *value]
  try:
    text = inspect.getsource(function)
  except (OSError, TypeError):
    text = ""
    if inspect.isfunction(function):
      code = function.__code__
      text = f"{code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"
  return [function.__module__, function.__qualname__, text, *value]


def _carried(function: Callable[..., Any]) -> list[str]:
  """[the text of a callable's instance], or [] where it has none, or one without any state."""
  instance = function
  if inspect.isroutine(function):
    instance = getattr(function, "__self__", None)
  # A class method and a function of a compiled module carry what needs no further name.
  if instance is None or inspect.isclass(instance) or inspect.ismodule(instance):
    return []
  if not _has_state(instance):
    return []
  text = _value_text(instance, _name(function))
  if text is None:
    raise _refusal(instance, _name(function))
  return [text]


def _has_state(instance: Any) -> bool:
  """Whether an object has more than its class."""
  # Pickle's protocol reads attributes, slots and the items of a base class alike.
  try:
    reduced = instance.__reduce_ex__(2)
  except TypeError:  # the state of a compiled type that pickle does not reach
    return True
  # (a function that makes it, the class and further arguments, state, items, items)
  return (reduced[0] is not copyreg.__newobj__ or len(reduced[1]) > 1
          or any(part is not None for part in reduced[2:]))


def _text(value: Any, owner: str) -> str:
  """The text of a value that the function `owner` carries; a function is its own identity."""
  text = _value_text(value, owner)
  if text is not None:
    return text
  if callable(value):
    return json.dumps(identity_of(value))
  raise _refusal(value, owner)


def _value_text(value: Any, owner: str) -> str | None:
  """The text of a value that is not a function: its `repr`, but an array's bytes; None: unknown."""
  kind = type(value)
  # Their own text is equal in every process. A class has no address in it either.
  if value is None or kind in (bool, int, float, complex, str, bytes) or inspect.isclass(value):
    return repr(value)
  if isinstance(value, np.generic | np.ufunc):
    return repr(value)
  # `repr` shortens a long array and rounds its numbers.
  if kind is np.ndarray and not value.dtype.hasobject:
    digest = hashlib.sha256(value.tobytes()).hexdigest()
    return f"array({value.dtype}, {value.shape}, {digest})"
  if kind in (tuple, list):
    inner = ", ".join(_text(item, owner) for item in value)
    if kind is list:
      return f"[{inner}]"
    return f"({inner},)" if len(value) == 1 else f"({inner})"
  if kind is dict:
    pairs = (f"{_text(key, owner)}: {_text(item, owner)}" for key, item in value.items())
    return "{" + ", ".join(pairs) + "}"
  if isinstance(value, tuple) and getattr(kind, "_fields", None) is not None:
    return _record_text(kind.__name__, kind._fields, value, owner)
  if dataclasses.is_dataclass(value) and kind.__dataclass_params__.frozen:
    names = [field.name for field in dataclasses.fields(value)]
    return _record_text(kind.__qualname__, names, value, owner)
  return None


def _record_text(name: str, fields: list[str] | tuple[str, ...], value: Any, owner: str) -> str:
  """The text of a NamedTuple or of a frozen dataclass, as `repr` has it."""
  texts = ", ".join(f"{field}={_text(getattr(value, field), owner)}" for field in fields)
  return f"{name}({texts})"


def _name(function: Callable[..., Any]) -> str:
  """A function's name for a message; an object's is that of its class."""
  # A callable object has no name of its own, so its class stands for it.
  named = getattr(function, "__qualname__", None) is not None
  function = function if named else type(function)
  return f"{function.__module__}.{function.__qualname__}"


def _refusal(value: Any, owner: str) -> InputError:
  """The error that a value of a function has no text that is equal in every process."""
  kind = type(value)
  return InputError(
      f"{owner} carries a {kind.__module__}.{kind.__qualname__}, which has no text that is equal "
      "in every process, so a killed run would begin anew: make it a number, text, array or "
      "function, or a tuple, list, dict, NamedTuple or frozen dataclass of these.")
