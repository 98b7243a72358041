"""Sampling: `decode` runs on the device, `programs` compiles it, `scheduler` fills the slots.

`engine` is the interface: it checks arguments, compiles, and runs a schedule for each call.
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

# The schedule and the programs are internal: callers need only a Sampler and its settings.
__all__ = ["Room", "Sampler", "Sampling", "check_ends", "check_memory", "check_room",
           "check_sampling", "make", "naming", "read_folder", "sample"]
