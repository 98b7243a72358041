"""How near two models are on the same tokens, measured and not trained on."""

from typing import Protocol

import jax
from ml_collections import ConfigDict

from s2d_jax.losses import blockwise, kl, tokens
from s2d_jax.losses.blockwise import Head


class Weighted(Protocol):
  """The field of a `rollouts.Batch` that is read."""
  weight_BT: jax.Array


def agreement(student_head: Head, guide_head: Head, batch: Weighted,
              hp: ConfigDict) -> dict[str, jax.Array]:
  """{name: value_BT} of two models' divergence and overlap, in nats or shares of probability.

  Condition C2 of arXiv 2605.12483 asks for it and leaves it unmeasured. Both divergences, the
  overlap of the top hp.top_k tokens and the mass on it, both entropies, and the norms of the two
  objectives' gradients in the student's logits. `training.compare` runs it.
  """
  # One pass over the vocabulary for all of them: each on its own would form the logits again.
  def f(s: jax.Array, t: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return kl.reverse_kl(s, t), {
        "forward_kl": kl.forward_kl(s, t), "reverse_kl": kl.reverse_kl(s, t),
        "overlap": kl.top_k_overlap(s, t, hp.top_k), "same_first": kl.top_k_overlap(s, t, 1),
        "student_mass": kl.overlap_mass(s, t, hp.top_k),
        "teacher_mass": kl.overlap_mass(t, s, hp.top_k),
        "student_entropy": tokens.entropy(s), "teacher_entropy": tokens.entropy(t),
        "forward_kl_gradient": kl.forward_kl_gradient_norm(s, t),
        "reverse_kl_gradient": kl.reverse_kl_gradient_norm(s, t)}
  _, (_, values) = blockwise.divergence(f, student_head, guide_head, batch.weight_BT, hp.block)
  return values
