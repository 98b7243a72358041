"""Group-relative policy optimisation: advantages of a group of samples, surrogates, corrections.

Advantages are plain array code for the host (NumPy in, NumPy out; JAX arrays work too). A group is
a row: the G samples of one prompt.

A surrogate gives the loss of each token and whether its clip acts there. All four have one
signature, so that `SURROGATES` can name them:

  surrogate(logp_BT, old_logp_BT, advantage_BT, clip, mask_BT, segments_BT) -> (loss_BT, clipped_BT)

Log-probabilities are in nats. The mask says which tokens were generated, and segments number the
sequences of a row; only `gspo` reads them, because its ratio is that of a sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.errors import InputError


def group_advantages_centred(reward_PG: np.ndarray) -> np.ndarray:
  """Reward above the group's mean; a group of equal rewards gives exactly 0.

    A_g = r_g − mean(r).

  Dr. GRPO (https://arxiv.org/abs/2503.20783), which explains why not to divide by the spread.
  Float rewards in, the same shape and type out.
  """
  return _centred(reward_PG).astype(reward_PG.dtype)


def group_advantages(reward_PG: np.ndarray) -> np.ndarray:
  """Reward above the group's mean in units of the group's spread; equal rewards give exactly 0.

    A_g = (r_g − mean(r)) / std(r),   std(r)² = (1/G) Σ_g (r_g − mean(r))².

  GRPO (https://arxiv.org/abs/2402.03300). The standard deviation is the group's own (population)
  one, so the mean of A² over a mixed group is 1; with the sample one, as in some libraries, A is
  smaller by √((G − 1)/G). Float rewards in, the same shape and type out.
  """
  centred_PG = _centred(reward_PG)
  spread_P1 = (centred_PG**2).mean(axis=1, keepdims=True) ** 0.5
  # Groups of equal rewards have spread 0 and advantage 0; dividing them by 1 avoids 0/0.
  divisor_P1 = spread_P1 + (spread_P1 == 0).astype(spread_P1.dtype)
  return (centred_PG / divisor_P1).astype(reward_PG.dtype)


def _centred(reward_PG: np.ndarray) -> np.ndarray:
  """Reward above the group's mean; 0 for a group whose rewards are equal to rounding.

  In float64 on the host; a JAX array keeps its type.
  """
  wide_PG = reward_PG.astype(np.float64) if isinstance(reward_PG, np.ndarray) else reward_PG
  # A sum of two rewards may miss its value by rounding. Divided by such a spread, rounding would be
  # an advantage of full size.
  largest_P1 = abs(wide_PG).max(axis=1, keepdims=True)
  rounding_P1 = 4 * jnp.finfo(reward_PG.dtype).eps * largest_P1
  spread_P1 = wide_PG.max(axis=1, keepdims=True) - wide_PG.min(axis=1, keepdims=True)
  is_mixed_P1 = (spread_P1 > rounding_P1).astype(wide_PG.dtype)
  return (wide_PG - wide_PG.mean(axis=1, keepdims=True)) * is_mixed_P1


class Clip(NamedTuple):
  """The range that a surrogate holds the probability ratio r to: [1 − low, 1 + high]."""
  low: float
  high: float
  most: float = np.inf  # the largest r of a token with A < 0; `dual_clipped_surrogate` alone


def clipped_surrogate(logp_BT: jax.Array, old_logp_BT: jax.Array, advantage_BT: jax.Array,
                      clip: Clip, mask_BT: jax.Array | None = None,
                      segments_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Pessimistic importance-weighted policy-gradient loss at each token, and whether it is clipped.

    L = −min(r·A, clip(r, 1 − low, 1 + high)·A),   r = π(a) / π_old(a).
    Clipped where r > 1 + high and A > 0, or r < 1 − low and A < 0: the gradient is 0 exactly there.

  PPO eq. 7 (https://arxiv.org/abs/1707.06347), per token as in GRPO
  (https://arxiv.org/abs/2402.03300); low ≠ high as in DAPO (https://arxiv.org/abs/2503.14476).
  """
  del mask_BT, segments_BT
  ratio_BT = _ratio(jax.lax.stop_gradient(logp_BT), old_logp_BT)
  is_raised_BT = (advantage_BT > 0) & (ratio_BT > 1 + clip.high)
  is_lowered_BT = (advantage_BT < 0) & (ratio_BT < 1 - clip.low)
  clipped_BT = is_raised_BT | is_lowered_BT
  # One choice instead of a minimum of two products: the gradients of a minimum and of a clip are
  # halved where both arguments are equal.
  bound_BT = jnp.clip(ratio_BT, 1 - clip.low, 1 + clip.high)
  moving_BT = _ratio(_constant_where(clipped_BT, logp_BT, old_logp_BT), old_logp_BT)
  return -jnp.where(clipped_BT, bound_BT, moving_BT) * advantage_BT, clipped_BT


def dual_clipped_surrogate(logp_BT: jax.Array, old_logp_BT: jax.Array, advantage_BT: jax.Array,
                           clip: Clip, mask_BT: jax.Array | None = None,
                           segments_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """The clipped surrogate whose loss is bounded where A < 0 as well.

    L = −max(min(r·A, clip(r)·A), most·A)  where A < 0,  else −min(r·A, clip(r)·A).
    Clipped as `clipped_surrogate`, and where r > most and A < 0.

  Without the bound, a token that π has made far likelier than π_old did (r ≫ 1) and that was wrong
  gives a loss as large as its ratio. `clip.most` > 1 is the c of Ye et al. 2020
  (https://arxiv.org/abs/1912.09729, eq. 5).
  """
  ratio_BT = _ratio(jax.lax.stop_gradient(logp_BT), old_logp_BT)
  is_bounded_BT = (advantage_BT < 0) & (ratio_BT > clip.most)
  loss_BT, clipped_BT = clipped_surrogate(
      _constant_where(is_bounded_BT, logp_BT, old_logp_BT), old_logp_BT, advantage_BT, clip,
      mask_BT, segments_BT)
  return (jnp.where(is_bounded_BT, -clip.most * advantage_BT, loss_BT),
          clipped_BT | is_bounded_BT)


def gspo(logp_BT: jax.Array, old_logp_BT: jax.Array, advantage_BT: jax.Array, clip: Clip,
         mask_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Group sequence policy optimisation: one ratio a sequence, length-normalised, and one clip.

    L = −min(s·A, clip(s, 1 − low, 1 + high)·A),   s = (π(y)/π_old(y))^(1/|y|).
    Clipped where s > 1 + high and A > 0, or s < 1 − low and A < 0.

  At each token of y, so that a sequence's mean is its loss (https://arxiv.org/abs/2507.18071, eq. 5
  and 7).
  """
  log_ratio_BT = logp_BT.astype(jnp.float32) - old_logp_BT.astype(jnp.float32)
  # The mean of the log-ratios is the log of the length-normalised ratio of the sequence. With it in
  # place of a token's log-ratio and 0 in place of the old one, the clip is the clipped surrogate's.
  log_s_BT = sequence_mean(log_ratio_BT, mask_BT, segments_BT)
  return clipped_surrogate(log_s_BT, jnp.zeros_like(log_s_BT), advantage_BT, clip)


def cispo(logp_BT: jax.Array, old_logp_BT: jax.Array, advantage_BT: jax.Array, clip: Clip,
          mask_BT: jax.Array | None = None,
          segments_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Policy gradient under a clipped importance weight: every token keeps a gradient.

    L = −sg[clip(r, 1 − low, 1 + high)]·A·log π(a),   r = π(a) / π_old(a).
    Clipped, which changes the weight and stops no gradient, where r is outside and A ≠ 0.

  MiniMax-M1 (https://arxiv.org/abs/2506.13585, eq. 4).
  """
  del mask_BT, segments_BT
  logp_BT = logp_BT.astype(jnp.float32)
  ratio_BT = _ratio(jax.lax.stop_gradient(logp_BT), old_logp_BT)
  loss_BT = -jnp.clip(ratio_BT, 1 - clip.low, 1 + clip.high) * advantage_BT * logp_BT
  # A token without advantage has no gradient that a clip could change, so it is not counted.
  is_outside_BT = (ratio_BT > 1 + clip.high) | (ratio_BT < 1 - clip.low)
  return loss_BT, is_outside_BT & (advantage_BT != 0)


SURROGATES = {"clipped": clipped_surrogate, "dual_clipped": dual_clipped_surrogate, "gspo": gspo,
              "cispo": cispo}


def _constant_where(clipped_BT: jax.Array, logp_BT: jax.Array,
                    old_logp_BT: jax.Array) -> jax.Array:
  """The log-probabilities, and the old ones where a clip replaces the ratio.

  There the exponential may overflow, and its derivative times 0 would be NaN.
  """
  return jnp.where(clipped_BT, old_logp_BT, logp_BT)


def _ratio(logp_BT: jax.Array, old_logp_BT: jax.Array) -> jax.Array:
  """π(a) / π_old(a) in float32."""
  return jnp.exp(logp_BT.astype(jnp.float32) - old_logp_BT.astype(jnp.float32))


def sequence_mean(x_BT: jax.Array, mask_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """Mean of x over the masked tokens of each token's own sequence, at each of its tokens: [B, T].

  A sequence is a segment of a row, so packed rows have several; 0 where a sequence has none.
  """
  total_BT = _over_sequence(jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0), segments_BT)
  count_BT = _over_sequence(mask_BT.astype(jnp.float32), segments_BT)
  return total_BT / jnp.maximum(count_BT, 1.0)


def _over_sequence(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """Sum of x over each token's own segment of its row, at each of the tokens."""
  # Packed rows hold several sequences, so a row's own sum would mix them.
  def totals(x_T: jax.Array, segments_T: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(x_T, segments_T, len(x_T) + 1)[segments_T]
  return jax.vmap(totals)(x_BT, segments_BT)


def mismatch_ratio(old_logp_BT: jax.Array, behaviour_logp_BT: jax.Array, mask_BT: jax.Array,
                   segments_BT: jax.Array, level: str) -> jax.Array:
  """π_old(a) / μ(a): how much likelier a sampled token is for the trainer. Not differentiated.

  "token": of each token; "sequence": the product over the response, unbiased and of high variance.
  Log-probabilities in nats, [B, T]; μ is the distribution that was sampled from, its temperature
  and truncation included.

  Raises:
    InputError: an unknown level.
  """
  log_BT = jnp.where(mask_BT, old_logp_BT - behaviour_logp_BT, 0.0)
  if level == "sequence":
    log_BT = _over_sequence(log_BT, segments_BT)
  elif level != "token":
    raise InputError(f"level is {level!r}: choose \"token\" or \"sequence\".")
  # The correction weights a loss, as an importance weight does: it is data, not a function of π.
  return jax.lax.stop_gradient(jnp.where(mask_BT, jnp.exp(log_BT), 1.0))


def truncated(ratio_BT: jax.Array, most: float) -> jax.Array:
  """min(ratio, most): truncated importance sampling of the gap between sampler and trainer.

  Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; biased,
  and bounded. Multiplies a loss, [B, T].
  """
  return jnp.minimum(ratio_BT, most)


def masked(ratio_BT: jax.Array, least: float, most: float) -> jax.Array:
  """The ratio where it is in [least, most], else 0: tokens too far apart are left out.

  IcePop (Ring-1T, https://arxiv.org/abs/2510.18855). Multiplies a loss, [B, T].
  """
  return jnp.where((ratio_BT >= least) & (ratio_BT <= most), ratio_BT, 0.0)


def overlong_penalty(length_B: np.ndarray, longest: int, cache: int) -> np.ndarray:
  """The term in [−1, 0] that DAPO adds to the reward of a long response; NumPy, float32 [B].

    0 up to longest − cache, then −(length − (longest − cache)) / cache, and −1 beyond longest.

  https://arxiv.org/abs/2503.14476, eq. 13.
  """
  return -np.clip((length_B - (longest - cache)) / cache, 0.0, 1.0).astype(np.float32)
