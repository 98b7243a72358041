"""Attention against NumPy in float64, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax.models import attention


def draws(B=2, T=3, S=5, N=4, K=2, H=6):
  rng = np.random.default_rng(0)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  return tuple(rng.normal(size=s).astype(np.float32) for s in shapes) + (
      rng.random((B, T, S)) < 0.6,)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_attention_is_the_formula(K):
  q, k, v, mask = draws(K=K)
  mask[:, :, 0] = True
  want = np.zeros(q.shape)
  for b, t, n in np.ndindex(*q.shape[:3]):
    own = n // (q.shape[2] // K)  # the key head this query head shares
    seen = np.flatnonzero(mask[b, t])
    share = np.exp(k[b, seen, own].astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[3]))
    want[b, t, n] = share / share.sum() @ v[b, seen, own]
  np.testing.assert_allclose(attention.attention(q, k, v, mask), want, atol=1e-6)


def test_a_query_with_nothing_to_read_is_finite_and_so_are_gradients():
  q, k, v, mask = draws()
  mask[1] = False
  value, gradients = jax.value_and_grad(
      lambda *qkv: jnp.sum(attention.attention(*qkv, mask) ** 2), argnums=(0, 1, 2))(q, k, v)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in gradients)


def test_what_is_masked_does_not_matter():
  q, k, v, mask = draws()
  mask[:, :, 0], mask[:, :, 3] = True, False
  changed = attention.attention(q, k + 0, v + 0, mask)
  k[:, 3], v[:, 3] = 50.0, -1e4
  np.testing.assert_array_equal(attention.attention(q, k, v, mask), changed)


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


def test_bfloat16_keeps_its_type_and_a_float32_softmax():
  q, k, v, mask = draws()
  mask[:] = True
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  got = attention.attention(*half, mask)
  want = attention.attention(*(x.astype(jnp.float32) for x in half), mask)
  assert got.dtype == jnp.bfloat16
  # Two roundings of 2⁻⁹ relative, of shares and of the result, on values of order one.
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)
