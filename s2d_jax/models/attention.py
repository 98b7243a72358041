"""Attention: one function, several implementations. Letters as in `decoder.py`.

  xla      two batched products and a softmax; every backend, every mask: the reference
  causal   the same in pieces of the queries, each with the keys before its end; scores are not kept
  cudnn    `jax.nn.dot_product_attention` on NVIDIA GPUs, in bfloat16
  splash   JAX's Pallas kernel on TPUs

All are for whole sequences: queries and keys are the same tokens, in the order of their positions
(`xla` takes any others). The scores of `xla` are [B, N, T, S]; the others never hold them all.
`cached` and `paged` are for queries after what a cache holds. None of them repeats keys or values
for the query heads that share them (on a mesh the kernels do, for a device's own heads, where
groups of heads straddle devices).
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import paged_attention as tpu_pages
from jax.experimental.pallas.ops.tpu import splash_attention

from s2d_jax import sharding

IMPLEMENTATIONS = ("auto", "xla", "causal", "cudnn", "splash")
NEEDS = {"cudnn": "gpu", "splash": "tpu"}  # the backend that an implementation is for
# Finite, so that a row with every score masked has a softmax (uniform) and a gradient (zero).
MASKED = float(jnp.finfo(jnp.float32).min)
LANES = 128  # splash wants tiles of that many tokens
PAGES = 8  # a row's table is a multiple of so many pages, which a kernel reads together
PIECE = 128  # `causal` takes that many queries at a time, or more, so that there are eight at most


class Reading(NamedTuple):
  """Which query may read which key, in the form that the implementation `how` takes."""
  segments_BT: jax.Array | None
  mask_BTS: jax.Array | None  # None: causal within a segment, which `splash` works out by itself
  table_Bn: jax.Array | None = None  # the pages of each row, where the cache has some


def choose(asked, dtype, head_width):
  """The implementation that config.attention means here: "auto" is the backend's own.

  "auto" is `causal` on a CPU, and where the GPU kernel does not take the activations' type or the
  head.

  Raises:
    ValueError: the backend is not the one that is asked for.
  """
  platform = sharding.platform()
  if NEEDS.get(asked, platform) != platform:
    raise ValueError(f"attention {asked!r} needs a {NEEDS[asked]} and this is a {platform}: set it "
                     "to auto.")
  if asked != "auto":
    return asked
  if platform == "gpu" and dtype == "bfloat16" and head_width % 8 == 0 and head_width <= 128:
    return "cudnn"
  return "splash" if platform == "tpu" else "causal"


def reading(how, positions_BT, segments_BT):
  """The Reading of whole sequences, of tokens with these positions and segments."""
  mask_BTT = None
  if how != "splash":
    mask_BTT = visible(positions_BT, segments_BT, positions_BT, segments_BT)
  return Reading(segments_BT, mask_BTT)


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
    how: one of IMPLEMENTATIONS that `choose` gave; reads: the Reading made for it.
  """
  if how == "splash":
    return splash(q_BTNH, k_BSKH, v_BSKH, reads.segments_BT)
  if how == "cudnn":
    return cudnn(q_BTNH, k_BSKH, v_BSKH, reads.mask_BTS)
  if how == "causal":
    return causal(q_BTNH, k_BSKH, v_BSKH, reads.mask_BTS)
  return xla(q_BTNH, k_BSKH, v_BSKH, reads.mask_BTS)


def xla(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
  """`attention` as two plain batched products."""
  score_BKXS, _ = _scores(q_BTNH, k_BSKH, mask_BTS)
  share_BKXS = jax.nn.softmax(score_BKXS, axis=-1).astype(v_BSKH.dtype)
  return _apart(jnp.einsum("BKXS,BSKH->BKXH", share_BKXS, v_BSKH), q_BTNH.shape[2])


def _scores(q_BTNH, k_BSKH, mask_BTS):
  """(q·k / √H, or MASKED, of every query and key; the mask), float32, [B, K, X, S].

  Times and the R heads of a group are one axis, X: two plain batched products, twice as fast on CPU
  as the same einsums with the axes apart.
  """
  K = k_BSKH.shape[2]
  (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
  mask_BKXS = jnp.broadcast_to(
      mask_BTS[:, None, :, None], (B, K, T, N // K, S)).reshape(B, K, -1, S)
  score_BKXS = jnp.einsum("BKXH,BSKH->BKXS", _together(q_BTNH, K), k_BSKH,
                          preferred_element_type=jnp.float32)
  return jnp.where(mask_BKXS, score_BKXS * H**-0.5, MASKED), mask_BKXS


def _together(x_BTNH, K):
  B, T, N, H = x_BTNH.shape
  return x_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)


def _apart(x_BKXH, N):
  B, K, X, H = x_BKXH.shape
  return x_BKXH.reshape(B, K, -1, N // K, H).swapaxes(1, 2).reshape(B, -1, N, H)


def cached(q_BTNH, k_BKHS, v_BKSH, k_scale_BKS, v_scale_BKS, mask_BTS):
  """`xla` of a cache, whose keys and values lie as the products read them.

  The scales of an int8 cache multiply scores and shares, not keys and values.
  """
  (T, N, H), K, dtype = q_BTNH.shape[1:], v_BKSH.shape[1], q_BTNH.dtype
  q_BKXH, k_BKHS = _together(q_BTNH, K), k_BKHS.astype(dtype)
  if T == 1 and sharding.platform() == "cpu":  # as a sum it reads the keys in half the time
    score_BKXS = jnp.sum(q_BKXH[..., None].astype(jnp.float32)
                         * k_BKHS[:, :, None].astype(jnp.float32), axis=3) * H**-0.5
  else:
    score_BKXS = jnp.einsum("BKXH,BKHS->BKXS", q_BKXH, k_BKHS,
                            preferred_element_type=jnp.float32) * H**-0.5
  if k_scale_BKS is not None:
    score_BKXS = score_BKXS * k_scale_BKS[:, :, None]
  mask_BKXS = jnp.repeat(mask_BTS, N // K, axis=1)[:, None]
  share_BKXS = jax.nn.softmax(jnp.where(mask_BKXS, score_BKXS, MASKED), axis=-1)
  if v_scale_BKS is not None:
    share_BKXS = share_BKXS * v_scale_BKS[:, :, None]
  return _apart(jnp.einsum("BKXS,BKSH->BKXH", share_BKXS.astype(dtype), v_BKSH.astype(dtype)), N)


def table_size(pages):
  """Entries of the table of a row that holds so many pages: PAGES times 1, 2, 4 or a multiple of 8.

  The GPU's kernel reads a table in PAGES parts, and a part so many pages at a time.
  """
  part = -(-pages // PAGES)
  return PAGES * next((size for size in (1, 2, 4) if part <= size), -(-part // 8) * 8)


def paged(q_B1NH, k_B1KH, v_B1KH, k_KNSH, v_KNSH, table_Bn, at_B, how=None):
  """One token more of each row, written to its page and read with what is before it.

  Returns (out_B1NH, k_KNSH, v_KNSH). Each device has its own rows, heads and pages. `how` is for
  tests: the kernel of "tpu" or "gpu", interpreted; by default the backend's own, and on a CPU the
  reference, which copies a row's pages to lie side by side.
  """
  S = k_KNSH.shape[2]

  def local(q_B1NH, k_B1KH, v_B1KH, k_KNSH, v_KNSH, table_Bn, at_B):
    page_B = jnp.take_along_axis(table_Bn, at_B[:, None] // S, axis=1)[:, 0]
    def put(pages, new_B1KH):
      new_KBH = new_B1KH[:, 0].swapaxes(0, 1)
      return pages.at[:, page_B, at_B % S].set(new_KBH.astype(pages.dtype))
    k_KNSH, v_KNSH = put(k_KNSH, k_B1KH), put(v_KNSH, v_B1KH)
    kernel = how or sharding.platform()
    if kernel == "tpu" and k_KNSH.dtype != jnp.bfloat16:  # it would multiply in that all the same
      kernel = None
    read = {"tpu": _paged_tpu, "gpu": _paged_gpu}.get(kernel, _paged_reference)
    out_BNH = read(q_B1NH[:, 0], k_KNSH, v_KNSH, table_Bn, at_B + 1, how is not None)
    return out_BNH.astype(v_B1KH.dtype)[:, None], k_KNSH, v_KNSH

  rows = ("batch", "time", "heads", "head"), *(("batch", "time", "kv_heads", "head"),) * 2
  pages = (("kv_heads", "pages", "cache", "head"),) * 2
  return sharding.on_parts(
      local, (q_B1NH, k_B1KH, v_B1KH, k_KNSH, v_KNSH, table_Bn, at_B),
      (*rows, *pages, ("batch", "cache"), ("batch",)), (0, 3, 4))


def _paged_reference(q_BNH, k_KNSH, v_KNSH, table_Bn, length_B, interpret):
  del interpret
  def side_by_side(pages_KNSH):
    K, _, S, H = pages_KNSH.shape
    return pages_KNSH[:, table_Bn].swapaxes(0, 1).reshape(len(table_Bn), K, -1, H)
  k_BKSH, v_BKSH = side_by_side(k_KNSH), side_by_side(v_KNSH)
  mask_B1S = (jnp.arange(k_BKSH.shape[2])[None] < length_B[:, None])[:, None]
  return cached(q_BNH[:, None], k_BKSH.swapaxes(2, 3), v_BKSH, None, None, mask_B1S)[:, 0]


def _paged_tpu(q_BNH, k_KNSH, v_KNSH, table_Bn, length_B, interpret):
  interpreted = pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext()
  with interpreted, jax.numpy_dtype_promotion("standard"):  # the kernel mixes types
    return tpu_pages.paged_attention(
        q_BNH * q_BNH.shape[-1] ** -0.5, k_KNSH, v_KNSH, length_B, table_Bn,
        pages_per_compute_block=PAGES)


@functools.cache
def _gpu_kernel() -> Callable:
  """`paged_attention` of JAX's GPU kernels, imported at the first use.

  JAX 0.12 deprecates the module and names no successor, so a later one may lack it.

  Raises:
    ImportError: this JAX has no such module.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
      from jax.experimental.pallas.ops.gpu import paged_attention as gpu_pages
    except ImportError as error:
      raise ImportError(
          f"jax {jax.__version__} has no jax.experimental.pallas.ops.gpu.paged_attention, which "
          "reads a cache in pages on a GPU: install the jax of constraints.txt, or set "
          "the sampler's page to 0.") from error
  return gpu_pages.paged_attention


def _paged_gpu(q_BNH, k_KNSH, v_KNSH, table_Bn, length_B, interpret):
  return _gpu_kernel()(
      q_BNH * q_BNH.shape[-1] ** -0.5, k_KNSH, v_KNSH, table_Bn, length_B, k_splits=PAGES,
      interpret=interpret)


def causal(q_BTNH, k_BTKH, v_BTKH, mask_BTT):
  """`attention` of whole sequences, a piece of the queries at a time.

  A piece never sees the keys after its end, and its scores are made again on the way back from
  their log-sum (Dao et al. 2022, https://arxiv.org/abs/2205.14135, in plain products).
  """
  T = q_BTNH.shape[1]
  size = max(PIECE, -(-T // 8))
  ends = [*range(size, T, size), T]
  return jnp.concatenate([
      _piece(q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end], mask_BTT[:, start:end, :end])
      for start, end in zip([0, *ends], ends, strict=False)], axis=1)


@jax.custom_vjp
def _piece(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
  return _piece_forth(q_BTNH, k_BSKH, v_BSKH, mask_BTS)[0]


def _piece_forth(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
  score_BKXS, _ = _scores(q_BTNH, k_BSKH, mask_BTS)
  top_BKX1 = jnp.max(score_BKXS, axis=-1, keepdims=True)
  share_BKXS = jnp.exp(score_BKXS - top_BKX1)
  sum_BKX1 = jnp.sum(share_BKXS, axis=-1, keepdims=True)
  out_BKXH = jnp.einsum("BKXS,BSKH->BKXH", share_BKXS.astype(v_BSKH.dtype), v_BSKH,
                        preferred_element_type=jnp.float32) / sum_BKX1
  out_BTNH = _apart(out_BKXH.astype(v_BSKH.dtype), q_BTNH.shape[2])
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, mask_BTS, out_BTNH, top_BKX1 + jnp.log(sum_BKX1))


def _piece_back(saved, dout_BTNH):
  q_BTNH, k_BSKH, v_BSKH, mask_BTS, out_BTNH, log_sum_BKX1 = saved
  N, K, H = q_BTNH.shape[2], k_BSKH.shape[2], q_BTNH.shape[3]
  dtype, product = q_BTNH.dtype, functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  score_BKXS, mask_BKXS = _scores(q_BTNH, k_BSKH, mask_BTS)
  share_BKXS = jnp.where(mask_BKXS, jnp.exp(score_BKXS - log_sum_BKX1), 0.0)
  dout_BKXH = _together(dout_BTNH, K)
  mean_BKX1 = jnp.sum(dout_BKXH.astype(jnp.float32) * _together(out_BTNH, K).astype(jnp.float32),
                      axis=-1, keepdims=True)
  dshare_BKXS = product("BKXH,BSKH->BKXS", dout_BKXH, v_BSKH)
  dscore_BKXS = (share_BKXS * (dshare_BKXS - mean_BKX1) * H**-0.5).astype(dtype)
  dv_BSKH = product("BKXS,BKXH->BSKH", share_BKXS.astype(dtype), dout_BKXH)
  dk_BSKH = product("BKXS,BKXH->BSKH", dscore_BKXS, _together(q_BTNH, K))
  dq_BTNH = _apart(product("BKXS,BSKH->BKXH", dscore_BKXS, k_BSKH), N)
  return dq_BTNH.astype(dtype), dk_BSKH.astype(dtype), dv_BSKH.astype(dtype), None


_piece.defvjp(_piece_forth, _piece_back)


def cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, implementation="cudnn"):
  """`attention` by `jax.nn.dot_product_attention`, which trains on even lengths alone."""
  T, R = q_BTNH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2]
  def even(x, *axes):
    return jnp.pad(x, [(0, x.shape[at] % 2 if at in axes else 0) for at in range(x.ndim)])

  def local(at, q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    k_BSKH, v_BSKH = _own(at, q_BTNH.shape[2], R, k_BSKH, v_BSKH)
    return jax.nn.dot_product_attention(
        even(q_BTNH, 1), even(k_BSKH, 1), even(v_BSKH, 1), mask=even(mask_BTS, 1, 2)[:, None],
        implementation=implementation)[:, :T]

  return sharding.on_shards(local, "heads", (q_BTNH, k_BSKH, v_BSKH, mask_BTS),
                            (*HEADS, ("batch", "time", "cache")))


def splash(q_BTNH, k_BTKH, v_BTKH, segments_BT, interpret=False):
  """`attention` by JAX's splash kernel: causal in segments, tokens in the order of positions."""
  T, N, H = q_BTNH.shape[1:]
  R, more = N // k_BTKH.shape[2], -T % LANES

  def local(at, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    k_BTKH, v_BTKH = _own(at, q_BTNH.shape[2], R, k_BTKH, v_BTKH)
    padded = [jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
              for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)]
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more)))
    out_BNTH = jax.vmap(_kernel(q_BTNH.shape[2], T + more, interpret))(
        *padded, splash_attention.SegmentIds(segments_BT, segments_BT))
    return out_BNTH.swapaxes(1, 2)[:, :T]

  return sharding.on_shards(local, "heads", (q_BTNH, k_BTKH, v_BTKH, segments_BT),
                            (*HEADS, ("batch", "time")))


HEADS = (("batch", "time", "heads", "head"), *(("batch", "cache", "kv_heads", "head"),) * 2)


def _own(at, own, R, *xs):
  """The key heads of the `own` query heads that device `at` has, R to a key head.

  Each device runs a kernel on its own rows and heads. Where `tensor` does not divide the key heads
  every device holds them all, and takes one for R of its query heads, or for all of them; or, where
  the groups straddle devices, one for each.
  """
  if own == xs[0].shape[2] * R:
    return xs
  wanted = own if own % R and R % own else max(1, own // R)
  heads = (at * own + jnp.arange(wanted) * (own // wanted)) // R
  return tuple(jnp.take(x, heads, axis=2) for x in xs)


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
