"""Sampling: `decode` is what a device runs, `programs` compiles it, `scheduler` says when.

`engine` puts them together: what is refused, what is compiled, the calls.
"""

from s2d_jax.sampler.decode import Sampling
from s2d_jax.sampler.engine import (
  Sampler,
  check_ends,
  check_memory,
  check_room,
  check_sampling,
  make,
  sample,
)
from s2d_jax.sampler.folder import read as read_folder
from s2d_jax.sampler.programs import Room
from s2d_jax.sampler.scheduler import naming

__all__ = ["Room", "Sampler", "Sampling", "check_ends", "check_memory", "check_room",
           "check_sampling", "make",
           "naming", "read_folder", "sample"]
