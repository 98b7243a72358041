"""Prompts, rollouts and batches on the host, as NumPy arrays, and where rollouts come from.

Token ids stay ids from the sampler to the loss: text is never tokenized a second time.
"""

from s2d_jax.rollouts.batches import (
  MEANS,
  Batch,
  batch,
  batch_rows,
  minibatches,
  pack,
  token_weights,
  with_hints,
)
from s2d_jax.rollouts.records import (
  FINISHED,
  Prompt,
  Rollout,
  SamplerStats,
  add_stats,
  concatenate,
  from_bytes,
  given_solutions,
  keys_of,
  row_key,
  take,
  to_bytes,
)
from s2d_jax.rollouts.repetition import repeated, repetition
from s2d_jax.rollouts.sources import (
  SOURCES,
  FrozenActor,
  GivenSolutions,
  LabelUse,
  OnFinish,
  OnPolicy,
  RolloutSource,
  Source,
  StageInputs,
  Store,
)
from s2d_jax.rollouts.steps import (
  PassRates,
  PromptOrder,
  Reward,
  Rewards,
  StepRollouts,
  checked_reward,
  logged,
  resolved,
  sample_step,
  score,
  unchecked_since,
)

__all__ = [
  "FINISHED", "MEANS", "SOURCES", "Batch", "FrozenActor", "GivenSolutions", "LabelUse",
  "OnFinish", "OnPolicy", "PassRates", "Prompt", "PromptOrder", "Reward", "Rewards", "Rollout",
  "RolloutSource", "SamplerStats", "Source", "StageInputs", "StepRollouts", "Store", "add_stats",
  "batch", "batch_rows", "checked_reward", "concatenate", "from_bytes", "given_solutions",
  "keys_of", "logged", "minibatches", "pack", "repeated", "repetition", "resolved", "row_key",
  "sample_step", "score", "take", "to_bytes", "token_weights", "unchecked_since", "with_hints",
]
