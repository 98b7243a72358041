"""The device's part of sampling: prefill, admit, decode, grow, shrink, with the trainer's forward.

`decode` is one program over all layers. A program that copies weights, reads prompts or moves a
cache handles one layer and is called once for each. Its size therefore does not depend on the
depth, and a cache that changes its size needs memory for one layer more.

A slot is one row of an explicit cache. A prompt is read once; its part of the cache is copied to
the slot of each of its samples, whose next token to read is the prompt's last. Decoding reads a
token of every slot and samples the next one, many times in one dispatch.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import models, sharding
from s2d_jax.models import caches
from s2d_jax.sampler import capacity
from s2d_jax.sampler.sampling import Sampling, sample_token
from s2d_jax.sharding import Params


class Slots(NamedTuple):
  """The device's state of B rows."""
  cache: caches.Cache | None
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
  params: Params      # "layers" is a tuple: from a stack each step would first copy each layer out
  head_DV: jax.Array  # the unembedding, transposed

  def with_layers(self, layers: Iterable[Params]) -> "Weights":
    """These Weights with the layers in place of what "layers" is now."""
    return self._replace(params=self.params | {"layers": tuple(layers)})


def layer_weights(model: models.Model, layers: Params, index: jax.Array) -> Params:
  """One layer's weights for decoding, cut from the trainer's stack of float32 layers."""
  # One program serves all layers: a program for all of them grows with the model's depth, and holds
  # the gathered stack beside its copy.
  layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), layers)
  shapes = models.frozen_shapes(model.config)["layers"]
  return _cast(layer, shapes)


def other_weights(model: models.Model, others: Params) -> Weights:
  """The Weights of float32 parameters without their layers."""
  shapes = models.frozen_shapes(model.config)
  others = _cast(others, {name: shapes[name] for name in others})
  # The unembedding is transposed once, and not for each token.
  return Weights(others, model.unembed(others).T)


def prepare(model: models.Model, params: Params) -> Weights:
  """The Weights of float32 parameters, for all tokens of a call, in one program."""
  others, layers = split_layers(params)
  weights = other_weights(model, others)
  return weights.with_layers(layer_weights(model, layers, i) for i in range(model.config.layers))


def split_layers(params: Params) -> tuple[Params, Params]:
  """(the parameters that are not of a layer, those of the layers)."""
  return {name: x for name, x in params.items() if name != "layers"}, params["layers"]


def _cast(params: Params, shapes: Params) -> Params:
  """The parameters in the types of `shapes`."""
  # Each token reads all weights. Cast once, they are half the bytes in bfloat16. Norms' scales stay
  # float32, as in the trainer, so the numbers are its own to the last bit.
  return jax.tree.map(lambda w, shape: w.astype(shape.dtype), params, shapes)


def _logits(weights: Weights, features_BD: jax.Array) -> jax.Array:
  """The float32 logits of features, [B, V]."""
  logits_BV = jnp.einsum("BD,DV->BV", features_BD, weights.head_DV,
                         preferred_element_type=jnp.float32)
  return sharding.constrain(logits_BV, "batch", "vocab")


def embed_chunk(model: models.Model, chunk: int, others: Params, prompt_PW: jax.Array,
                start: jax.Array) -> jax.Array:
  """The vectors of the prompts' tokens from `start` on, which the first layer reads: [P, chunk, D].

  Args:
    others: the parameters of Weights that are not of a layer.
  """
  tokens_PC = jax.lax.dynamic_slice_in_dim(prompt_PW, start, chunk, axis=1)
  return model.embed(others, tokens_PC)


def prefill(model: models.Model, layer: Params, x_PCD: jax.Array, start: jax.Array,
            kv: caches.KV) -> tuple[jax.Array, caches.KV]:
  """One layer on a chunk of each prompt: (features, its cache with the tokens from `start` on)."""
  # Padding after a prompt is read too; decoding overwrites those slots before it reads them.
  C = x_PCD.shape[1]
  position_1C = (start + jnp.arange(C, dtype=jnp.int32))[None]  # in every row
  return model.layer(layer, x_PCD, position_1C, kv)


def empty(cache: caches.Cache, batch: int) -> Slots:
  """An empty cache and no rows."""
  zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
  return Slots(cache, zeros(batch), zeros(batch), zeros(batch), jnp.zeros((batch, 2), jnp.uint32))


def admit(pieces: int, old: caches.KV, prompts: caches.KV, source_B: jax.Array,
          new_B: jax.Array) -> caches.KV:
  """A layer's cache with new rows where new_B: slot b's is a sample of prompt source_B[b].

  Args:
    pieces: as `_by_pieces`.
  """
  # Only a prompt's window is copied. The cache from a prompt's end on keeps old numbers, because
  # each slot is written before it is read. A select keeps shapes static for any number of new rows.
  def start(old: jax.Array, prompt: jax.Array, slot: int) -> jax.Array:
    def copy(at: jax.Array, size: int, old: jax.Array) -> jax.Array:
      window = jax.lax.dynamic_slice_in_dim(prompt, at, size, slot)
      taken = jnp.take(window, source_B, axis=0)
      unchanged = jax.lax.dynamic_slice_in_dim(old, at, size, slot)
      new = new_B.reshape(-1, *(1 for _ in taken.shape[1:]))
      return jax.lax.dynamic_update_slice_in_dim(
          old, jnp.where(new, taken, unchanged), at, slot)
    return _by_pieces(pieces, prompt.shape[slot], copy, old)

  return _each(start, old, prompts)


def _by_pieces(pieces: int, size: int, change: Callable[[jax.Array, int, jax.Array], jax.Array],
               array: jax.Array) -> jax.Array:
  """The array after change(start, length, array) for each of at most `pieces` parts of `size`.

  Rows that move to another device come to all devices on the way. With as many pieces as devices,
  one of all rows takes as much memory as a device's own rows.
  """
  pieces = math.gcd(pieces, size)
  length = size // pieces
  return jax.lax.fori_loop(0, pieces, lambda i, x: change(i * length, length, x), array)


def _each(change: Callable[..., jax.Array], *layers: caches.KV) -> caches.KV:
  """A layer's cache of change(arrays of the layers…, the axis of their slots)."""
  slots = [letters.index("S") for letters in caches.axes()]
  return caches.KV(*(arrays[0] if arrays[0] is None else change(*arrays, slot)
                     for *arrays, slot in zip(*layers, slots, strict=True)))


def admit_paged(old: caches.Pages, prompts: caches.KV, from_M: jax.Array,
                to_M: jax.Array) -> caches.Pages:
  """A layer's pages with page from_M of the prompts' cache copied to page to_M.

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
  return caches.Pages(pages(old.k_KNSH, caches.arranged(prompts.k, k_axes, "BKSH")),
                      pages(old.v_KNSH, caches.arranged(prompts.v, v_axes, "BKSH")))


def start_rows(slots: Slots, new_B: jax.Array, token_B: jax.Array, position_B: jax.Array,
               key_B2: jax.Array) -> Slots:
  """The slots, whose cache is None, with the state of a row's start where new_B.

  token_B is the prompt's last token, at position_B.
  """
  return Slots(None, jnp.where(new_B, token_B, slots.token_B),
               jnp.where(new_B, position_B, slots.position_B), jnp.where(new_B, 0, slots.sampled_B),
               jnp.where(new_B[:, None], key_B2, slots.key_B2))


def grow(kv: caches.KV, length: int) -> caches.KV:
  """A layer's cache with `length` tokens for each row, at least as many as now."""
  def longer(x: jax.Array, slot: int) -> jax.Array:
    return jnp.pad(x, [(0, length - x.shape[slot] if axis == slot else 0)
                       for axis in range(x.ndim)])
  return _each(longer, kv)


def shorten(kv: caches.KV, length: int) -> caches.KV:
  """A layer's cache with `length` tokens for each row, at most as many as now."""
  return _each(lambda x, slot: jax.lax.slice_in_dim(x, 0, length, axis=slot), kv)


def shrink(pieces: int, kv: caches.KV, slot_b: jax.Array) -> caches.KV:
  """A layer's cache of the rows slot_b, in their order; `pieces` as `_by_pieces`."""
  names = caches.axis_names((kv,))[0]
  def fewer(x: jax.Array, names: tuple[str, ...], slot: int) -> jax.Array:
    def copy(at: jax.Array, size: int, new: jax.Array) -> jax.Array:
      rows = jnp.take(jax.lax.dynamic_slice_in_dim(x, at, size, slot), slot_b, axis=0)
      return jax.lax.dynamic_update_slice_in_dim(new, rows, at, slot)
    empty = sharding.constrain(jnp.zeros((len(slot_b), *x.shape[1:]), x.dtype), *names)
    return _by_pieces(pieces, x.shape[slot], copy, empty)
  return _each(fewer, kv, names)


def shrink_rows(slots: Slots, slot_b: jax.Array) -> Slots:
  """The slots slot_b in their order; their cache is None."""
  return jax.tree.map(lambda x: jnp.take(x, slot_b, axis=0), slots)


def decode(model: models.Model, sampling: Sampling, tokens: int, weights: Weights, slots: Slots,
           alive_B: jax.Array, stop_count: jax.Array) -> tuple[Slots, jax.Array, Decoded]:
  """(Slots, alive_B, Decoded) after up to `tokens` tokens for each slot whose row is alive.

  It ends early when at most `stop_count` rows are alive, or when a row has filled its cache. A
  dispatch on the slots and alive_B of one that ended early, with its `stop_count`, decodes nothing.
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
  _, slots, alive_B, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots, alive_B, out))
  return slots, alive_B, out
