"""The errors that a command prints as one sentence."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
  """A file, a setting or an argument is wrong; the message names it and the remedy in one sentence.

  Commands print its message and nothing else. Any other error, also a ValueError of a library, is
  a fault of ours: its traceback goes to a file, which the command names.
  """


class WriteError(RuntimeError):
  """A file could not be written or read, so the run stops; its text has the remedy.

  All that was saved before holds, and the same command goes on from there.
  """


@contextlib.contextmanager
def from_user_code(name: str) -> Iterator[None]:
  """Turns any error of a function that the user wrote into an InputError with the name."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    raise InputError(f"{name} failed ({type(error).__name__}: {error}): mend it.") from error
