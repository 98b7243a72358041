"""Attention: one function, several implementations. Letters as in `decoder.py`.

  xla      two batched products and a softmax; every backend, every mask: the reference
  causal   xla on one piece of the queries at a time; scores are not kept for the backward pass
  cudnn    `jax.nn.dot_product_attention` on NVIDIA GPUs, in bfloat16; a row is one sequence, and
           what follows it is padding, as in `rollouts.batch`
  cudnn_packed   the same kernel with a mask [T, T], for rows of several sequences
  splash   JAX's Pallas kernel on TPUs

All are for whole sequences: queries and keys are the same tokens, in the order of their positions.
Only `xla` takes any others. Its scores are [B, N, T, S]; the others never hold them all.
`cached` is for queries that follow the tokens of a cache, and `paged.paged` for a cache in pages.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention

from s2d_jax import sharding
from s2d_jax.errors import InputError

IMPLEMENTATIONS = ("auto", "xla", "causal", "cudnn", "cudnn_packed", "splash")
# The only backend of an implementation.
_NEEDS = {"cudnn": "gpu", "cudnn_packed": "gpu", "splash": "tpu"}
# Finite, so that a row with every score masked has a softmax (uniform) and a gradient (zero).
_MASKED = float(jnp.finfo(jnp.float32).min)
_LANES = 128  # the tiles of splash are multiples of this many tokens
RESULT = "attention"  # the checkpoint name of a kernel's output and of its softmax's log-sums
PIECE = 128  # queries that `causal` takes at a time; more in long sequences, for at most 8 pieces


class Reading(NamedTuple):
  """Which query may read which key, in the form that an implementation takes."""
  segments_BT: jax.Array | None
  mask_BTS: jax.Array | None  # None: causal within a segment, which the kernel computes itself
  table_Bn: jax.Array | None = None  # the pages of each row, for a cache in pages
  length_B: jax.Array | None = None  # tokens of the one sequence of a row, for `cudnn`


def choose(setting: str, dtype: str, head_width: int) -> str:
  """The implementation that a Config's `attention` stands for on this backend.

  "auto" is the backend's own kernel. It is `causal` on a CPU, and on a GPU whose kernel does not
  take the activations' dtype or the head's width.

  Raises:
    InputError: the implementation needs another backend.
  """
  platform = sharding.platform()
  if _NEEDS.get(setting, platform) != platform:
    raise InputError(f"attention {setting!r} needs a {_NEEDS[setting]} and this is a {platform}: "
                     "set it to auto.")
  if setting != "auto":
    return setting
  # These are the limits of cuDNN's kernel.
  if platform == "gpu" and dtype == "bfloat16" and head_width % 8 == 0 and head_width <= 128:
    return "cudnn"
  return "splash" if platform == "tpu" else "causal"


def reading(implementation: str, positions_BT: jax.Array, segments_BT: jax.Array) -> Reading:
  """The Reading of whole sequences whose tokens have these positions and segments."""
  if implementation == "splash":
    return Reading(segments_BT, None)
  if implementation == "cudnn":
    return Reading(None, None, length_B=jnp.sum(segments_BT != 0, axis=1, dtype=jnp.int32))
  return Reading(None, visible(positions_BT, segments_BT, positions_BT, segments_BT))


def one_sequence(segments_BT: jax.Array) -> jax.Array:
  """bool [B]: a row is one sequence from its first token on, and then padding."""
  length_B1 = jnp.sum(segments_BT != 0, axis=1, keepdims=True)
  inside_BT = jnp.arange(segments_BT.shape[1])[None] < length_B1
  return jnp.all(segments_BT == jnp.where(inside_BT, segments_BT[:, :1], 0), axis=1)


def visible(positions_BT: jax.Array, segments_BT: jax.Array, key_positions_BS: jax.Array,
            key_segments_BS: jax.Array) -> jax.Array:
  """mask_BTS: true where query t may read key s.

  Both are in one segment, which is not 0, and the key is not later than the query. Segment 0 is
  padding: it reads no key, and no query reads it.
  """
  same_BTS = segments_BT[:, :, None] == key_segments_BS[:, None, :]
  real_BTS = key_segments_BS[:, None, :] != 0
  past_BTS = key_positions_BS[:, None, :] <= positions_BT[:, :, None]
  return same_BTS & real_BTS & past_BTS


def attention(implementation: str, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
              reads: Reading) -> jax.Array:
  """Grouped-query attention (https://arxiv.org/abs/2305.13245): out_BTNH.

    out_t = Σ_s softmax_s(q_t·k_s / √H) v_s   over the s that t may read.

  R = N/K query heads read one key head. Scores and softmax are float32; the result has the dtype
  of `v`. A query with nothing to read gets a finite value without meaning.

  Args:
    implementation: what `choose` returned.
    q_BTNH, k_BSKH, v_BSKH: queries, keys and values.
    reads: the Reading for this implementation.
  """
  if implementation == "splash":
    return splash(q_BTNH, k_BSKH, v_BSKH, reads.segments_BT)
  if implementation in ("cudnn", "cudnn_packed"):
    return cudnn(q_BTNH, k_BSKH, v_BSKH, reads.mask_BTS, reads.length_B)
  if implementation == "causal":
    return causal(q_BTNH, k_BSKH, v_BSKH, reads.mask_BTS)
  return xla(q_BTNH, k_BSKH, v_BSKH, reads.mask_BTS)


def xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
        mask_BTS: jax.Array) -> jax.Array:
  """`attention` as two plain batched products."""
  score_BKXS, _ = _scores(q_BTNH, k_BSKH, mask_BTS)
  share_BKXS = jax.nn.softmax(score_BKXS, axis=-1).astype(v_BSKH.dtype)
  return _apart(jnp.einsum("BKXS,BSKH->BKXH", share_BKXS, v_BSKH), q_BTNH.shape[2])


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array,
            mask_BTS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(float32 scores q·k / √H, or _MASKED; the mask) of every query and key, both [B, K, X, S].

  X is the T times and the R heads of a group as one axis.
  """
  # With one axis the products are plain batched ones: on a CPU they take half the time of the
  # einsums with the two axes apart.
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  mask_BKXS = jnp.broadcast_to(
      mask_BTS[:, None, :, None], (B, K, T, N // K, S)).reshape(B, K, -1, S)
  score_BKXS = jnp.einsum("BKXH,BSKH->BKXS", _together(q_BTNH, K), k_BSKH,
                          preferred_element_type=jnp.float32)
  return jnp.where(mask_BKXS, score_BKXS * H**-0.5, _MASKED), mask_BKXS


def _together(x_BTNH: jax.Array, K: int) -> jax.Array:
  """[B, T, N, H] -> [B, K, X, H], where X is the times and the heads of a group."""
  # Keys and values are therefore not repeated for the query heads that share them.
  B, T, N, H = x_BTNH.shape
  return x_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)


def _apart(x_BKXH: jax.Array, N: int) -> jax.Array:
  """[B, K, X, H] -> [B, T, N, H]: the inverse of `_together`."""
  B, K, X, H = x_BKXH.shape
  return x_BKXH.reshape(B, K, -1, N // K, H).swapaxes(1, 2).reshape(B, -1, N, H)


def cudnn_reads(implementation: str, cache_dtype: jax.typing.DTypeLike,
                dtype: jax.typing.DTypeLike) -> bool:
  """Whether `cached` reads a cache of one type for queries of another by cuDNN's kernel."""
  return (implementation in ("cudnn", "cudnn_packed")
          and jnp.dtype(cache_dtype) == jnp.dtype(dtype))


def cached(implementation: str, q_BTNH: jax.Array, k: jax.Array, v: jax.Array,
           k_scale_BKS: jax.Array | None, v_scale_BKS: jax.Array | None,
           axes: tuple[str, str], mask_BTS: jax.Array, length_B: jax.Array) -> jax.Array:
  """`attention` to the keys and values of a cache.

  Args:
    implementation: what `choose` returned. cuDNN reads a cache in the queries' type; all else are
      two plain products.
    q_BTNH: queries.
    k, v: keys and values, whose axes have the letters `axes`.
    k_scale_BKS, v_scale_BKS: the scales of an int8 cache, else None.
    mask_BTS: true where query t may read slot s; its first axis may be 1.
    length_B: number of slots that each row's last query reads.
  """
  T, N, H = q_BTNH.shape[1:]
  K = v.shape[axes[1].index("K")]
  dtype = q_BTNH.dtype
  if cudnn_reads(implementation, k.dtype, dtype):
    # One query stops at its row's length. The queries of a prompt's chunk need a mask: the kernel's
    # causal one would begin at slot 0.
    return cudnn(q_BTNH, k, v, None if T == 1 else mask_BTS, length_B)
  q_BKXH = _together(q_BTNH, K)
  k = k.astype(dtype)
  # One query as a sum instead of a product: a CPU then reads the keys in half the time.
  if T == 1 and axes[0] == "BKHS":
    score_BKXS = jnp.sum(q_BKXH[..., None].astype(jnp.float32)
                         * k[:, :, None].astype(jnp.float32), axis=3) * H**-0.5
  else:
    score_BKXS = jnp.einsum(f"BKXH,{axes[0]}->BKXS", q_BKXH, k,
                            preferred_element_type=jnp.float32) * H**-0.5
  # The scales multiply scores and shares, which are fewer numbers than keys and values.
  if k_scale_BKS is not None:
    score_BKXS = score_BKXS * k_scale_BKS[:, :, None]
  mask_BKXS = jnp.repeat(mask_BTS, N // K, axis=1)[:, None]
  share_BKXS = jax.nn.softmax(jnp.where(mask_BKXS, score_BKXS, _MASKED), axis=-1)
  if v_scale_BKS is not None:
    share_BKXS = share_BKXS * v_scale_BKS[:, :, None]
  return _apart(jnp.einsum(f"BKXS,{axes[1]}->BKXH", share_BKXS.astype(dtype), v.astype(dtype)), N)


def causal(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array,
           mask_BTT: jax.Array) -> jax.Array:
  """`attention` of whole sequences, one piece of the queries at a time."""
  # A piece reads no key after its end, which saves almost half of the products. More than 8 pieces
  # would lengthen the program and save little.
  T = q_BTNH.shape[1]
  size = max(PIECE, -(-T // 8))
  pieces = []
  for start in range(0, T, size):
    end = min(start + size, T)
    pieces.append(_piece(
        q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end], mask_BTT[:, start:end, :end]))
  return jnp.concatenate(pieces, axis=1)


# Scores are computed again in the backward pass, from their log-sum, in plain products
# (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
@jax.custom_vjp
def _piece(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
           mask_BTS: jax.Array) -> jax.Array:
  return _piece_fwd(q_BTNH, k_BSKH, v_BSKH, mask_BTS)[0]


def _piece_fwd(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
               mask_BTS: jax.Array) -> tuple[jax.Array, tuple]:
  score_BKXS, _ = _scores(q_BTNH, k_BSKH, mask_BTS)
  top_BKX1 = jnp.max(score_BKXS, axis=-1, keepdims=True)
  share_BKXS = jnp.exp(score_BKXS - top_BKX1)
  sum_BKX1 = jnp.sum(share_BKXS, axis=-1, keepdims=True)
  out_BKXH = jnp.einsum("BKXS,BSKH->BKXH", share_BKXS.astype(v_BSKH.dtype), v_BSKH,
                        preferred_element_type=jnp.float32) / sum_BKX1
  out_BTNH = _apart(out_BKXH.astype(v_BSKH.dtype), q_BTNH.shape[2])
  out_BTNH, log_sum_BKX1 = (
      checkpoint_name(x, RESULT) for x in (out_BTNH, top_BKX1 + jnp.log(sum_BKX1)))
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, mask_BTS, out_BTNH, log_sum_BKX1)


def _piece_bwd(saved: tuple, dout_BTNH: jax.Array) -> tuple[jax.Array | None, ...]:
  q_BTNH, k_BSKH, v_BSKH, mask_BTS, out_BTNH, log_sum_BKX1 = saved
  N, H = q_BTNH.shape[2:]
  K = k_BSKH.shape[2]
  dtype = q_BTNH.dtype
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  score_BKXS, mask_BKXS = _scores(q_BTNH, k_BSKH, mask_BTS)
  share_BKXS = jnp.where(mask_BKXS, jnp.exp(score_BKXS - log_sum_BKX1), 0.0)
  dout_BKXH = _together(dout_BTNH, K)
  # Σ_s share_s dshare_s, the term that a softmax subtracts in its gradient, is dout · out.
  mean_BKX1 = jnp.sum(dout_BKXH.astype(jnp.float32) * _together(out_BTNH, K).astype(jnp.float32),
                      axis=-1, keepdims=True)
  dshare_BKXS = product("BKXH,BSKH->BKXS", dout_BKXH, v_BSKH)
  dscore_BKXS = (share_BKXS * (dshare_BKXS - mean_BKX1) * H**-0.5).astype(dtype)
  dv_BSKH = product("BKXS,BKXH->BSKH", share_BKXS.astype(dtype), dout_BKXH)
  dk_BSKH = product("BKXS,BKXH->BSKH", dscore_BKXS, _together(q_BTNH, K))
  dq_BTNH = _apart(product("BKXS,BSKH->BKXH", dscore_BKXS, k_BSKH), N)
  return dq_BTNH.astype(dtype), dk_BSKH.astype(dtype), dv_BSKH.astype(dtype), None


_piece.defvjp(_piece_fwd, _piece_bwd)


def cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None,
          length_B: jax.Array | None = None, implementation: str = "cudnn") -> jax.Array:
  """`attention` by `jax.nn.dot_product_attention`, by a mask or by lengths.

  Args:
    q_BTNH, k_BSKH, v_BSKH: queries, keys and values.
    mask_BTS: true where query t may read key s; its first axis may be 1.
    length_B: without a mask, the number of each row's keys. One query reads them all. More queries
      are the keys' own tokens and read those not later; the output of those beyond is 0.
    implementation: the argument of `jax.nn.dot_product_attention`.
  """
  T, N = q_BTNH.shape[1:3]
  R = N // k_BSKH.shape[2]

  # The kernel has gradients for even lengths only.
  def even(x: jax.Array, *axes: int) -> jax.Array:
    return jnp.pad(x, [(0, x.shape[axis] % 2 if axis in axes else 0) for axis in range(x.ndim)])

  def local(index, q_BTNH, k_BSKH, v_BSKH, reads):
    k_BSKH, v_BSKH = _own_key_heads(index, q_BTNH.shape[2], R, k_BSKH, v_BSKH)
    if mask_BTS is not None:
      return jax.nn.dot_product_attention(
          even(q_BTNH, 1), even(k_BSKH, 1), even(v_BSKH, 1), mask=even(reads, 1, 2)[:, None],
          implementation=implementation)[:, :T]
    # A length of 0 is an error in some versions of cuDNN. A row of padding then reads one token,
    # whose output has no weight.
    length_B = jnp.maximum(reads, 1)
    # A single query of a cache has no gradient; more queries are the keys' own tokens.
    if T > 1:
      q_BTNH, k_BSKH, v_BSKH = (even(x, 1) for x in (q_BTNH, k_BSKH, v_BSKH))
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, is_causal=T > 1, query_seq_lengths=jnp.minimum(length_B, T),
        key_value_seq_lengths=length_B, implementation=implementation)[:, :T]

  reads, names = mask_BTS, ("batch", "time", "cache")
  if mask_BTS is None:
    reads, names = length_B, ("batch",)
  return sharding.per_head_shard(local, (q_BTNH, k_BSKH, v_BSKH, reads), (*_QKV_AXES, names))


def splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array,
           interpret: bool = False) -> jax.Array:
  """`attention` by JAX's splash kernel: causal in segments, tokens in the order of positions."""
  T, N, H = q_BTNH.shape[1:]
  R = N // k_BTKH.shape[2]
  padding = -T % _LANES
  def local(index, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    k_BTKH, v_BTKH = _own_key_heads(index, q_BTNH.shape[2], R, k_BTKH, v_BTKH)
    padded = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
              for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)]
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
    out_BNTH = jax.vmap(_splash_kernel(q_BTNH.shape[2], T + padding, interpret))(
        *padded, splash_attention.SegmentIds(segments_BT, segments_BT))
    return out_BNTH.swapaxes(1, 2)[:, :T]

  return sharding.per_head_shard(local, (q_BTNH, k_BTKH, v_BTKH, segments_BT),
                                 (*_QKV_AXES, ("batch", "time")))


_QKV_AXES = (("batch", "time", "heads", "head"), ("batch", "cache", "kv_heads", "head"),
             ("batch", "cache", "kv_heads", "head"))


def _own_key_heads(index: jax.Array | int, heads: int, R: int, *xs: jax.Array) -> tuple:
  """Keys and values for the query heads of device `index`, where R share a key head.

  `heads` is the number of the device's query heads.
  """
  if heads == xs[0].shape[2] * R:
    return xs
  # `tensor` does not divide the key heads, so every device holds them all. It takes one for each
  # group of R of its query heads, or one for all of them; if groups are split between devices, one
  # for each query head.
  count = heads if heads % R and R % heads else max(1, heads // R)
  key_heads = (index * heads + jnp.arange(count) * (heads // count)) // R
  return tuple(jnp.take(x, key_heads, axis=2) for x in xs)


def _splash_kernel(heads: int, tokens: int, interpret: bool) -> Callable[..., jax.Array]:
  """The splash kernel for numbers of query heads and tokens, in the largest tiles that fit."""
  tile = next(size for size in (512, 256, _LANES) if tokens % size == 0)
  names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
           "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
  sizes = splash_attention.BlockSizes(**dict.fromkeys(names, tile))
  mask = splash_attention.MultiHeadMask(
      [splash_attention.CausalMask((tokens, tokens)) for _ in range(heads)])
  return splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                          residual_checkpoint_name=RESULT, interpret=interpret)
