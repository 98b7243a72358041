"""Attention: one function, here in plain XLA. Letters as in `decoder.py`."""

import jax
import jax.numpy as jnp

# Finite, so that a row with every score masked has a softmax (uniform) and a gradient (zero).
MASKED = float(jnp.finfo(jnp.float32).min)


def visible(positions_BT, segments_BT, key_positions_BS, key_segments_BS):
  """mask_BTS: may query t read key s? Same segment, not padding, and not later than the query.

  Segment 0 is padding: it sees nothing and nobody sees it.
  """
  same_BTS = segments_BT[:, :, None] == key_segments_BS[:, None, :]
  real_BTS = key_segments_BS[:, None, :] != 0
  past_BTS = key_positions_BS[:, None, :] <= positions_BT[:, :, None]
  return same_BTS & real_BTS & past_BTS


def attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
  """Each query head reads the values of its key head, R = N/K query heads to one key head.

    out_t = Σ_s softmax_s(q_t·k_s / √H) v_s   over the s with mask[t, s].

  Scores and softmax are float32; the result has the type of `v`. A query with nothing to read
  gets a finite value of no meaning. Grouped heads: GQA (https://arxiv.org/abs/2305.13245).
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  R = N // K
  # Times and the R heads of a group are one axis, X: two plain batched products, twice as fast on
  # CPU as the same einsums with the axes apart.
  q_BKXH = q_BTNH.reshape(B, T, K, R, H).swapaxes(1, 2).reshape(B, K, T * R, H)
  mask_BKXS = jnp.broadcast_to(mask_BTS[:, None, :, None], (B, K, T, R, S)).reshape(B, K, T * R, S)
  score_BKXS = jnp.einsum("BKXH,BSKH->BKXS", q_BKXH, k_BSKH, preferred_element_type=jnp.float32)
  score_BKXS = jnp.where(mask_BKXS, score_BKXS * H**-0.5, MASKED)
  share_BKXS = jax.nn.softmax(score_BKXS, axis=-1).astype(v_BSKH.dtype)
  out_BKXH = jnp.einsum("BKXS,BSKH->BKXH", share_BKXS, v_BSKH)
  return out_BKXH.reshape(B, K, T, R, H).swapaxes(1, 2).reshape(B, T, N, H)
