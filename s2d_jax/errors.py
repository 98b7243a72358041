"""The error for a mistake in what a user gave."""


class InputError(ValueError):
  """A file, a setting or an argument is wrong; the message names it and the remedy in one sentence.

  Commands print its message and nothing else. Any other error, also a ValueError of a library, is
  a fault of ours and keeps its traceback.
  """


class WriteError(RuntimeError):
  """A file could not be written, so the run stops; its text is one sentence with the remedy.

  All that was saved before holds, and the same command goes on from there.
  """
