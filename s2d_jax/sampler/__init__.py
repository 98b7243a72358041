"""Sampling: `decode` is what the device runs, `scheduler` what the host does around it."""

from s2d_jax.sampler.decode import Sampling
from s2d_jax.sampler.scheduler import Room, make, sample

__all__ = ["Room", "Sampling", "make", "sample"]
