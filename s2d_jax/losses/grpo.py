"""Group-relative policy optimisation: advantages of a group of samples, and the clipped surrogate.

Advantages are plain array code for the host (NumPy in, NumPy out; JAX arrays work too). A group is
a row: the G samples of one prompt.
"""

import jax.numpy as jnp


def group_advantages_centred(reward_PG):
  """Reward above the group's mean; a group of equal rewards gives exactly 0.

    A_g = r_g − mean(r).

  Dr. GRPO (https://arxiv.org/abs/2503.20783), which explains why not to divide by the spread.
  Float rewards in, the same shape and type out.
  """
  return (reward_PG - reward_PG.mean(axis=1, keepdims=True)) * _mixed(reward_PG)


def group_advantages(reward_PG):
  """Reward above the group's mean in units of the group's spread; equal rewards give exactly 0.

    A_g = (r_g − mean(r)) / std(r),   std(r)² = (1/G) Σ_g (r_g − mean(r))².

  GRPO (https://arxiv.org/abs/2402.03300). The standard deviation is the group's own (population)
  one, so the mean of A² over a mixed group is 1; with the sample one, as in some libraries, A is
  smaller by √((G − 1)/G). Float rewards in, the same shape and type out.
  """
  centred_PG = group_advantages_centred(reward_PG)
  return centred_PG / (reward_PG.std(axis=1, keepdims=True) + (1 - _mixed(reward_PG)))


def _mixed(reward_PG):
  """1 for a group whose rewards differ, else 0: the mean of equal floats need not equal them."""
  low_P1, high_P1 = reward_PG.min(axis=1, keepdims=True), reward_PG.max(axis=1, keepdims=True)
  return (high_P1 > low_P1).astype(reward_PG.dtype)


def clipped_surrogate(logp_BT, old_logp_BT, advantage_BT, low, high):
  """Pessimistic importance-weighted policy-gradient loss at each token.

    L = −min(r·A, clip(r, 1 − low, 1 + high)·A),   r = π(a) / π_old(a).

  PPO eq. 7 (https://arxiv.org/abs/1707.06347), per token as in GRPO
  (https://arxiv.org/abs/2402.03300); low ≠ high as in DAPO (https://arxiv.org/abs/2503.14476).
  Log-probabilities in nats, [B, T]; the gradient is zero exactly where `clipped` is true.
  """
  ratio_BT = jnp.exp(logp_BT.astype(jnp.float32) - old_logp_BT.astype(jnp.float32))
  clipped_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
  return -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def clipped(logp_BT, old_logp_BT, advantage_BT, low, high):
  """Whether the clip of `clipped_surrogate` stops the gradient of each token; bool, [B, T].

    r > 1 + high where A > 0,   r < 1 − low where A < 0.
  """
  ratio_BT = jnp.exp(logp_BT.astype(jnp.float32) - old_logp_BT.astype(jnp.float32))
  raised_BT = (advantage_BT > 0) & (ratio_BT > 1 + high)
  lowered_BT = (advantage_BT < 0) & (ratio_BT < 1 - low)
  return raised_BT | lowered_BT
