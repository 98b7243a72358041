"""How near two models are on the same tokens, measured and not trained on."""

from typing import Protocol

import jax
from ml_collections import ConfigDict

from s2d_jax.losses import blockwise, kl, tokens
from s2d_jax.losses.blockwise import Head


class Weighted(Protocol):
  """The fields of a `rollouts.Batch` that are read."""
  weight_BT: jax.Array
  targets_BT: jax.Array


def agreement(student_head: Head, guide_head: Head, batch: Weighted,
              hp: ConfigDict) -> dict[str, jax.Array]:
  """{name: value_BT} of two models' divergence and overlap, in nats or shares of probability.

  Condition C2 of arXiv 2605.12483 asks for it and leaves it unmeasured. Both divergences, the
  overlap of the top hp.top_k tokens and the mass on it, both entropies, and the norms of the two
  objectives' gradients in the student's logits. Of the sampled token, its rank by the teacher (1 is
  the likeliest) and teacher − student of its log-probability. `training.compare` runs it.
  """
  # One pass over the vocabulary for all of them: each on its own would form the logits again.
  def f(s: jax.Array, t: jax.Array,
        targets_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return kl.reverse_kl(s, t), {
        "forward_kl": kl.forward_kl(s, t), "reverse_kl": kl.reverse_kl(s, t),
        "overlap": kl.top_k_overlap(s, t, hp.top_k), "same_first": kl.top_k_overlap(s, t, 1),
        "student_mass": kl.overlap_mass(s, t, hp.top_k),
        "teacher_mass": kl.overlap_mass(t, s, hp.top_k),
        "student_entropy": tokens.entropy(s), "teacher_entropy": tokens.entropy(t),
        "forward_kl_gradient": kl.forward_kl_gradient_norm(s, t),
        "reverse_kl_gradient": kl.reverse_kl_gradient_norm(s, t),
        "teacher_rank": tokens.rank(t, targets_BT),
        "delta_logp": tokens.log_prob(t, targets_BT) - tokens.log_prob(s, targets_BT)}
  _, (_, values) = blockwise.divergence(f, student_head, guide_head, batch.weight_BT, hp.block,
                                          batch.targets_BT)
  return values
