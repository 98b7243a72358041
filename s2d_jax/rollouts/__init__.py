"""Prompts, rollouts and batches on the host, as NumPy arrays.

Token ids stay ids from the sampler to the loss: text is never tokenized a second time.
"""

from s2d_jax.rollouts.batches import MEANS, Batch, batch, minibatches, pack, token_weights
from s2d_jax.rollouts.records import (
  FINISHED,
  Prompt,
  Rollout,
  concatenate,
  from_bytes,
  given,
  row_key,
  take,
  to_bytes,
)
from s2d_jax.rollouts.stores import Store

__all__ = ["FINISHED", "MEANS", "Batch", "Prompt", "Rollout", "Store", "batch", "concatenate",
           "from_bytes", "given", "minibatches", "pack", "row_key", "take", "to_bytes",
           "token_weights"]
