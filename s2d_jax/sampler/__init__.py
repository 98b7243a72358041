"""Sampling: `Sampler` compiles once; each call samples prompts and returns (Rollout, SamplerStats).

One file per subject: `sampling` chooses a token, `decode` runs on the device, `capacity` computes
what fits, `programs` compiles, `memory` and `scheduler` fill the slots, `stop_strings` ends rows.
"""

from s2d_jax.rollouts import SamplerStats
from s2d_jax.sampler.capacity import SamplerConfig, Unfit, check_config
from s2d_jax.sampler.folder import read as read_folder
from s2d_jax.sampler.folder import read_description
from s2d_jax.sampler.programs import RUN_COMPILER, Compiler, fitted
from s2d_jax.sampler.sampler import Sampler, check_memory, naming
from s2d_jax.sampler.sampling import Sampling, check_sampling
from s2d_jax.sampler.scheduler import Stopped, stopping

__all__ = ["RUN_COMPILER", "Compiler", "Sampler", "SamplerConfig", "SamplerStats", "Sampling",
           "Stopped", "Unfit", "check_config", "check_memory", "check_sampling", "fitted", "naming",
           "read_description", "read_folder", "stopping"]
