"""Attention against NumPy in float64, its implementations against each other, and its edges."""

import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import sharding
from s2d_jax.models import attention, paged


def random_inputs(B=2, T=3, S=5, N=4, K=2, H=6):
  rng = np.random.default_rng(0)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  return tuple(rng.normal(size=s).astype(np.float32) for s in shapes) + (
      rng.random((B, T, S)) < 0.6,)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_attention_equals_the_formula(K):
  q, k, v, mask = random_inputs(K=K)
  mask[:, :, 0] = True
  want = np.zeros(q.shape)
  for b, t, n in np.ndindex(*q.shape[:3]):
    key_head = n // (q.shape[2] // K)  # the key head this query head shares
    visible = np.flatnonzero(mask[b, t])
    share = np.exp(k[b, visible, key_head].astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[3]))
    want[b, t, n] = share / share.sum() @ v[b, visible, key_head]
  np.testing.assert_allclose(attention.xla(q, k, v, mask), want, atol=1e-6)


def test_a_query_with_nothing_to_read_is_finite_and_so_are_gradients():
  q, k, v, mask = random_inputs()
  mask[1] = False
  value, gradients = jax.value_and_grad(
      lambda *qkv: jnp.sum(attention.xla(*qkv, mask) ** 2), argnums=(0, 1, 2))(q, k, v)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in gradients)


def test_masked_keys_do_not_change_the_output():
  q, k, v, mask = random_inputs()
  mask[:, :, 0], mask[:, :, 3] = True, False
  changed = attention.xla(q, k + 0, v + 0, mask)
  k[:, 3], v[:, 3] = 50.0, -1e4
  np.testing.assert_array_equal(attention.xla(q, k, v, mask), changed)


def test_visible_by_hand():
  # Two segments of two tokens, then padding; the second query of segment 2 reads both its keys.
  positions, segments = np.array([[0, 1, 0, 1, 0]]), np.array([[1, 1, 2, 2, 0]])
  want = [[1, 0, 0, 0, 0],
          [1, 1, 0, 0, 0],
          [0, 0, 1, 0, 0],
          [0, 0, 1, 1, 0],
          [0, 0, 0, 0, 0]]
  got = attention.visible(positions, segments, positions, segments)
  np.testing.assert_array_equal(got[0], np.array(want, bool))


def test_bfloat16_stays_bfloat16_with_a_float32_softmax():
  q, k, v, mask = random_inputs()
  mask[:] = True
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  got = attention.xla(*half, mask)
  want = attention.xla(*(x.astype(jnp.float32) for x in half), mask)
  assert got.dtype == jnp.bfloat16
  # Two roundings of 2⁻⁹ relative, of shares and of the result, on values of order one.
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


def packed(K, B=2, T=150, N=4, H=64):
  """q, k, v, positions and segments of rows that hold two sequences, or one and padding."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
  segments = np.array([[1] * 60 + [2] * (T - 60), [0] * 20 + [1] * (T - 20)], np.int32)[:B]
  start = np.array([[0] * 60 + [60] * (T - 60), [0] * 20 + [20] * (T - 20)])[:B]
  return q, k, v, (np.arange(T) - start).astype(np.int32), segments


@pytest.mark.parametrize("piece", [40, 75, 128, 150])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_causal_equals_the_reference(K, piece, monkeypatch):
  # Pieces that do and do not divide the 150 tokens; a row's first 20 have nothing to read.
  monkeypatch.setattr(attention, "PIECE", piece)
  q, k, v, positions, segments = packed(K)
  mask = attention.visible(positions, segments, positions, segments)
  weight = np.random.default_rng(1).normal(size=q.shape) * (segments != 0)[..., None, None]
  def loss(attend):
    total = lambda *qkv: jnp.sum(attend(*qkv) * weight)
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
  want, got = (loss(lambda *qkv, attend=attend: attend(*qkv, mask))(q, k, v)
               for attend in (attention.xla, attention.causal))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), got, want)


def test_causal_is_finite_where_there_is_nothing_to_read_and_keeps_bfloat16():
  q, k, v, positions, segments = packed(2)
  mask = attention.visible(positions, segments, positions, segments)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  value, grads = jax.value_and_grad(
      lambda *qkv: jnp.sum(attention.causal(*qkv, mask).astype(jnp.float32) ** 2),
      argnums=(0, 1, 2))(*half)
  assert np.isfinite(value) and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
  assert all(np.isfinite(g.astype(jnp.float32)).all() for g in grads)
  np.testing.assert_allclose(attention.causal(*half, mask).astype(jnp.float32)[segments != 0],
                             attention.xla(q, k, v, mask)[segments != 0], atol=0.05)


def test_causal_saves_no_scores_for_the_backward_pass():
  # Of two layers' worth, the way back is given nothing with two axes of tokens.
  q, k, v, positions, segments = packed(2, T=192)
  mask = attention.visible(positions, segments, positions, segments)
  _, back = jax.vjp(lambda *qkv: attention.causal(*qkv, mask), q, k, v)
  assert not [x.shape for x in jax.tree.leaves(back)
              if x.ndim > 3 and sorted(x.shape)[-2] >= 128 and x.dtype == jnp.float32]


@pytest.mark.medium
@pytest.mark.parametrize("K", [1, 2, 4])
def test_interpreted_splash_equals_the_reference(K):
  q, k, v, positions, segments = packed(K)
  mask = attention.visible(positions, segments, positions, segments)
  weight = np.random.default_rng(1).normal(size=q.shape) * (segments != 0)[..., None, None]
  def loss(attend):
    total = lambda *qkv: jnp.sum(attend(*qkv) * weight)
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
  want = loss(lambda *qkv: attention.xla(*qkv, mask))(q, k, v)
  got = loss(lambda *qkv: attention.splash(*qkv, segments, interpret=True))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), got, want)


MESHES = pytest.mark.parametrize("shape, N, K", [
    ((2, 1, 2), 4, 1), ((2, 1, 2), 4, 2), ((2, 1, 2), 4, 4), ((1, 2, 4), 4, 1), ((1, 2, 4), 4, 2),
    ((1, 2, 4), 4, 4), ((1, 1, 2), 6, 3)])


@MESHES
@pytest.mark.medium
def test_cudnn_on_a_mesh_equals_the_reference_with_gradients(shape, N, K):
  q, k, v, positions, segments = packed(K, N=N, T=151)
  mask = attention.visible(positions, segments, positions, segments)
  weight = np.random.default_rng(1).normal(size=q.shape) * (segments != 0)[..., None, None]
  def loss(attend):
    total = lambda *qkv: jnp.sum(attend(*qkv) * weight)
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
  want = loss(lambda *qkv: attention.xla(*qkv, mask))(q, k, v)
  with jax.set_mesh(sharding.make_mesh(shape)):
    got = loss(lambda *qkv: attention.cudnn(*qkv, mask, implementation="xla"))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), got, want)


@MESHES
@pytest.mark.medium
def test_splash_on_a_mesh_reads_the_right_key_heads(shape, N, K):
  # Query heads over two or four devices; fewer key heads are then whole on each, and three key
  # heads of six have one whose queries are on two devices.
  q, k, v, positions, segments = packed(K, N=N)
  mask = attention.visible(positions, segments, positions, segments)
  want = attention.xla(q, k, v, mask)
  with jax.set_mesh(sharding.make_mesh(shape)):
    got = jax.jit(lambda *args: attention.splash(*args, interpret=True))(q, k, v, segments)
  real = segments != 0
  np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=1e-5)


@pytest.mark.parametrize("platform, dtype, width, want", [
    ("cpu", "float32", 64, "causal"), ("tpu", "bfloat16", 64, "splash"),
    ("gpu", "bfloat16", 128, "cudnn"), ("gpu", "bfloat16", 20, "causal"),
    ("gpu", "float32", 64, "causal")])
def test_auto_chooses_by_the_backend(platform, dtype, width, want, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  assert attention.choose("auto", dtype, width) == want
  assert attention.choose("xla", dtype, width) == "xla"
  for name, needs in (("splash", "tpu"), ("cudnn", "gpu"), ("cudnn_packed", "gpu")):
    if platform == needs:
      assert attention.choose(name, dtype, width) == name
    else:
      with pytest.raises(ValueError, match=f"attention '{name}' needs a {needs} and this is a "):
        attention.choose(name, dtype, width)


@pytest.mark.parametrize("axes", [("BKHS", "BKSH"), ("BSKH", "BSKH")])
@pytest.mark.parametrize("T", [1, 4])
def test_reading_a_cache_equals_the_reference(T, axes):
  # One query of keys whose last axis is the slots is a sum, all else are products.
  q, k, v, mask = random_inputs(B=3, T=T, S=9, N=8, K=2, H=6)
  def read(q, k_BSKH, v_BSKH, *scales):
    arrays = [np.einsum(f"BSKH->{letters}", x)
              for x, letters in zip((k_BSKH, v_BSKH), axes, strict=True)]
    return attention.cached("xla", q, *arrays, *scales, axes, mask, None)
  np.testing.assert_allclose(read(q, k, v, None, None), attention.xla(q, k, v, mask), atol=1e-6)
  # And an int8 one as the numbers it stands for.
  rng = np.random.default_rng(1)
  k8, v8 = rng.integers(-127, 128, (2, 3, 9, 2, 6)).astype(np.int8)
  scales = rng.uniform(0.005, 0.02, (2, 3, 2, 9)).astype(np.float32)
  whole = [x8 * scale.swapaxes(1, 2)[..., None]
           for x8, scale in zip((k8, v8), scales, strict=True)]
  np.testing.assert_allclose(read(q, k8, v8, *scales), attention.xla(q, *whole, mask), atol=1e-5)


@pytest.mark.parametrize("T, S", [(3, 5), (4, 6), (5, 5)])
def test_cudnn_equals_the_reference(T, S):
  # The function that calls cuDNN, in its XLA implementation, because the tests have no GPU.
  q, k, v, mask = random_inputs(T=T, S=S)
  mask[:, :, 0] = True
  got = attention.cudnn(q, k, v, mask, implementation="xla")
  np.testing.assert_allclose(got, attention.xla(q, k, v, mask), atol=1e-6)


def rows_of(length_B, T):
  """A mask and weights of causal rows that are one sequence, then padding."""
  segments = (np.arange(T) < np.array(length_B)[:, None]).astype(np.int32)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), segments.shape)
  return attention.visible(positions, segments, positions, segments), segments


@pytest.mark.parametrize("K, T", [(1, 6), (2, 7), (4, 7)])
def test_cudnn_by_lengths_equals_the_reference_with_gradients(K, T):
  # Rows of 5, 1, all and no tokens. The output of padding is 0 and has no gradient, even where a
  # loss counts it.
  q, k, v, _ = random_inputs(B=4, T=T, S=T, K=K)
  length_B = np.array([5, 1, T, 0], np.int32)
  mask, segments = rows_of(length_B, T)
  weight = np.random.default_rng(1).normal(size=q.shape)
  real = (segments != 0)[..., None, None]
  def grads(attend, weight):
    return jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv) * weight), (0, 1, 2))(q, k, v)
  attend = lambda *qkv: attention.cudnn(*qkv, None, length_B, implementation="xla")
  want = grads(lambda *qkv: attention.xla(*qkv, mask), weight * real)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               grads(attend, weight * real), want)
  out = np.asarray(attend(q, k, v))
  assert not out[0, 5:].any() and not out[1, 1:].any() and not out[3, 1:].any()
  counted = grads(attend, weight)[1]
  assert all(np.isfinite(g).all() for g in counted)
  assert not counted[0][0, 5:].any() and not counted[1][0, 5:].any()


def test_one_query_by_lengths_reads_that_many_keys():
  q, k, v, _ = random_inputs(B=3, T=1, S=9, N=8, K=2)
  length_B = np.array([1, 4, 9], np.int32)
  mask = (np.arange(9) < length_B[:, None])[:, None]
  want = attention.xla(q, k, v, mask)
  got = attention.cudnn(q, k, v, None, length_B, implementation="xla")
  np.testing.assert_allclose(got, want, atol=1e-6)


@MESHES
@pytest.mark.medium
def test_cudnn_by_lengths_on_a_mesh_equals_the_reference(shape, N, K):
  q, k, v, _, _ = packed(K, N=N, T=151)
  length_B = np.array([151, 40], np.int32)
  mask, segments = rows_of(length_B, 151)
  want = attention.xla(q, k, v, mask)
  with jax.set_mesh(sharding.make_mesh(shape)):
    got = jax.jit(lambda *args: attention.cudnn(
        *args[:3], None, args[3], implementation="xla"))(q, k, v, length_B)
  real = segments != 0
  np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=1e-5)


def test_which_rows_are_one_sequence_by_hand():
  segments = np.array([[1, 1, 1, 0], [2, 2, 2, 2], [0, 0, 0, 0],   # are
                       [1, 1, 2, 0], [0, 1, 1, 1], [1, 0, 1, 1]])  # are not
  np.testing.assert_array_equal(attention.one_sequence(segments), [1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize("attend", [attention.xla, attention._piece])
def test_keys_and_values_are_not_repeated_for_the_query_heads(attend):
  # Of 13 keys with heads of 6, in two heads: no array of the program or of its gradient, in any
  # order of axes, holds both for more than the two.
  q, k, v, mask = random_inputs(B=3, T=5, S=13, N=8, K=2, H=6)
  grad = jax.jit(jax.grad(lambda *qkv: jnp.sum(attend(*qkv, mask) ** 2), argnums=(0, 1, 2)))
  text = grad.lower(q, k, v).compile().as_text()
  shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
  held = [shape for shape in shapes if 13 in shape and 6 in shape]
  assert held and max(map(math.prod, held)) == 3 * 13 * 2 * 6


def test_table_sizes_suit_the_kernels():
  # The GPU's wants eight parts, each in blocks of up to eight pages, and of a power of two.
  for pages in range(1, 700):
    part, remainder = divmod(paged.table_size(pages), 8)
    block = min(part, 8)
    assert not remainder and not part % block and not block & (block - 1)
    assert pages <= 8 * part < pages + 64
  assert [paged.table_size(pages) for pages in (1, 9, 17, 33, 65, 608)] == [8, 16, 32, 64, 128,
                                                                              640]


@pytest.mark.medium
@pytest.mark.parametrize("kernel, dtype, most", [
    (None, "float32", 8), ("gpu", "float32", 8), ("gpu", "float32", 25), ("tpu", "bfloat16", 8),
    ("tpu", "bfloat16", 25)])
def test_pages_are_read_in_the_order_of_the_table(kernel, dtype, most):
  # Rows of 6, 41 and 128 tokens in scattered pages of 16, with tables for `most` pages or more, are
  # compared with contiguous rows. The kernels are interpreted.
  rng = np.random.default_rng(0)
  B, N, K, H, S, n = 3, 4, 2, 128, 16, paged.table_size(most)
  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)
  q, k, v = normal(B, 1, N, H), normal(B, 1, K, H), normal(B, 1, K, H)
  pages = normal(2, K, 6 + B * n, S, H)
  table = jnp.asarray(rng.permutation(np.arange(1, 1 + B * n)).reshape(B, n), jnp.int32)
  at = jnp.asarray([5, 40, 127], jnp.int32)
  out, *written = paged.paged(q, k, v, *pages, table, at, kernel=kernel)
  whole = [np.asarray(x, np.float64)[:, np.asarray(table)].swapaxes(0, 1).reshape(B, K, n * S, H)
           .swapaxes(1, 2) for x in pages]
  for x, new in zip(whole, (k, v), strict=True):
    x[np.arange(B), np.asarray(at)] = np.asarray(new, np.float64)[:, 0]
  mask = (np.arange(n * S)[None] <= np.asarray(at)[:, None])[:, None]
  want = attention.xla(*(jnp.asarray(x, jnp.float32) for x in (q, *whole)), mask)
  np.testing.assert_allclose(np.asarray(out, np.float32), want,
                             atol=2e-2 if dtype == "bfloat16" else 1e-5)
  for x, old, new in zip(written, pages, (k, v), strict=True):
    changed = np.asarray(x != old).any(axis=(0, 3))
    slots = {(int(table[b, at[b] // S]), int(at[b] % S)) for b in range(B)}
    assert set(zip(*np.nonzero(changed), strict=True)) == slots
    for b in range(B):
      np.testing.assert_array_equal(x[:, table[b, at[b] // S], at[b] % S], new[b, 0])


IMPORT_ALL = """
import importlib, pkgutil, s2d_jax
for module in pkgutil.walk_packages(s2d_jax.__path__, "s2d_jax."):
  if not module.name.endswith("__main__"):
    importlib.import_module(module.name)
"""


def test_importing_every_module_raises_no_warning():
  # In a process of its own: here pytest has imported most of them already.
  found = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT_ALL],
                         env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                         capture_output=True, text=True)
  assert found.returncode == 0, found.stderr


def test_a_jax_without_the_gpu_kernel_is_named_where_it_is_used(monkeypatch):
  monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.gpu.paged_attention", None)
  monkeypatch.delattr("jax.experimental.pallas.ops.gpu.paged_attention", raising=False)
  paged._gpu_kernel.cache_clear()
  with pytest.raises(ImportError, match="has no .*paged_attention.*constraints.txt"):
    paged._gpu_kernel()
