"""Writes to a cache, in both orders of its axes, against a loop over rows in NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import sharding
from s2d_jax.models import caches

B, K, S, H = 3, 2, 9, 4


def random_cache(monkeypatch, platform, dtype):
  """A cache of one layer whose numbers are random, and those numbers with the axes [B, S, K, H]."""
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  rng = np.random.default_rng(0)
  config = types.SimpleNamespace(layers=1, kv_heads=K, head_width=H)
  kv, = caches.empty_cache(config, B, S, dtype)
  kv = jax.tree.map(lambda x: jnp.asarray(rng.integers(-9, 9, x.shape), x.dtype), kv)
  return kv, in_order(kv)


def in_order(kv):
  """The arrays of a KV with the axes [B, S, K, H] or [B, S, K]."""
  return [np.einsum(f"{letters}->{'BSKH'[:x.ndim]}", x).copy()
          for x, letters in zip(kv, caches.axes(), strict=True) if x is not None]


PLATFORMS = pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])


@PLATFORMS
@pytest.mark.parametrize("T, position_B", [(1, [4, 0, 8]), (3, [2, 6, 0]), (3, [5]), (1, [8])])
def test_tokens_are_written_from_each_rows_position(T, position_B, platform, monkeypatch):
  kv, want = random_cache(monkeypatch, platform, jnp.float32)
  rng = np.random.default_rng(1)
  new = rng.normal(size=(2, B, T, K, H)).astype(np.float32)
  got = in_order(jax.jit(caches.written)(kv, *new, jnp.asarray(position_B, jnp.int32)))
  for b in range(B):
    position = position_B[b if len(position_B) > 1 else 0]
    for x, tokens in zip(want, new, strict=True):
      x[b, position: position + T] = tokens[b]
  jax.tree.map(np.testing.assert_array_equal, got, want)


@PLATFORMS
def test_int8_has_the_scale_of_each_slot_and_head(platform, monkeypatch):
  kv, want = random_cache(monkeypatch, platform, jnp.int8)
  new = np.random.default_rng(1).normal(size=(2, B, 1, K, H)).astype(np.float32)
  position_B = np.array([4, 0, 8], np.int32)
  got = in_order(jax.jit(caches.written)(kv, *new, position_B))
  for b, position in enumerate(position_B):
    for numbers, scales, tokens in zip(want[:2], want[2:], new, strict=True):
      scales[b, position] = np.abs(tokens[b, 0]).max(axis=-1) / np.float32(127)
      numbers[b, position] = np.round(tokens[b, 0] / scales[b, position][:, None])
  jax.tree.map(np.testing.assert_array_equal, got, want)


@PLATFORMS
def test_a_position_outside_changes_no_other_row(platform, monkeypatch):
  # An ended row may stand at the end of its slots. It writes to its own last slot.
  kv, want = random_cache(monkeypatch, platform, jnp.float32)
  new = np.random.default_rng(1).normal(size=(2, B, 1, K, H)).astype(np.float32)
  got = in_order(jax.jit(caches.written)(kv, *new, jnp.asarray([S, S + 5, 3], jnp.int32)))
  for x, tokens in zip(want, new, strict=True):
    x[[0, 1, 2], [S - 1, S - 1, 3]] = tokens[:, 0]
  jax.tree.map(np.testing.assert_array_equal, got, want)


@PLATFORMS
def test_the_names_of_the_axes_are_those_of_the_arrays(platform, monkeypatch):
  kv, _ = random_cache(monkeypatch, platform, jnp.int8)
  sizes = {"batch": B, "kv_heads": K, "cache": S, "head": H}
  names, = caches.axis_names((kv,))
  assert [x.shape for x in kv] == [tuple(sizes[name] for name in axes) for axes in names]
  assert caches.slots((kv,)) == S and caches.capacity((kv,)).tolist() == [S] * B
