"""Whether a file can be written at a place, asked before the hours of work that would be lost."""

import os
import pathlib
import tempfile


def check_folder(folder: pathlib.Path) -> None:
  """Writes a file to a folder and removes it.

  A folder that does not exist yet will be created in its nearest ancestor, so that one is tried.

  Raises:
    OSError: no file can be written there.
  """
  while not os.path.lexists(folder):
    folder = folder.parent
  with tempfile.TemporaryFile(dir=folder):
    pass
