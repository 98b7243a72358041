"""Attention to a cache in pages, by JAX's kernels on TPU and GPU. Letters as in `decoder.py`."""

import contextlib
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import paged_attention as tpu_pages

from s2d_jax import sharding
from s2d_jax.models import attention

_PAGES = 8  # pages that a kernel reads together; a row's table is a multiple of them


def table_size(pages: int) -> int:
  """Entries of a row's table for `pages` pages: _PAGES times 1, 2, 4 or a multiple of 8."""
  # The GPU's kernel reads a table in _PAGES parts, and a part in blocks of 1, 2, 4 or 8 pages.
  part = -(-pages // _PAGES)
  return _PAGES * next((size for size in (1, 2, 4) if part <= size), -(-part // 8) * 8)


def paged(q_B1NH: jax.Array, k_B1KH: jax.Array, v_B1KH: jax.Array, k_KNSH: jax.Array,
          v_KNSH: jax.Array, table_Bn: jax.Array, position_B: jax.Array,
          kernel: str | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Writes the next token of each row to its page, and attends to it and all before it.

  Each device has its own rows, heads and pages.

  Args:
    q_B1NH, k_B1KH, v_B1KH: queries, keys and values of the tokens.
    k_KNSH, v_KNSH: keys and values in N pages of S tokens.
    table_Bn: the numbers of each row's pages, in order.
    position_B: the tokens' positions.
    kernel: for tests, "tpu" or "gpu", which is then interpreted. None is the backend's own, and on
      a CPU the reference, which copies each row's pages to lie side by side.

  Returns:
    (out_B1NH, k_KNSH, v_KNSH), the pages with the tokens in them.
  """
  S = k_KNSH.shape[2]
  interpret = kernel is not None

  def local(q_B1NH, k_B1KH, v_B1KH, k_KNSH, v_KNSH, table_Bn, position_B):
    page_B = jnp.take_along_axis(table_Bn, position_B[:, None] // S, axis=1)[:, 0]
    def put(pages: jax.Array, new_B1KH: jax.Array) -> jax.Array:
      new_KBH = new_B1KH[:, 0].swapaxes(0, 1)
      # With the heads as an index too: a TPU would copy all pages for a write across them.
      heads_K1 = jnp.arange(len(pages))[:, None]
      return pages.at[heads_K1, page_B[None], position_B[None] % S].set(
          new_KBH.astype(pages.dtype))
    k_KNSH = put(k_KNSH, k_B1KH)
    v_KNSH = put(v_KNSH, v_B1KH)
    read = {"tpu": _paged_tpu, "gpu": _paged_gpu}.get(
        kernel or sharding.platform(), _paged_reference)
    # The TPU's kernel would multiply float32 pages in bfloat16 too.
    if read is _paged_tpu and k_KNSH.dtype != jnp.bfloat16:
      read = _paged_reference
    out_BNH = read(q_B1NH[:, 0], k_KNSH, v_KNSH, table_Bn, position_B + 1, interpret)
    return out_BNH.astype(v_B1KH.dtype)[:, None], k_KNSH, v_KNSH

  query = ("batch", "time", "heads", "head")
  key = ("batch", "time", "kv_heads", "head")
  pages = ("kv_heads", "pages", "cache", "head")
  return sharding.per_shard(
      local, (q_B1NH, k_B1KH, v_B1KH, k_KNSH, v_KNSH, table_Bn, position_B),
      (query, key, key, pages, pages, ("batch", "cache"), ("batch",)), (0, 3, 4))


def _paged_reference(q_BNH: jax.Array, k_KNSH: jax.Array, v_KNSH: jax.Array, table_Bn: jax.Array,
                     length_B: jax.Array, interpret: bool) -> jax.Array:
  del interpret
  def side_by_side(pages_KNSH: jax.Array) -> jax.Array:
    K, _, _, H = pages_KNSH.shape
    return pages_KNSH[:, table_Bn].swapaxes(0, 1).reshape(len(table_Bn), K, -1, H)
  k_BKSH = side_by_side(k_KNSH)
  v_BKSH = side_by_side(v_KNSH)
  mask_B1S = (jnp.arange(k_BKSH.shape[2])[None] < length_B[:, None])[:, None]
  return attention.cached("xla", q_BNH[:, None], k_BKSH.swapaxes(2, 3), v_BKSH, None, None,
                          ("BKHS", "BKSH"), mask_B1S, length_B)[:, 0]


def _paged_tpu(q_BNH: jax.Array, k_KNSH: jax.Array, v_KNSH: jax.Array, table_Bn: jax.Array,
               length_B: jax.Array, interpret: bool) -> jax.Array:
  interpreted = pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext()
  with interpreted, jax.numpy_dtype_promotion("standard"):  # the kernel mixes types
    return tpu_pages.paged_attention(
        q_BNH * q_BNH.shape[-1] ** -0.5, k_KNSH, v_KNSH, length_B, table_Bn,
        pages_per_compute_block=_PAGES)


@functools.cache
def _gpu_kernel() -> Callable:
  """`paged_attention` of JAX's GPU kernels; ImportError where this JAX has no such module."""
  # JAX 0.12 deprecates the module and names no successor, so a later one may lack it. It is
  # imported at the first use, so that everything else works without it.
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


def _paged_gpu(q_BNH: jax.Array, k_KNSH: jax.Array, v_KNSH: jax.Array, table_Bn: jax.Array,
               length_B: jax.Array, interpret: bool) -> jax.Array:
  return _gpu_kernel()(
      q_BNH * q_BNH.shape[-1] ** -0.5, k_KNSH, v_KNSH, table_Bn, length_B, k_splits=_PAGES,
      interpret=interpret)
