"""Attention: one function, several implementations. Letters as in `decoder.py`.

  xla      two batched products and a softmax; every backend, every mask: the reference
  cudnn    `jax.nn.dot_product_attention` on NVIDIA GPUs, in bfloat16
  splash   JAX's Pallas kernel on TPUs, for whole sequences (no cache)

The scores of `xla` are [B, N, T, S]; the other two never hold them. None of them repeats keys or
values for the query heads that share them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from s2d_jax import sharding

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
# Finite, so that a row with every score masked has a softmax (uniform) and a gradient (zero).
MASKED = float(jnp.finfo(jnp.float32).min)
LANES = 128  # splash wants tiles of that many tokens


class Reading(NamedTuple):
  """Which query may read which key, in the form that the implementation `how` takes."""
  segments_BT: jax.Array
  mask_BTS: jax.Array | None  # None: causal within a segment, which `splash` works out by itself


def choose(asked, dtype, head_width, cached):
  """The implementation that config.attention means here: "auto" is the backend's own.

  Reading from a cache is always `xla`; so is "auto" where the GPU kernel does not take the
  activations' type or the head.
  """
  if cached:
    return "xla"
  if asked != "auto":
    return asked
  platform = sharding.platform()
  if platform == "gpu" and dtype == "bfloat16" and head_width % 8 == 0 and head_width <= 128:
    return "cudnn"
  return "splash" if platform == "tpu" else "xla"


def reading(how, positions_BT, segments_BT, key_positions_BS, key_segments_BS):
  """The Reading of queries and keys with these positions and segments."""
  mask_BTS = None
  if how != "splash":
    mask_BTS = visible(positions_BT, segments_BT, key_positions_BS, key_segments_BS)
  return Reading(segments_BT, mask_BTS)


def visible(positions_BT, segments_BT, key_positions_BS, key_segments_BS):
  """mask_BTS: may query t read key s? Same segment, not padding, and not later than the query.

  Segment 0 is padding: it sees nothing and nobody sees it.
  """
  same_BTS = segments_BT[:, :, None] == key_segments_BS[:, None, :]
  real_BTS = key_segments_BS[:, None, :] != 0
  past_BTS = key_positions_BS[:, None, :] <= positions_BT[:, :, None]
  return same_BTS & real_BTS & past_BTS


def attention(how, q_BTNH, k_BSKH, v_BSKH, reads):
  """Each query head reads the values of its key head, R = N/K query heads to one key head.

    out_t = Σ_s softmax_s(q_t·k_s / √H) v_s   over the s that t may read.

  Scores and softmax are float32; the result has the type of `v`. A query with nothing to read
  gets a finite value of no meaning. Grouped heads: GQA (https://arxiv.org/abs/2305.13245).

  Args:
    how: "xla", "cudnn" or "splash"; reads: the Reading made for it.
  """
  if how == "splash":
    return splash(q_BTNH, k_BSKH, v_BSKH, reads.segments_BT)
  if how == "cudnn":
    return cudnn(q_BTNH, k_BSKH, v_BSKH, reads.mask_BTS)
  return xla(q_BTNH, k_BSKH, v_BSKH, reads.mask_BTS)


def xla(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
  """`attention` as two plain batched products."""
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


def cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, implementation="cudnn"):
  """`attention` by `jax.nn.dot_product_attention`; cuDNN trains on even lengths alone."""
  T = q_BTNH.shape[1]
  def even(x, *axes):
    return jnp.pad(x, [(0, x.shape[at] % 2 if at in axes else 0) for at in range(x.ndim)])
  out_BTNH = jax.nn.dot_product_attention(
      even(q_BTNH, 1), even(k_BSKH, 1), even(v_BSKH, 1), mask=even(mask_BTS, 1, 2)[:, None],
      implementation=implementation)
  return out_BTNH[:, :T]


def splash(q_BTNH, k_BTKH, v_BTKH, segments_BT, interpret=False):
  """`attention` by JAX's splash kernel: causal within segments, tokens in the order of positions.

  Each device runs the kernel on its own rows and heads. Where there are fewer key heads than the
  `tensor` axis has devices, every device holds all of them and takes those of its query heads.
  """
  T, N, H = q_BTNH.shape[1:]
  R, more = N // k_BTKH.shape[2], -T % LANES

  def local(heads, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    own, K = q_BTNH.shape[2], k_BTKH.shape[2]
    if own != K * R:  # all the key heads are here, and not all the query heads
      # One key head for R of them, or for all of them, or, where groups straddle devices, for each.
      wanted = own if own % R and R % own else max(1, own // R)
      at = (heads * own + jnp.arange(wanted) * (own // wanted)) // R
      k_BTKH, v_BTKH = jnp.take(k_BTKH, at, axis=2), jnp.take(v_BTKH, at, axis=2)
    padded = [jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
              for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)]
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more)))
    out_BNTH = jax.vmap(_kernel(own, T + more, interpret))(
        *padded, splash_attention.SegmentIds(segments_BT, segments_BT))
    return out_BNTH.swapaxes(1, 2)[:, :T]

  names = ("batch", "time", "heads", "head"), *(("batch", "time", "kv_heads", "head"),) * 2
  return sharding.on_shards(local, "heads", (q_BTNH, k_BTKH, v_BTKH, segments_BT),
                            (*names, ("batch", "time")), names[0])


def _kernel(heads, tokens, interpret):
  """The splash kernel of so many query heads and tokens; its tiles are as large as divide them."""
  tile = next(size for size in (512, 256, LANES) if tokens % size == 0)
  names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
           "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
  sizes = splash_attention.BlockSizes(**dict.fromkeys(names, tile))
  mask = splash_attention.MultiHeadMask(
      [splash_attention.CausalMask((tokens, tokens)) for _ in range(heads)])
  return splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                          interpret=interpret)
