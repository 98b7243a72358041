"""The device's part of sampling: prefill, admit, decode, grow, shrink, with the trainer's forward.

A slot is one row of an explicit cache. A prompt is read once; its part of the cache is copied to
the slot of each of its samples, whose next token to read is the prompt's last. Decoding reads a
token of every slot and draws the next one, many times in one dispatch. A token is drawn by one
uniform number, a function of the row's own key and the token's index. A row therefore does not
depend on its neighbours, on its slot or on the time at which it is admitted.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import keys, models, sharding
from s2d_jax.keys import Key
from s2d_jax.models import caches, decoder
from s2d_jax.sharding import Params

# The fields of a Sampling that choose no token: how many there are, and where a response ends.
LENGTHS = ("samples_per_prompt", "max_tokens", "min_tokens", "stop_ids", "stop_strings")


class Sampling(NamedTuple):
  """How to sample; hashable, so it is part of the compiled program.

  temperature 0 is greedy. top_p 1, top_k 0 and min_p 0 switch a truncation off; they apply to the
  tempered distribution in the order top-k, top-p, min-p, as in transformers. Lengths are tokens;
  a stop id ends a response and belongs to it, and so does the token that completes a stop string.
  """
  samples_per_prompt: int
  temperature: float
  top_p: float
  top_k: int
  min_p: float
  max_tokens: int
  min_tokens: int
  stop_ids: tuple[int, ...]
  stop_strings: tuple[str, ...] = ()

  KEYS = {  # the block of a config that becomes a Sampling; the tokenizer gives the stop ids
      "samples_per_prompt": keys.at_least(1),
      "temperature": Key(lambda x: 0 <= x < math.inf, "choose 0 (greedy) or more", neutral=1.0),
      "top_p": Key(lambda p: 0 < p <= 1, "choose it above 0, up to 1 (off)", neutral=1.0),
      "top_k": Key(lambda k: k >= 0 and k % 1 == 0, "choose 0 (off) or more", neutral=0),
      "min_p": Key(lambda p: 0 <= p <= 1, "choose it from 0 (off) to 1", neutral=0.0),
      "max_tokens": keys.at_least(1),
      "min_tokens": keys.at_least(0, neutral=0),
      "stop_strings": Key(lambda texts: isinstance(texts, tuple) and all(
          isinstance(text, str) and text for text in texts),
          "give a tuple of texts, none of them empty", neutral=())}

  def plain(self) -> bool:
    """True if tokens are drawn from the model's own distribution, unchanged."""
    # Then one log-probability serves as both of `draw`, and a pass over the vocabulary is saved.
    # Every field counts that does not say how many tokens there are or where they end, so a new
    # truncation cannot be forgotten here: without a neutral value its samples are never plain.
    changes = [name for name in self._fields
               if name not in LENGTHS and getattr(self, name) != self.KEYS[name].neutral]
    return not changes and not (self.min_tokens and self.stop_ids)


class Slots(NamedTuple):
  """The device's state of B rows."""
  cache: caches.Cache
  token_B: jax.Array  # int32: the token to be read next
  position_B: jax.Array  # int32: its index in the row, and the number of tokens in the cache
  drawn_B: jax.Array  # int32: response tokens so far
  key_B2: jax.Array   # uint32: data of the random key that belongs to the row


class Written(NamedTuple):
  """The results of a dispatch, equal on every process; arrays are 0 after a row's end."""
  tokens_BN: jax.Array      # int32
  logp_BN: jax.Array        # float32 nats, under the model
  behaviour_logp_BN: jax.Array  # float32 nats, under the distribution drawn from
  count_B: jax.Array        # int32 tokens
  stopped_B: jax.Array      # bool: the last one is a stop id


def truncate(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Logits at temperature, with what top-k, top-p and min-p exclude at −inf; float32.

  top-p keeps the smallest set of most probable tokens whose mass reaches top_p (Holtzman et al.
  2020, https://arxiv.org/abs/1904.09751); min-p keeps tokens of at least min_p times the largest
  probability (https://arxiv.org/abs/2407.01082). The most probable token always stays.
  """
  logits_BV = logits_BV / jnp.float32(sampling.temperature)
  narrow = 0 < sampling.top_k < logits_BV.shape[-1]
  if narrow:
    best_Bn = jax.lax.top_k(logits_BV, sampling.top_k)[0]
    logits_BV = jnp.where(logits_BV < best_Bn[:, -1:], -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    # After top-k the few logits that are left are sorted already, so no search is needed.
    least_B1 = (_top_p_threshold_of_sorted(best_Bn, sampling.top_p) if narrow
                else _top_p_threshold(logits_BV, sampling.top_p))
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.min_p > 0:
    # A ratio of probabilities is a difference of logits, so no softmax is needed.
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
    logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
  return logits_BV


def _top_p_threshold_of_sorted(best_Bn: jax.Array, top_p: float) -> jax.Array:
  """The smallest logit that top-p keeps, of logits in falling order that have all the mass."""
  p_Bn = jax.nn.softmax(best_Bn, axis=-1)
  kept_Bn = jnp.cumsum(p_Bn, axis=-1) - p_Bn < top_p  # the mass before this token
  return jnp.min(jnp.where(kept_Bn, best_Bn, best_Bn[:, :1]), axis=-1, keepdims=True)


def _top_p_threshold(logits_BV: jax.Array, top_p: float) -> jax.Array:
  """The largest number such that the logits at or above it hold mass `top_p`; float32 [B, 1]."""
  # A bisection of the 32 bits of a float is exact. It takes one pass over the row for each bit,
  # where a sort of the vocabulary takes hundreds.
  top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  # Without the barriers XLA may fuse both into the loop and compute them again in every pass.
  p_BV = jax.lax.optimization_barrier(jnp.exp(logits_BV - top_B1))
  ordered_BV = jax.lax.optimization_barrier(_sortable_bits(logits_BV))
  # The floor is for a top_p that vanishes: an empty set would have enough mass for a target of 0.
  wanted_B1 = jnp.maximum(top_p * jnp.sum(p_BV, axis=-1, keepdims=True), 1e-30)
  def bit(i: jax.Array, found_B1: jax.Array) -> jax.Array:
    # From the highest bit on: a bit stays if the logits from the number with it on have the mass.
    higher_B1 = found_B1 | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    mass_B1 = jnp.sum(jnp.where(ordered_BV >= higher_B1, p_BV, 0.0), axis=-1, keepdims=True)
    return jnp.where(mass_B1 >= wanted_B1, higher_B1, found_B1)
  found_B1 = jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(top_B1, jnp.uint32))
  return _float_of(found_B1)


def _sortable_bits(x: jax.Array) -> jax.Array:
  """uint32 numbers in the order of the float32 numbers `x`."""
  # Floats are a sign and a magnitude. To sort as integers, negative numbers have all bits flipped,
  # which reverses their order, and others the sign bit, which puts them above.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))


def _float_of(ordered: jax.Array) -> jax.Array:
  """The float32 numbers of `_sortable_bits`: its inverse."""
  turned = jnp.where(ordered >> 31 == 1, jnp.uint32(0x80000000), jnp.uint32(0xFFFFFFFF))
  return jax.lax.bitcast_convert_type(ordered ^ turned, jnp.float32)


def _uniform(key_B2: jax.Array, index_B: jax.Array) -> jax.Array:
  """One number in [0, 1) for each row, a function of its key and the token's index alone."""
  # A key for each row and not for the batch: the draw is the same in any slot and any batch.
  def row(key_2: jax.Array, index: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key_2), index)
    return jax.random.uniform(key, (), jnp.float32)
  return jax.vmap(row)(key_B2, index_B)


GROUP = 128  # tokens of the vocabulary that are added up together


def _pick(logits_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(the token where the running sum of probabilities passes `uniform`, its log-probability).

  The token is int32 [B] and its log-probability float32 nats.
  """
  # One uniform number and not a Gumbel noise for each token: V random numbers cost more than a sum.
  # The group is found first and then the token in it, so running sums have V / GROUP + GROUP
  # entries in place of V.
  B, V = logits_BV.shape
  top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  p_BV = jnp.pad(jnp.exp(logits_BV - top_B1), ((0, 0), (0, -V % GROUP)))
  # Sums and probabilities have several readers. A barrier makes XLA compute them once.
  p_Bgn = jax.lax.optimization_barrier(p_BV.reshape(B, -1, GROUP))
  mass_Bg = jax.lax.optimization_barrier(jnp.sum(p_Bgn, axis=-1))
  upto_Bg = jnp.cumsum(mass_Bg, axis=-1)
  total_B = upto_Bg[:, -1]
  aim_B = uniform_B * total_B
  # The aim is a part of the sum as rounded, so that a uniform below 1 stays below the total.
  group_B = _first_beyond(upto_Bg, mass_Bg, aim_B)
  own_Bn = jnp.take_along_axis(p_Bgn, group_B[:, None, None], axis=1)[:, 0]
  rest_B = aim_B - (_at(upto_Bg, group_B) - _at(mass_Bg, group_B))
  token_B = group_B * GROUP + _first_beyond(jnp.cumsum(own_Bn, axis=-1), own_Bn, rest_B)
  return token_B.astype(jnp.int32), _at(logits_BV, token_B) - top_B1[:, 0] - jnp.log(total_B)


def _first_beyond(upto_Bn: jax.Array, mass_Bn: jax.Array, aim_B: jax.Array) -> jax.Array:
  """The first index with a mass whose running sum is above the aim, or the last with a mass."""
  # Running sums are rounded and may even fall. Excluded tokens have mass 0, and the condition on
  # the mass guarantees that rounding never picks one.
  n = mass_Bn.shape[-1]
  place_1n = jnp.arange(n, dtype=jnp.int32)[None]
  beyond_Bn = (upto_Bn > aim_B[:, None]) & (mass_Bn > 0)
  first_B = jnp.min(jnp.where(beyond_Bn, place_1n, n), axis=-1)
  return jnp.where(first_B < n, first_B, jnp.max(jnp.where(mass_Bn > 0, place_1n, 0), axis=-1))


def _at(x_BV: jax.Array, index_B: jax.Array) -> jax.Array:
  """The entry of each row at the row's index."""
  return jnp.take_along_axis(x_BV, index_B[:, None], axis=1)[:, 0]


def _argmax(x_BV: jax.Array) -> jax.Array:
  """The index of each row's largest entry, the first of equals."""
  # XLA's argmax on a CPU takes the time of many passes; a maximum and a minimum are two.
  best_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
  V = x_BV.shape[-1]
  return jnp.min(jnp.where(x_BV == best_B1, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def draw(logits_BV: jax.Array, key_B2: jax.Array, index_B: jax.Array,
         sampling: Sampling) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(token_B, its log-probability under the model, its log-probability as sampled).

  Log-probabilities are nats, float32. The model's is untempered and untruncated, because the
  trainer computes that one. The other is under the distribution after temperature, truncations and
  the ban on stop ids before `min_tokens`; it is 0 where sampling is greedy.
  """
  V = logits_BV.shape[-1]
  allowed_BV = logits_BV
  if sampling.min_tokens and sampling.stop_ids:
    # The ban is masking before truncation, so top-k and top-p count only tokens that are allowed.
    stop_V = jnp.isin(jnp.arange(V), jnp.array(sampling.stop_ids, jnp.int32))
    early_B1 = (index_B < sampling.min_tokens)[:, None]
    allowed_BV = jnp.where(stop_V[None] & early_B1, -jnp.inf, logits_BV)
  if sampling.temperature > 0:
    token_B, behaviour_logp_B = _pick(truncate(allowed_BV, sampling), _uniform(key_B2, index_B))
  else:
    token_B = _argmax(allowed_BV)
    behaviour_logp_B = jnp.zeros(token_B.shape, jnp.float32)
  if sampling.plain():
    return token_B, behaviour_logp_B, behaviour_logp_B
  logp_B = _at(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)
  return token_B, logp_B, behaviour_logp_B


class Weights(NamedTuple):
  """A model's weights in the form that decoding reads: matrices in the activations' type."""
  params: Params      # layers unstacked
  head_DV: jax.Array  # the unembedding, transposed


def prepare(model: models.Model, params: Params) -> Weights:
  """The Weights of float32 parameters, for all tokens of a call."""
  # Each token reads all weights. Cast once, they are half the bytes in bfloat16. Norms' scales stay
  # float32, as in the trainer, so the numbers are its own to the last bit.
  params = jax.tree.map(lambda w, kept: w.astype(kept.dtype), params,
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
    place_PC = jnp.broadcast_to(i * chunk + jnp.arange(chunk, dtype=jnp.int32), (P, chunk))
    return model.apply(weights.params, tokens_PC, place_PC, jnp.ones_like(place_PC), cache)[1]
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
  def start(old: jax.Array, own: jax.Array) -> jax.Array:
    own = jnp.take(own, source_B, axis=0)
    rest = own.shape[1:]
    kept = jax.lax.slice(old, (0,) * old.ndim, own.shape)
    new = new_B.reshape(-1, *(1 for _ in rest))
    return jax.lax.dynamic_update_slice(old, jnp.where(new, own, kept), (0,) * old.ndim)
  return _entered(slots, jax.tree.map(start, slots.cache, prompts), new_B, token_B, position_B,
                  key_B2)


def admit_paged(slots: Slots, prompts: tuple[caches.KV, ...], from_M: jax.Array, to_M: jax.Array,
                new_B: jax.Array, token_B: jax.Array, position_B: jax.Array,
                key_B2: jax.Array) -> Slots:
  """`admit` for a cache in pages: copies page from_M of the prompts to page to_M of the cache.

  The prompts' pages are numbered across all prompts. A `to_M` beyond the cache's pages copies
  nothing. The host sets the tables.
  """
  def pages(old_KNSH: jax.Array, own_PKSH: jax.Array) -> jax.Array:
    S, H = old_KNSH.shape[2:]
    P, K, W, _ = own_PKSH.shape
    own_KNSH = own_PKSH.reshape(P, K, W // S, S, H).swapaxes(0, 1).reshape(K, -1, S, H)
    # M is fixed when compiled. The host fills unused entries with an index that "drop" ignores.
    return old_KNSH.at[:, to_M].set(own_KNSH[:, from_M].astype(old_KNSH.dtype), mode="drop")
  # Slots are the last axis of a KV's keys, while pages hold a token's keys together.
  layers = tuple(caches.Pages(pages(old.k_KNSH, own.k_BKHS.swapaxes(2, 3)),
                               pages(old.v_KNSH, own.v_BKSH))
                 for old, own in zip(slots.cache.layers, prompts, strict=True))
  return _entered(slots, slots.cache._replace(layers=layers), new_B, token_B, position_B, key_B2)


def _entered(slots: Slots, cache: caches.Cache, new_B: jax.Array, token_B: jax.Array,
             position_B: jax.Array, key_B2: jax.Array) -> Slots:
  """The slots with another cache, and with the state of a row's start where new_B."""
  return Slots(cache, jnp.where(new_B, token_B, slots.token_B),
               jnp.where(new_B, position_B, slots.position_B), jnp.where(new_B, 0, slots.drawn_B),
               jnp.where(new_B[:, None], key_B2, slots.key_B2))


def grow(slots: Slots, length: int) -> Slots:
  """The slots with a cache of `length` tokens for each row, at least as many as now."""
  def longer(kv: caches.KV) -> caches.KV:
    return caches.KV(*(x if x is None else jnp.pad(
        x, [(0, length - x.shape[axis] if at == axis else 0) for at in range(x.ndim)])
        for x, axis in zip(kv, caches.SLOT_AXES, strict=True)))
  return slots._replace(cache=tuple(map(longer, slots.cache)))


def shorten(slots: Slots, length: int) -> Slots:
  """The slots with a cache of `length` tokens for each row, at most as many as now."""
  def shorter(kv: caches.KV) -> caches.KV:
    return caches.KV(*(x if x is None else jax.lax.slice_in_dim(x, 0, length, axis=axis)
                       for x, axis in zip(kv, caches.SLOT_AXES, strict=True)))
  return slots._replace(cache=tuple(map(shorter, slots.cache)))


def shrink(slots: Slots, kept_b: jax.Array) -> Slots:
  """The slots at the indices kept_b, in their order."""
  return jax.tree.map(lambda x: jnp.take(x, kept_b, axis=0), slots)


def decode(model: models.Model, sampling: Sampling, most: int, weights: Weights, slots: Slots,
           alive_B: jax.Array, enough: jax.Array) -> tuple[Slots, Written]:
  """(Slots, Written) after up to `most` tokens for each slot that is alive.

  It ends early when at most `enough` rows are alive, or when a row has filled its cache.
  """
  B, T = slots.token_B.shape[0], sampling.max_tokens
  # No token has id -1, so it stands for no stop ids: no row then ends before max_tokens.
  stop_ids = jnp.array(sampling.stop_ids or (-1,), jnp.int32)

  # Many tokens in one dispatch, because the host's answer would take longer than a step. It returns
  # early where only the host can go on: to admit rows, shrink the batch or find more memory.
  def more(carry: tuple) -> jax.Array:
    i, slots, alive_B, _ = carry
    full_B = alive_B & (slots.position_B >= caches.room(slots.cache))
    return (i < most) & (jnp.sum(alive_B) > enough) & ~jnp.any(full_B)

  # Ended rows are computed too, since shapes are static, but their token and position stay.
  def step(carry: tuple) -> tuple:
    i, slots, alive_B, out = carry
    features_B1D, cache = model.apply(
        weights.params, slots.token_B[:, None], slots.position_B[:, None],
        jnp.ones((B, 1), jnp.int32), slots.cache)
    token_B, *logps = draw(_logits(weights, features_B1D[:, 0]), slots.key_B2, slots.drawn_B,
                           sampling)
    def put(old_BN: jax.Array, new_B: jax.Array) -> jax.Array:
      new_B = jnp.where(alive_B, new_B, 0).astype(old_BN.dtype)
      return jax.lax.dynamic_update_slice(old_BN, new_B[:, None], (0, i))
    one_B = alive_B.astype(jnp.int32)
    stopped_B = alive_B & jnp.isin(token_B, stop_ids)
    out = Written(*(put(x, y) for x, y in zip(out[:3], (token_B, *logps), strict=True)),
                  out.count_B + one_B, out.stopped_B | stopped_B)
    drawn_B = slots.drawn_B + one_B
    slots = slots._replace(cache=cache, token_B=jnp.where(alive_B, token_B, slots.token_B),
                           position_B=slots.position_B + one_B, drawn_B=drawn_B)
    return i + 1, slots, alive_B & ~stopped_B & (drawn_B < T), out

  floats = jnp.zeros((B, most), jnp.float32)
  out = Written(jnp.zeros((B, most), jnp.int32), floats, floats, jnp.zeros(B, jnp.int32),
                jnp.zeros(B, bool))
  _, slots, _, out = jax.lax.while_loop(more, step, (jnp.int32(0), slots, alive_B, out))
  return slots, out
