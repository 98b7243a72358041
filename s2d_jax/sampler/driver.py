"""The driver of this machine's NVIDIA GPUs, by what it can do."""

import ctypes
import functools

from absl import logging

_LOOPS_SINCE = 12_030  # CUDA 12.3, in the driver's form: 1000 x major + 10 x minor


def version() -> int | None:
  """The CUDA version of the driver, such as 12_040 for 12.4; None where there is no driver."""
  try:
    library = ctypes.CDLL("libcuda.so.1")
  except OSError:
    return None
  found = ctypes.c_int()
  # The call needs no context on a device. Any result but 0 is an error.
  return None if library.cuDriverGetVersion(ctypes.byref(found)) else found.value


@functools.cache
def has_loops_in_graphs() -> bool:
  """Whether CUDA graphs may hold loops; where they may not, the first call logs a warning.

  Without a driver programs are compiled for a GPU that is not here, whose driver is taken as new.
  """
  found = version()
  if found is None or found >= _LOOPS_SINCE:
    return True
  logging.warning(
      "the GPU's driver has CUDA %d.%d, and its graphs hold no loops, so the host launches each "
      "token's kernels and decoding is slower: install a driver of CUDA 12.3 or newer.",
      found // 1000, found % 1000 // 10)
  return False
