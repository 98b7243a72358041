"""The kernels of decoding on a GPU, interpreted, against the decoder's plain form."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import models, sharding
from s2d_jax.models import caches, decoder, one_token

B, S = 3, 9
TYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def random(seed, *shape, dtype="float32", centre=0.0):
  return jnp.asarray(np.random.default_rng(seed).normal(centre, 1, shape), dtype)


def assert_close(got, want):
  """Equal up to the rounding of float32 sums, which may round a bfloat16 the other way."""
  assert got.dtype == want.dtype and got.shape == want.shape
  rtol = {"float32": 2e-6, "bfloat16": 2**-7}[str(want.dtype)]
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=rtol,
                             atol=rtol)


@pytest.mark.parametrize("P, N, K, H, normed", [(1, 4, 2, 16, True), (4, 6, 2, 8, True),
                                                (2, 3, 3, 32, False)])
@TYPES
def test_heads_are_normed_turned_and_written_in_place(P, N, K, H, normed, dtype):
  qkv_PBM = random(0, P, B, (N + 2 * K) * H)
  cache = random(1, 2, B, S, K, H, dtype=dtype)
  norms = random(2, 2, H, centre=1.0) if normed else (None, None)
  angle_BH2 = random(3, B, H // 2)
  position_B = jnp.array([4, 0, S + 5])  # the last is beyond its row, and writes to its last slot
  got = one_token.heads(qkv_PBM, *norms, jnp.cos(angle_BH2), jnp.sin(angle_BH2), position_B, *cache,
                        1e-6, interpret=True)
  whole_B1XH = jnp.sum(qkv_PBM, axis=0).astype(dtype).reshape(B, 1, N + 2 * K, H)
  q, k, v = jnp.split(whole_B1XH, [N, N + K], axis=2)
  if normed:
    q, k = (decoder.rms_norm(x, scale, 1e-6) for x, scale in zip((q, k), norms, strict=True))
  q, k = (decoder.rope(x, angle_BH2[:, None]) for x in (q, k))
  want = np.array(cache.astype(jnp.float32))
  for b, slot in enumerate((4, 0, S - 1)):
    want[0, b, slot] = k[b, 0]
    want[1, b, slot] = v[b, 0]
  assert_close(got[0], q[:, 0])
  for x, y in zip(got[1:], want, strict=True):
    assert_close(x, jnp.asarray(y, dtype))


@pytest.mark.parametrize("P, D", [(1, 32), (8, 384), (2, 4096)])
@TYPES
def test_a_residual_and_the_norm_after_it(P, D, dtype):
  x_BD = random(0, B, D, dtype=dtype)
  out_PBD = random(1, P, B, D)
  scale_D = random(2, D, centre=1.0)
  got = one_token.residual_norm(x_BD, out_PBD, scale_D, 1e-6, interpret=True)
  want = x_BD + jnp.sum(out_PBD, axis=0).astype(dtype)
  assert_close(got[0], want)
  assert_close(got[1], decoder.rms_norm(want, scale_D, 1e-6))


@pytest.mark.parametrize("D, parts", [(96, 1), (512, 2), (2048, 8)])
def test_the_parts_of_a_product_add_up_to_it(D, parts):
  x_BD = random(0, B, D)
  weights = random(1, D, 2, 8), random(2, D, 24)
  got = one_token.product(x_BD, *weights)
  assert got.shape == (parts, B, 40)
  want = np.float64(x_BD) @ np.concatenate([np.float64(w).reshape(D, -1) for w in weights], axis=1)
  np.testing.assert_allclose(np.sum(got, axis=0), want, rtol=1e-4, atol=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@TYPES
def test_a_step_by_kernels_is_the_decoders(family, dtype, tiny_json, randomized, monkeypatch):
  monkeypatch.setitem(caches._AXES, "cpu", caches._AXES["other"])  # as on a GPU
  model = models.get(tiny_json(family), dtype=dtype)
  params = randomized(model)
  cache = tuple(caches.KV(*random(i, 2, B, S, 2, 16, dtype=dtype)) for i in range(2))
  args = (params, jnp.array([[5], [7], [11]]), jnp.array([[4], [0], [8]]), jnp.ones((B, 1), int),
          cache)
  want = model.apply(*args)
  calls = []
  features = functools.partial(one_token.features, interpret=True)
  monkeypatch.setattr(one_token, "applies", lambda *args: True)
  monkeypatch.setattr(one_token, "features", lambda *args: calls.append(1) or features(*args))
  got = model.apply(*args)
  assert calls == [1]
  # Two layers of weights far from their initial values carry a rounding on.
  tolerance = {"float32": 1e-4, "bfloat16": 0.15}[dtype]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(
      np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=tolerance),
      got, want)


def test_the_kernels_are_for_one_token_in_the_form_that_they_take(tiny_json, monkeypatch):
  def applies(tokens=1, cache="bfloat16", platform="gpu", split=False, kind=tuple, **changes):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(sharding, "splits_heads", lambda: split)
    config = dataclasses.replace(
        models.get(tiny_json("qwen3", hidden_size=256, intermediate_size=384),
                   dtype="bfloat16").config, **changes)
    layers = (types.SimpleNamespace(k=jnp.zeros(1, cache)),)
    return one_token.applies(config, tokens, kind(layers))
  assert applies()
  for other in ({"tokens": 2}, {"cache": "int8"}, {"platform": "cpu"}, {"platform": "tpu"},
                {"split": True}, {"dtype": "float32"}, {"attention": "xla"}, {"width": 200},
                {"head_width": 24}, {"lora": models.Lora(2, 1.0, ("q",))},
                {"kind": lambda x: caches.Paged(x, None, None)}):
    assert not applies(**other), other
  monkeypatch.setattr(one_token.kernels, "triton", None)
  assert not applies()
