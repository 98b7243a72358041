"""The decoder's parts against NumPy, and its paths against each other."""

import contextlib
import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import models, sharding
from s2d_jax.models import attention, decoder, linear
from s2d_jax.models.config import RopeScaling

T = 12


@pytest.fixture(scope="module")
def tiny(tiny_json, randomized):
  """(model, params, jitted apply) of a tiny Qwen3."""
  model = models.get(tiny_json("qwen3"))
  return model, randomized(model), jax.jit(model.apply)


def tokens(rows, length=T):
  return np.random.default_rng(1).integers(0, 48, (rows, length)).astype(np.int32)


def counted(rows, length=T):
  return np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def ones(rows, length=T):
  return np.ones((rows, length), np.int32)


def test_rms_norm_by_hand():
  # mean(x²) = (9 + 16) / 2 = 12.5, and 12.5 + 3.5 = 16: x / 4 · scale.
  got = decoder.rms_norm(jnp.array([[3.0, -4.0]]), jnp.array([1.0, 2.0]), 3.5)
  np.testing.assert_allclose(got, [[0.75, -2.0]], rtol=1e-6)


def test_rms_norm_is_float32_inside():
  x = jnp.full((1, 4096), 300.0, jnp.bfloat16)  # the sum of squares of which bfloat16 cannot count
  got = decoder.rms_norm(x, jnp.ones(4096), 1e-6)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got.astype(jnp.float32), np.ones((1, 4096)))


def test_rope_equals_rotation_of_complex_numbers():
  H, theta = 8, 100.0
  x = np.random.default_rng(0).normal(size=(1, 5, 3, H)).astype(np.float32)
  position = np.array([0, 1, 2, 7, 40])
  frequency = theta ** (-np.arange(0, H, 2) / H)
  turned = (x[..., : H // 2] + 1j * x[..., H // 2:]) * np.exp(
      1j * np.outer(position, frequency))[None, :, None]
  angle = jnp.asarray(np.outer(position, frequency)[None], jnp.float32)
  np.testing.assert_allclose(decoder.rope(x, angle), np.concatenate(
      [turned.real, turned.imag], axis=-1), atol=1e-5)
  np.testing.assert_allclose(decoder.rope_frequencies(H, theta, None), frequency, rtol=1e-6)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_the_gradient_of_rope_on_a_gpu_is_the_opposite_rotation(dtype, atol):
  rng = np.random.default_rng(0)
  dy = jnp.asarray(rng.normal(size=(2, 5, 3, 8)), dtype)
  angle = rng.uniform(-7, 7, size=(2, 5, 4)).astype(np.float32)
  _, back = jax.vjp(lambda x: decoder._rope(x, jnp.asarray(angle)), jnp.zeros_like(dy))
  dx, = back(dy)
  assert dx.dtype == dtype
  first, second = np.split(np.asarray(dy.astype(jnp.float32)), 2, axis=-1)
  turned = (first + 1j * second) * np.exp(-1j * angle)[:, :, None]
  np.testing.assert_allclose(dx.astype(jnp.float32),
                             np.concatenate([turned.real, turned.imag], axis=-1), atol=atol)


def test_llama3_scaling_keeps_short_waves_and_slows_long_ones():
  scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
  plain = np.asarray(decoder.rope_frequencies(128, 500000.0, None), np.float64)
  got = np.asarray(decoder.rope_frequencies(128, 500000.0, scaling), np.float64)
  wave = 2 * np.pi / plain
  short, long = wave < 8192 / 4.0, wave > 8192 / 1.0
  np.testing.assert_allclose(got[short], plain[short], rtol=1e-6)
  np.testing.assert_allclose(got[long], plain[long] / 8, rtol=1e-6)
  between = ~short & ~long
  assert between.any()
  smooth = (8192 / wave[between] - 1.0) / (4.0 - 1.0)  # as Llama's own reference writes it
  want = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
  np.testing.assert_allclose(got[between], want, rtol=1e-5)


@pytest.mark.medium
def test_initial_features_are_finite_and_logits_near_uniform(tiny):
  model, _, apply = tiny
  params = jax.jit(model.init)(jax.random.key(0))
  features, _ = apply(params, tokens(2), counted(2), ones(2))
  logits = np.asarray(features) @ np.asarray(model.unembed(params)).T
  share = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  entropy = -np.mean(np.sum(share * np.log(share), axis=-1))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  assert 0.8 * np.log(48) < entropy < np.log(48)


@pytest.mark.medium
@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # whose caches are laid out otherwise
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_prefill_and_decode_equal_one_forward_pass(family, platform, tiny_json, randomized,
                                                   monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  model = models.get(tiny_json(family), attention="xla")
  params, apply, rows = randomized(model), jax.jit(model.apply), 3
  ids = tokens(rows)
  want, _ = apply(params, ids, counted(rows), ones(rows))
  cache = models.empty_cache(model.config, rows, T + 4)
  first, cache = apply(params, ids[:, :7], counted(rows)[:, :7], ones(rows)[:, :7], cache)
  got = [first]
  for t in range(7, T):
    one, cache = apply(params, ids[:, t:t + 1], counted(rows)[:, t:t + 1], ones(rows, 1), cache)
    got.append(one)
  np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5)


def test_rows_of_a_cache_may_have_different_positions(tiny):
  # One row has read five tokens and the other all; each reads its next beside the other, and what
  # was left in the slots behind a row is not read.
  model, params, apply = tiny
  ids, short = tokens(2), 5
  want, _ = apply(params, ids, counted(2), ones(2))
  _, cache = apply(params, ids, counted(2), ones(2), models.empty_cache(model.config, 2, T + 1))
  ids[1, short:] = ids[1, short:] + 1  # other tokens than those whose keys are there
  want = np.stack([want[0], apply(params, ids, counted(2), ones(2))[0][1]])
  for t in range(short, T):
    tokens_B1 = np.stack([ids[0, -1:], ids[1, t: t + 1]])
    got, cache = apply(params, tokens_B1, np.array([[T - 1], [t]], np.int32), ones(2, 1), cache)
    np.testing.assert_allclose(got[:, 0], [want[0, -1], want[1, t]], atol=2e-5)


def test_int8_cache_is_within_a_hundredth_of_float32(tiny):
  # Each number is at most half a 127th of its head's largest away; features are near float32's.
  model, params, apply = tiny
  want, exact = apply(params, tokens(2), counted(2), ones(2),
                      models.empty_cache(model.config, 2, T))
  got, cache = apply(params, tokens(2), counted(2), ones(2),
                     models.empty_cache(model.config, 2, T, jnp.int8))
  assert {x.dtype for kv in cache for x in kv[:2]} == {np.dtype(np.int8)}
  numbers, scale_BKS = np.asarray(cache[0].v), np.asarray(cache[0].v_scale)
  whole = np.asarray(exact[0].v)  # of the first layer, whose input is exact
  np.testing.assert_allclose(scale_BKS, np.abs(whole).max(axis=-1) / 127, rtol=1e-6)
  assert (np.abs(numbers * scale_BKS[..., None] - whole) <= 0.501 * scale_BKS[..., None]).all()
  assert (np.abs(numbers).max(axis=-1) == 127).all()
  error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
  assert 1e-5 < error < 0.03


def test_a_cache_too_short_is_refused(tiny):
  model, params, apply = tiny
  with pytest.raises(ValueError, match="12 tokens do not fit a cache of 4 slots"):
    apply(params, tokens(1), counted(1), ones(1), models.empty_cache(model.config, 1, 4))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side, tiny):
  model, params, apply = tiny
  ids, pad = tokens(2), 3
  want, _ = apply(params, ids, counted(2), ones(2))
  at = slice(0, T) if side == "right" else slice(pad, None)
  def widened(x, fill):
    wide = np.full((2, T + pad), fill, np.int32)
    wide[:, at] = x
    return wide
  got, _ = apply(params, widened(ids, 7), widened(counted(2), 0), widened(ones(2), 0))
  np.testing.assert_allclose(got[:, at], want, atol=2e-5)
  assert np.isfinite(got).all()


def test_packed_sequences_equal_separate_ones(tiny):
  _, params, apply = tiny
  ids, half = tokens(1), T // 2
  positions = np.tile(np.arange(half, dtype=np.int32), (1, 2))
  segments = np.repeat(np.array([[1, 2]], np.int32), half, axis=1)
  packed, _ = apply(params, ids, positions, segments)
  alone, _ = apply(params, ids.reshape(2, half), counted(2, half), ones(2, half))
  np.testing.assert_allclose(packed, np.reshape(alone, packed.shape), atol=2e-5)


@pytest.mark.medium
def test_features_depend_on_their_past_alone(tiny):
  model, params, _ = tiny
  ids, t = np.arange(T, dtype=np.int32)[None], 6  # each token once, so embeddings are positions
  def summed(embed):
    features, _ = model.apply(params | {"embed": embed}, ids, counted(1), ones(1))
    return jnp.sum(features[0, t] ** 3)
  reach = np.abs(jax.jit(jax.grad(summed))(params["embed"])).sum(axis=1)
  assert (reach[: t + 1] > 1e-3).all()
  np.testing.assert_array_equal(reach[t + 1:], 0.0)


@pytest.mark.parametrize("narrow", [jnp.float32, jnp.bfloat16])
def test_a_projection_and_its_gradients_in_float64(narrow):
  # Operands that bfloat16 holds, so that all that is rounded is the sums; the gradient of the
  # weights, which devices add up, is float32 either way.
  rng = np.random.default_rng(0)
  x, w, dy = (np.asarray(jnp.asarray(rng.normal(size=s), jnp.bfloat16), np.float64)
              for s in ((2, 50, 6), (6, 4, 3), (2, 50, 4, 3)))
  y, back = jax.vjp(linear.project, jnp.asarray(x, narrow), jnp.asarray(w, jnp.float32))
  dx, dw = back(jnp.asarray(dy, narrow))
  assert (y.dtype, dx.dtype, dw.dtype) == (narrow, narrow, jnp.float32)
  close = 2e-2 if narrow == jnp.bfloat16 else 1e-5
  np.testing.assert_allclose(y.astype(jnp.float32), np.tensordot(x, w, 1), atol=close, rtol=close)
  np.testing.assert_allclose(dx.astype(jnp.float32), np.einsum("btnh,dnh->btd", dy, w),
                             atol=close, rtol=close)
  np.testing.assert_allclose(dw, np.einsum("btd,btnh->dnh", x, dy), atol=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize("policy", ["block", "dots", "offload", "attention", "named"])
def test_remat_changes_no_gradient(policy, tiny):
  model, params, _ = tiny
  other = models.build(dataclasses.replace(model.config, remat=policy))
  def loss(model, params):
    return jnp.sum(model.apply(params, tokens(1), counted(1), ones(1))[0] ** 3)
  assert "remat" not in str(jax.make_jaxpr(jax.grad(loss, 1), static_argnums=0)(model, params))
  program = str(jax.make_jaxpr(jax.grad(loss, 1), static_argnums=0)(other, params))
  assert "remat" in program and ("<host>" in program) == (policy == "offload")
  want, got = (jax.jit(jax.grad(loss, 1), static_argnums=0)(m, params) for m in (model, other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_bfloat16_activations_are_near_float32(tiny):
  model, params, apply = tiny
  half = models.build(dataclasses.replace(model.config, dtype="bfloat16"))
  want, _ = apply(params, tokens(2), counted(2), ones(2))
  got, _ = jax.jit(half.apply)(params, tokens(2), counted(2), ones(2))
  assert got.dtype == jnp.bfloat16
  error = np.sqrt(np.mean((got.astype(jnp.float32) - want) ** 2) / np.mean(want**2))
  assert error < 0.05  # a dozen roundings of 2⁻⁹, some amplified


MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))


def on_meshes(model, params, function, *args):
  """[`function(params, *args)` under jit on each of MESHES], and the last one's parameters."""
  results = []
  for shape in MESHES:
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh):
      where = sharding.weight_shardings(
          mesh, models.axes(model.config), models.shapes(model.config))
      placed = jax.tree.map(jax.device_put, jax.device_get(params), where)
      results.append(jax.device_get(jax.jit(function)(placed, *sharding.put_batch(args, mesh))))
  return results, placed


@pytest.mark.medium
@pytest.mark.parametrize("K", [1, 2, 8])
def test_eight_devices_equal_one_device(K, tiny_json, randomized):
  # 300 tokens: attention in several pieces.
  model = models.get(tiny_json("qwen3", num_attention_heads=8, num_key_value_heads=K, head_dim=8))
  def logits(params, *args):
    return jnp.einsum("BTD,VD->BTV", model.apply(params, *args)[0], model.unembed(params))
  (one, *others), placed = on_meshes(
      model, randomized(model), logits, tokens(8, 300), counted(8, 300), ones(8, 300))
  kv = placed["layers"]["attn"]["k"].sharding.shard_shape((2, 32, K, 8))
  assert kv == (2, 16, max(1, K // 2), 8)  # width over fsdp; heads over tensor, one replicated
  for other in others:
    np.testing.assert_allclose(other, one, atol=3e-5)


@pytest.mark.medium
def test_gradients_on_eight_devices_equal_those_on_one(tiny_json, randomized):
  model = models.get(tiny_json("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=8))
  def loss(params, *args):
    return jnp.mean(model.apply(params, *args)[0] ** 3)
  (one, *others), _ = on_meshes(
      model, randomized(model), jax.grad(loss), tokens(8, 150), counted(8, 150), ones(8, 150))
  for other in others:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, one)


@pytest.mark.medium
def test_two_layers_in_a_trip_have_the_gradients_of_one(tiny_json, randomized, monkeypatch):
  # Of three layers the last one is a trip by itself.
  model = models.get(tiny_json("qwen3", num_hidden_layers=3), remat="block")
  params = randomized(model)
  def loss(params, *args):
    return jnp.mean(model.apply(params, *args)[0] ** 3)

  def gradient():
    mesh = sharding.make_mesh((1, 2, 1))
    with jax.set_mesh(mesh):
      where = sharding.weight_shardings(mesh, models.axes(model.config),
                                        models.shapes(model.config))
      placed = jax.tree.map(jax.device_put, jax.device_get(params), where)
      args = sharding.put_batch((tokens(4), counted(4), ones(4)), mesh)
      traced = jax.jit(jax.grad(loss)).trace(placed, *args)
      gradient = jax.device_get(traced.lower().compile()(placed, *args))
      return gradient, str(traced.jaxpr).count("unroll=2")

  want, loops = gradient()
  assert loops == 0
  monkeypatch.setattr(decoder, "_layers_at_once", lambda rows, tokens: 2)
  got, loops = gradient()
  assert loops == 2  # forward and backward
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


@pytest.mark.parametrize("mesh, platform, T, layers", [
    ((1, 2, 1), "gpu", 1024, 2), ((2, 2, 1), "gpu", 2048, 2),
    ((1, 2, 1), "gpu", 1025, 1),  # activations of two layers would be large
    ((2, 1, 1), "gpu", 1, 1), ((1, 1, 2), "gpu", 1, 1),  # no weights are gathered
    ((1, 2, 1), "cpu", 1, 1), ((1, 2, 1), "tpu", 1, 1), (None, "gpu", 1, 1)])
def test_layers_in_a_trip(mesh, platform, T, layers, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(sharding.make_mesh(mesh)):
    assert decoder._layers_at_once(8, T) == layers


def test_decoding_repeats_no_key_heads_of_the_cache(tiny_json):
  # 13 slots of two key heads of six: no array of the program has those for the eight query heads
  # (within a fusion a number may be met more than once, and is kept nowhere).
  model = models.get(tiny_json("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=6))
  cache = models.empty_cache(model.config, 3, 13)  # of three rows
  text = jax.jit(model.apply).lower(models.shapes(model.config), tokens(3, 1), counted(3, 1),
                                    ones(3, 1), cache).compile().as_text()
  text = re.sub(r"^%fused_computation.*?^}", "", text, flags=re.MULTILINE | re.DOTALL)
  shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
  held = [math.prod(shape) for shape in shapes if 13 in shape and 6 in shape]
  assert max(held) == 3 * 13 * 2 * 6  # a layer's keys or values, and nothing larger


@pytest.mark.medium
def test_packed_rows_are_not_numbers_by_a_kernel_without_a_mask(tiny, monkeypatch):
  # Its XLA implementation, as if on a GPU. A row of two sequences, and one with padding.
  model, params, _ = tiny
  ids, segments = tokens(2), ones(2)
  segments[0, T // 2:], segments[1, T - 3:] = 2, 0
  want = model.apply(params, ids, counted(2), segments)[0]
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  monkeypatch.setattr(attention, "cudnn",
                      functools.partial(attention.cudnn, implementation="xla"))
  def features(implementation):
    other = models.build(dataclasses.replace(model.config, attention=implementation))
    return np.asarray(other.apply(params, ids, counted(2), segments)[0])
  got = features("cudnn")
  assert np.isnan(got[0]).all()
  np.testing.assert_allclose(got[1, :T - 3], want[1, :T - 3], atol=2e-5)
  assert np.isfinite(got[1]).all()
  real = segments != 0
  np.testing.assert_allclose(features("cudnn_packed")[real], want[real], atol=2e-5)


@pytest.mark.medium
def test_dots_and_named_store_results_and_block_does_not(tiny):
  # Temporaries of the gradient's program, in bytes, of a longer row.
  model, params, _ = tiny
  def temporaries(remat):
    other = models.build(dataclasses.replace(model.config, remat=remat, layers=8))
    shapes = models.shapes(other.config)
    def loss(params):
      return jnp.sum(other.apply(params, tokens(2, 256), counted(2, 256), ones(2, 256))[0] ** 2)
    return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes
  none, dots, named, attention, block = map(
      temporaries, ("none", "dots", "named", "attention", "block"))
  assert none > dots > block
  # On a CPU attention without its forward pass needs less beside what is stored, so `attention` may
  # be below `block`.
  assert none > named > max(attention, block)


@pytest.mark.slow
def test_layers_are_compiled_once(tiny):
  # Twenty-eight layers take no longer to compile than four, within 30 %.
  model, _, _ = tiny
  def seconds(layers):
    config = dataclasses.replace(model.config, layers=layers, width=64, mlp=128)
    built = models.build(config)
    scale = time.time()  # a program of its own each time, so that no cache has it
    def loss(params):
      return jnp.sum(built.apply(params, tokens(2), counted(2), ones(2))[0] ** 2) * scale
    lowered = jax.jit(jax.grad(loss)).lower(models.shapes(built.config))
    jax.clear_caches()
    began = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - began
  # In turn, so that other work on the machine slows both alike.
  pairs = [(seconds(28), seconds(4)) for _ in range(5)]
  many, few = np.median(pairs, axis=0)
  assert many <= 1.3 * few
