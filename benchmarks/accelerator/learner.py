"""A model with its optimizer that learns random tokens, and programs that compile side by side."""

import dataclasses
from collections.abc import Sequence
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import jax

from benchmarks import measure, step
from configs import common
from s2d_jax import models, objectives, optim, sharding, training
from s2d_jax.models import Model
from s2d_jax.sharding import Params


def network(shape: str, **run_options: Any) -> Model:
  """The model of a shape; bfloat16 where an accelerator computes it."""
  dtype = "bfloat16" if measure.on_accelerator() else "float32"
  return models.get(measure.SHAPES.get(shape, shape), dtype=dtype, **run_options)


class Learner:
  """A model with AdamW that learns random tokens by negative log-likelihood."""

  def __init__(self, shape: str, lora: int, block: int) -> None:
    self.model = network(shape, remat="block")
    config = self.model.config
    self.non_trainable = None
    params = measure.weights(self.model, models.shapes)
    if lora:
      # As in a stage: the weights stand still in float32, and the adapters alone have moments.
      self.non_trainable = params
      self.model = models.build(dataclasses.replace(
          config, lora=models.Lora(lora, 32.0, ("q", "k", "v", "o", "gate", "up", "down"))))
      params = models.adapters(self.model, 0)
    # The gradient of a weight that stands still is not computed: a backward pass is one forward.
    self.passes = 2 if lora else 3
    self.block = block
    # As benchmarks.peers.pytorch has it.
    self.hp = SimpleNamespace(**common.adamw(lr=1e-4, weight_decay=0.1), microbatches=1,
                              block=block, mean="token")
    self.optimizer = optim.make(self.hp, 1000, models.trained(self.model.config))
    self.mesh = sharding.current_mesh()
    self.state = training.init(self.optimizer, self.mesh, params)

  def batch(self, rows: int, tokens: int) -> Params:
    """Random tokens on the device."""
    return sharding.put_batch(step.random_batch(self.model.config.vocab_size, rows, tokens),
                              self.mesh)

  def lower(self, batch: Params) -> jax.stages.Lowered:
    """The update for batches of this shape."""
    update = training.jit_update(self.model, None, objectives.NEGATIVE_LOG_LIKELIHOOD,
                                 self.optimizer, self.hp, training.shardings(self.state))
    return update.lower(self.state, None, batch, self.non_trainable)

  def update(self, program: jax.stages.Compiled, batch: Params) -> dict[str, jax.Array]:
    """Makes an update; its metrics stay on the device."""
    self.state, self.metrics = program(self.state, None, batch, self.non_trainable)
    return self.metrics


def compiled(lowered: Sequence[jax.stages.Lowered]) -> list[tuple[jax.stages.Compiled, float]]:
  """(program, seconds) of each, compiled side by side."""
  with futures.ThreadPoolExecutor(len(lowered)) as pool:
    return list(pool.map(lambda x: measure.stopwatch(x.compile), lowered))
