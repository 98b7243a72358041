"""`config.remat` of "auto": the fastest policy whose update fits a device's memory."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from s2d_jax import hosts, metrics, models, sharding
from s2d_jax.errors import InputError
from s2d_jax.models import Model

# From the fastest on a GPU to the one that needs least memory. "none" and "dots" need more than the
# first and are slower; "offload" depends on the host.
CANDIDATES = ("named", "attention", "block")
# The compiler's account may have this share of the memory: a card's own peak was 3 % above it.
_SHARE = 0.95
_Program = jax.stages.Compiled | jax.stages.Lowered


def check_memory(policy: str, memory: int | None) -> None:
  """Refuses "auto" where nothing says how much memory a device has.

  Args:
    policy: config.remat; memory: bytes of a device; None: unknown.

  Raises:
    InputError: names the key and the other choices.
  """
  if policy == "auto" and memory is None:
    raise InputError(f"config.remat is auto, and a {sharding.platform()} does not tell how much "
                     f"memory it has: set it to one of {', '.join(CANDIDATES)}, of which the last "
                     "needs least.")


def fitting(model: Model, compiled_for: Callable[[Model], _Program], memory: int | None,
            others: int) -> _Program:
  """The program of a model for the policy that its config says, or for the fastest that fits.

  With "auto" programs are compiled from the fastest until one fits. The last is taken in any case:
  whether it fits is seen when it runs, as with a policy that the config names. On several processes
  all must call it, and all take one policy.

  Args:
    compiled_for: the program of the model with another policy, compiled or lowered.
    memory: bytes of a device; None: unknown.
    others: bytes on each device, beside the program's own, that are in use while it runs.

  Raises:
    InputError: "auto", and the memory is unknown.
  """
  if model.config.remat != "auto":
    return compiled_for(model)
  check_memory(model.config.remat, memory)
  for policy in CANDIDATES:
    candidate = models.build(dataclasses.replace(model.config, remat=policy))
    if policy == CANDIDATES[-1]:
      program = compiled_for(candidate)
      break
    needs = float("inf")
    try:
      program = compiled_for(candidate)
      needs = _needs(program)
    except jax.errors.JaxRuntimeError as error:
      # A compiler for TPUs refuses a program that does not fit.
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
    if _on_all(needs + others <= _SHARE * memory):
      break
  metrics.announce(f"config.remat is auto: {policy}")
  return program


def _needs(program: _Program) -> float:
  """Bytes of a device that a program takes."""
  compiled = program.compile() if isinstance(program, jax.stages.Lowered) else program
  memory = compiled.memory_analysis()
  return (memory.argument_size_in_bytes + memory.temp_size_in_bytes
          + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def _on_all(fits: bool) -> bool:
  """Whether a program fits the devices of every process."""
  return int(hosts.sum_over_hosts(np.array([fits], np.int32))[0]) == jax.process_count()
