"""The device's part of sampling: prefill, admit, decode, grow, shrink, with the trainer's forward.

A slot is one row of an explicit cache. A prompt is read once; its part of the cache is copied to
the slot of each of its samples, whose next token to read is the prompt's last. Decoding reads a
token of every slot and samples the next one, many times in one dispatch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import models, sharding
from s2d_jax.models import caches, decoder
from s2d_jax.sampler import capacity
from s2d_jax.sampler.sampling import Sampling, sample_token
from s2d_jax.sharding import Params


class Slots(NamedTuple):
  """The device's state of B rows."""
  cache: caches.Cache
  token_B: jax.Array  # int32: the token to be read next
  position_B: jax.Array  # int32: its index in the row, and the number of tokens in the cache
  sampled_B: jax.Array  # int32: response tokens so far
  key_B2: jax.Array   # uint32: data of the random key that belongs to the row


class Decoded(NamedTuple):
  """The results of a dispatch, equal on every process; arrays are 0 after a row's end."""
  tokens_BN: jax.Array      # int32
  logp_BN: jax.Array        # float32 nats, under the model
  behaviour_logp_BN: jax.Array  # float32 nats, under the distribution sampled from
  count_B: jax.Array        # int32 tokens
  stopped_B: jax.Array      # bool: the last one is a stop id

class Weights(NamedTuple):
  """A model's weights in the form that decoding reads: matrices in the activations' type."""
  params: Params      # layers unstacked
  head_DV: jax.Array  # the unembedding, transposed


def prepare(model: models.Model, params: Params) -> Weights:
  """The Weights of float32 parameters, for all tokens of a call."""
  # Each token reads all weights. Cast once, they are half the bytes in bfloat16. Norms' scales stay
  # float32, as in the trainer, so the numbers are its own to the last bit.
  params = jax.tree.map(lambda w, shape: w.astype(shape.dtype), params,
                        models.frozen_shapes(model.config))
  # With stacked layers each step would first copy each layer's weights out of the stack. The
  # unembedding is transposed here for the same reason: once, and not for each token.
  return Weights(decoder.unstacked(params, model.config), model.unembed(params).T)


def _logits(weights: Weights, features_BD: jax.Array) -> jax.Array:
  """The float32 logits of features, [B, V]."""
  logits_BV = jnp.einsum("BD,DV->BV", features_BD, weights.head_DV,
                         preferred_element_type=jnp.float32)
  return sharding.constrain(logits_BV, "batch", "vocab")


def prefill(model: models.Model, chunk: int, dtype: jax.typing.DTypeLike, weights: Weights,
            prompt_PW: jax.Array, longest: jax.Array) -> tuple[caches.KV, ...]:
  """The cache of P prompts, of which the longest has `longest` tokens; `chunk` divides W."""
  P, W = prompt_PW.shape
  # Attention scores are chunk × W for each prompt and head, and not W × W: memory bounds the chunk.
  # Padding after a prompt is read too; decoding overwrites those slots before it reads them.
  def read(i: jax.Array, cache: tuple[caches.KV, ...]) -> tuple[caches.KV, ...]:
    tokens_PC = jax.lax.dynamic_slice_in_dim(prompt_PW, i * chunk, chunk, axis=1)
    position_1C = (i * chunk + jnp.arange(chunk, dtype=jnp.int32))[None]  # in every row
    return model.apply(weights.params, tokens_PC, position_1C, jnp.ones_like(tokens_PC), cache)[1]
  return jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, read,
                           caches.empty_cache(model.config, P, W, dtype))


def empty(cache: caches.Cache, batch: int) -> Slots:
  """An empty cache and no rows."""
  zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
  return Slots(cache, zeros(batch), zeros(batch), zeros(batch), jnp.zeros((batch, 2), jnp.uint32))


def admit(slots: Slots, prompts: tuple[caches.KV, ...], source_B: jax.Array, new_B: jax.Array,
          token_B: jax.Array, position_B: jax.Array, key_B2: jax.Array) -> Slots:
  """The slots with new rows where new_B: slot b's is a sample of the prompt in row source_B[b].

  token_B is the prompt's last token, at position_B.
  """
  # Only a prompt's window is copied. The cache from position_B on keeps old numbers, because each
  # slot is written before it is read. A select keeps shapes static for any number of new rows.
  def start(old: jax.Array, prompt: jax.Array) -> jax.Array:
    prompt = jnp.take(prompt, source_B, axis=0)
    unchanged = jax.lax.slice(old, (0,) * old.ndim, prompt.shape)
    new = new_B.reshape(-1, *(1 for _ in prompt.shape[1:]))
    return jax.lax.dynamic_update_slice(old, jnp.where(new, prompt, unchanged), (0,) * old.ndim)

  olds, tree = jax.tree.flatten(slots.cache)
  written: list[jax.Array] = []
  for old, prompt in zip(olds, jax.tree.leaves(prompts), strict=True):
    # A slot's prompt may be on another device, so the prompts are gathered. Without an order all
    # arrays' gathers come first, and together they take as much memory as half a cache.
    if written:
      prompt, written[-1] = jax.lax.optimization_barrier((prompt, written[-1]))
    written.append(start(old, prompt))
  cache = tree.unflatten(written)
  return _with_new_rows(slots, cache, new_B, token_B, position_B, key_B2)


def admit_paged(slots: Slots, prompts: tuple[caches.KV, ...], from_M: jax.Array, to_M: jax.Array,
                new_B: jax.Array, token_B: jax.Array, position_B: jax.Array,
                key_B2: jax.Array) -> Slots:
  """`admit` for a cache in pages: copies page from_M of the prompts to page to_M of the cache.

  The prompts' pages are numbered across all prompts. A `to_M` beyond the cache's pages copies
  nothing. The host sets the tables.
  """
  def pages(old_KNSH: jax.Array, prompt_PKSH: jax.Array) -> jax.Array:
    S, H = old_KNSH.shape[2:]
    P, K, W, _ = prompt_PKSH.shape
    prompt_KNSH = prompt_PKSH.reshape(P, K, W // S, S, H).swapaxes(0, 1).reshape(K, -1, S, H)
    # M is fixed when compiled. The host fills unused entries with an index that "drop" ignores.
    return old_KNSH.at[:, to_M].set(prompt_KNSH[:, from_M].astype(old_KNSH.dtype), mode="drop")
  # Pages hold a token's keys together, whatever the order of a KV's axes.
  k_axes, v_axes = caches.axes()[:2]
  layers = tuple(caches.Pages(pages(old.k_KNSH, caches.arranged(prompt.k, k_axes, "BKSH")),
                              pages(old.v_KNSH, caches.arranged(prompt.v, v_axes, "BKSH")))
                 for old, prompt in zip(slots.cache.layers, prompts, strict=True))
  cache = slots.cache._replace(layers=layers)
  return _with_new_rows(slots, cache, new_B, token_B, position_B, key_B2)


def _with_new_rows(slots: Slots, cache: caches.Cache, new_B: jax.Array, token_B: jax.Array,
                   position_B: jax.Array, key_B2: jax.Array) -> Slots:
  """The slots with another cache, and with the state of a row's start where new_B."""
  return Slots(cache, jnp.where(new_B, token_B, slots.token_B),
               jnp.where(new_B, position_B, slots.position_B), jnp.where(new_B, 0, slots.sampled_B),
               jnp.where(new_B[:, None], key_B2, slots.key_B2))


def grow(slots: Slots, length: int) -> Slots:
  """The slots with a cache of `length` tokens for each row, at least as many as now."""
  def longer(x: jax.Array, slot: int) -> jax.Array:
    return jnp.pad(x, [(0, length - x.shape[slot] if axis == slot else 0)
                       for axis in range(x.ndim)])
  return _resized(slots, longer)


def shorten(slots: Slots, length: int) -> Slots:
  """The slots with a cache of `length` tokens for each row, at most as many as now."""
  return _resized(slots, lambda x, slot: jax.lax.slice_in_dim(x, 0, length, axis=slot))


def _resized(slots: Slots, resize: Callable[[jax.Array, int], jax.Array]) -> Slots:
  """The slots with resize(array, axis of its slots) in place of each array of the cache."""
  def layer(kv: caches.KV) -> caches.KV:
    return caches.KV(*(x if x is None else resize(x, letters.index("S"))
                       for x, letters in zip(kv, caches.axes(), strict=True)))
  return slots._replace(cache=tuple(map(layer, slots.cache)))


def shrink(slots: Slots, slot_b: jax.Array) -> Slots:
  """The slots at the indices slot_b, in their order."""
  return jax.tree.map(lambda x: jnp.take(x, slot_b, axis=0), slots)


def decode(model: models.Model, sampling: Sampling, tokens: int, weights: Weights, slots: Slots,
           alive_B: jax.Array, stop_count: jax.Array) -> tuple[Slots, Decoded]:
  """(Slots, Decoded) after up to `tokens` tokens for each slot whose row is alive.

  It ends early when at most `stop_count` rows are alive, or when a row has filled its cache.
  """
  B, T = slots.token_B.shape[0], sampling.max_tokens
  # No token has id -1, so it stands for no stop ids: no row then ends before max_tokens.
  stop_ids = jnp.array(sampling.stop_ids or (-1,), jnp.int32)

  # Many tokens in one dispatch, because the host's answer would take longer than a step. It returns
  # early where only the host can go on: to admit rows, shrink the batch or find more memory.
  def unfinished(carry: tuple) -> jax.Array:
    i, slots, alive_B, _ = carry
    full_B = alive_B & (slots.position_B >= caches.capacity(slots.cache))
    return (i < tokens) & (jnp.sum(alive_B) > stop_count) & ~jnp.any(full_B)

  # Where a step reads a row up to its position, an ended row reads one slot in place of all.
  rewinds = not isinstance(slots.cache, caches.Paged) and capacity.stops_at_rows(
      model.config, slots.cache[0].k.dtype)

  # Ended rows are computed too, since shapes are static, but their token and position stay.
  def step(carry: tuple) -> tuple:
    i, slots, alive_B, out = carry
    position_B = jnp.where(alive_B, slots.position_B, 0) if rewinds else slots.position_B
    features_B1D, cache = model.apply(
        weights.params, slots.token_B[:, None], position_B[:, None], jnp.ones((B, 1), jnp.int32),
        slots.cache)
    token_B, *logps = sample_token(_logits(weights, features_B1D[:, 0]), slots.key_B2,
                                   slots.sampled_B, sampling)
    def put(old_BN: jax.Array, new_B: jax.Array) -> jax.Array:
      new_B = jnp.where(alive_B, new_B, 0).astype(old_BN.dtype)
      return jax.lax.dynamic_update_slice(old_BN, new_B[:, None], (0, i))
    one_B = alive_B.astype(jnp.int32)
    stopped_B = alive_B & jnp.isin(token_B, stop_ids)
    out = Decoded(*(put(x, y) for x, y in zip(out[:3], (token_B, *logps), strict=True)),
                  out.count_B + one_B, out.stopped_B | stopped_B)
    sampled_B = slots.sampled_B + one_B
    slots = slots._replace(cache=cache, token_B=jnp.where(alive_B, token_B, slots.token_B),
                           position_B=slots.position_B + one_B, sampled_B=sampled_B)
    return i + 1, slots, alive_B & ~stopped_B & (sampled_B < T), out

  floats = jnp.zeros((B, tokens), jnp.float32)
  out = Decoded(jnp.zeros((B, tokens), jnp.int32), floats, floats, jnp.zeros(B, jnp.int32),
                jnp.zeros(B, bool))
  _, slots, _, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots, alive_B, out))
  return slots, out
