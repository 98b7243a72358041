"""Sampling: `decode` is what a device runs, `programs` compiles it, `call` says what runs when."""

from s2d_jax.sampler.decode import Sampling
from s2d_jax.sampler.programs import Room
from s2d_jax.sampler.scheduler import check_ends, make, sample

__all__ = ["Room", "Sampling", "check_ends", "make", "sample"]
