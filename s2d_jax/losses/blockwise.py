"""The two doors from features to losses; no array of [all tokens, vocabulary] exists behind either.

Logits are formed for about `block` tokens at a time, and once more in the backward pass. A block is
the same few positions of every row, at least one, so that rows stay spread over devices. A head is
the pair (features_BTD, weight_VD); the weight is cast to the type of the features, products are
accumulated in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax.losses import tokens
from s2d_jax.sharding import constrain


class Head(NamedTuple):
  """A model's last features and its unembedding: logits = features · weightᵀ."""
  features_BTD: jax.Array
  weight_VD: jax.Array


def logp(head, targets_BT, block):
  """Log-probability of each target and entropy at each position, in nats: (logp_BT, entropy_BT).

  Equal to `tokens.log_prob` and `tokens.entropy` of the logits, differentiable in the head for any
  cotangent: every policy-gradient loss is a function of logp_BT.
  """
  features_BTD, weight_VD = head

  def on_block(features_BtD, targets_Bt):
    logits_BtV = _logits(features_BtD, weight_VD)
    return tokens.log_prob(logits_BtV, targets_Bt), tokens.entropy(logits_BtV)

  return _over_blocks(on_block, block, features_BTD, targets_BT)


def divergence(f, student_head, guide_head, weight_BT, block):
  """Weighted sum of a per-token divergence and its values: (Σ weight · f, value_BT).

  `f(student_logits, guide_logits)` maps [B, t, V] twice to [B, t], as `kl.forward_kl` does. The sum
  is differentiable; value_BT is for reading and carries no gradient. Where the weight is 0 the
  value is left out, whatever it is.
  """
  student_BTD, student_VD = student_head
  guide_BTD, guide_VD = guide_head

  def on_block(student_BtD, guide_BtD):
    return f(_logits(student_BtD, student_VD), _logits(guide_BtD, guide_VD))

  value_BT = _over_blocks(on_block, block, student_BTD, guide_BTD)
  total = jnp.sum(value_BT * weight_BT, where=weight_BT > 0)
  return total, jax.lax.stop_gradient(value_BT)


def _logits(features_BtD, weight_VD):
  logits_BtV = jnp.einsum("BTD,VD->BTV", features_BtD, weight_VD.astype(features_BtD.dtype),
                          preferred_element_type=jnp.float32)
  return constrain(logits_BtV, "batch", "time", "vocab")


def _over_blocks(f, block, *xs):
  """`f` on [B, t, ...] pieces of each [B, T, ...] in turn, with B·t ≤ block or t = 1; joined."""
  B, T = xs[0].shape[:2]
  if block < 1:
    raise ValueError(f"block is {block}: give the tokens per block of the loss, at least 1.")
  t = min(max(block // B, 1), T)
  n = -(-T // t)

  def split(x):  # the last block is filled up with zeros, whose finite results `join` drops
    # Both sides are pinned to whole rows: left free, XLA may spread the features over other axes
    # and has then computed wrong gradients through the filling (jax 0.10.2, mesh (2, 2, 2)).
    whole = ("time",) * (x.ndim - 2)
    x = constrain(x, "batch", "time", *whole)
    x = jnp.pad(x, [(0, 0), (0, n * t - T)] + [(0, 0)] * (x.ndim - 2))
    x_nBt = jnp.moveaxis(x.reshape(B, n, t, *x.shape[2:]), 1, 0)
    return constrain(x_nBt, "time", "batch", "time", *whole)

  def join(y_nBt):
    return jnp.moveaxis(y_nBt, 0, 1).reshape(B, n * t)[:, :T]

  # Inside a loop nothing can be shared between forward and backward, so the guard is not needed.
  checkpointed = jax.checkpoint(lambda pieces: f(*pieces), prevent_cse=False)
  return jax.tree.map(join, jax.lax.map(checkpointed, tuple(map(split, xs))))
