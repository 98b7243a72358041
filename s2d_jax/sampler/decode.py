"""What the device runs: prefill, admit, decode, grow and shrink, with the trainer's forward code.

A slot is one row of an explicit cache. A prompt is read once; its part of the cache is copied to
the slot of each of its samples, whose next token to read is the prompt's last. Decoding reads a
token of every slot and draws the next one, many times in one dispatch. A token is drawn by one
uniform number, a function of the row's own key and the token's index, so a row does not depend on
its neighbours, its slot or when it came to it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import keys, models, sharding
from s2d_jax.keys import Key
from s2d_jax.models import caches, decoder


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
  stop_ids: tuple
  stop_strings: tuple = ()

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

  def plain(self):
    """Is a token drawn from the model's own distribution, as it is?"""
    banned = self.min_tokens and self.stop_ids
    return (self.temperature, self.top_p, self.top_k, self.min_p) == (1, 1, 0, 0) and not banned


class Slots(NamedTuple):
  """What the device keeps of B rows."""
  cache: tuple        # of caches.KV, or a caches.Paged
  token_B: jax.Array  # to be read next
  position_B: jax.Array  # its place in the row: so many tokens are in the cache
  drawn_B: jax.Array  # response tokens so far
  key_B2: jax.Array   # names the row's randomness


class Written(NamedTuple):
  """What a dispatch gives the host, the same on every process; 0 after a row's end."""
  tokens_BN: jax.Array      # int32
  logp_BN: jax.Array        # float32 nats, under the model
  behaviour_logp_BN: jax.Array  # float32 nats, under the distribution drawn from
  count_B: jax.Array        # int32 tokens
  stopped_B: jax.Array      # bool: the last one is a stop id


def truncate(logits_BV, sampling):
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
    least_B1 = (_least_of_sorted(best_Bn, sampling.top_p) if narrow
                else _least(logits_BV, sampling.top_p))
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.min_p > 0:
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
    logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
  return logits_BV


def _least_of_sorted(best_Bn, top_p):
  """The smallest logit that top-p keeps, of logits in falling order that have all the mass."""
  p_Bn = jax.nn.softmax(best_Bn, axis=-1)
  kept_Bn = jnp.cumsum(p_Bn, axis=-1) - p_Bn < top_p  # the mass before this token
  return jnp.min(jnp.where(kept_Bn, best_Bn, best_Bn[:, :1]), axis=-1, keepdims=True)


def _least(logits_BV, top_p):
  """The same of logits in any order: the largest number that mass `top_p` is at or above.

  Its 32 bits are found one by one, each by one pass over the row, where a sort of the vocabulary
  takes hundreds.
  """
  top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  p_BV = jax.lax.optimization_barrier(jnp.exp(logits_BV - top_B1))
  ordered_BV = jax.lax.optimization_barrier(_ordered(logits_BV))
  # Something always, or no token at all would be enough where top_p is 0.
  wanted_B1 = jnp.maximum(top_p * jnp.sum(p_BV, axis=-1, keepdims=True), 1e-30)
  def bit(i, found_B1):
    higher_B1 = found_B1 | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    mass_B1 = jnp.sum(jnp.where(ordered_BV >= higher_B1, p_BV, 0.0), axis=-1, keepdims=True)
    return jnp.where(mass_B1 >= wanted_B1, higher_B1, found_B1)
  found_B1 = jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(top_B1, jnp.uint32))
  return _number(found_B1)


def _ordered(x):
  """uint32 in the order of float32: negative numbers with every bit turned, others with the sign's.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))


def _number(ordered):
  """The float32 that `_ordered` maps there."""
  turned = jnp.where(ordered >> 31 == 1, jnp.uint32(0x80000000), jnp.uint32(0xFFFFFFFF))
  return jax.lax.bitcast_convert_type(ordered ^ turned, jnp.float32)


def _uniform(key_B2, index_B):
  """One number in [0, 1) a row, a function of its key and the token's index alone."""
  def row(key_2, index):
    key = jax.random.fold_in(jax.random.wrap_key_data(key_2), index)
    return jax.random.uniform(key, (), jnp.float32)
  return jax.vmap(row)(key_B2, index_B)


GROUP = 128  # tokens of the vocabulary that are added up together


def _pick(logits_BV, uniform_B):
  """(the token where the running sum of probabilities passes `uniform`, its log-probability).

  First the group of tokens, then the one in it: a sum for each group, not one for each token.
  """
  B, V = logits_BV.shape
  top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  p_BV = jnp.pad(jnp.exp(logits_BV - top_B1), ((0, 0), (0, -V % GROUP)))
  p_Bgn = jax.lax.optimization_barrier(p_BV.reshape(B, -1, GROUP))
  mass_Bg = jax.lax.optimization_barrier(jnp.sum(p_Bgn, axis=-1))
  upto_Bg = jnp.cumsum(mass_Bg, axis=-1)
  total_B = upto_Bg[:, -1]
  aim_B = uniform_B * total_B
  group_B = _passed(upto_Bg, mass_Bg, aim_B)
  own_Bn = jnp.take_along_axis(p_Bgn, group_B[:, None, None], axis=1)[:, 0]
  rest_B = aim_B - (_at(upto_Bg, group_B) - _at(mass_Bg, group_B))
  token_B = group_B * GROUP + _passed(jnp.cumsum(own_Bn, axis=-1), own_Bn, rest_B)
  return token_B.astype(jnp.int32), _at(logits_BV, token_B) - top_B1[:, 0] - jnp.log(total_B)


def _passed(upto_Bn, mass_Bn, aim_B):
  """The first place with a mass where the running sum is beyond the aim, or the last with a mass.

  Running sums are rounded, and need not even rise: a place that has no mass is never the one.
  """
  n = mass_Bn.shape[-1]
  place_1n = jnp.arange(n, dtype=jnp.int32)[None]
  beyond_Bn = (upto_Bn > aim_B[:, None]) & (mass_Bn > 0)
  first_B = jnp.min(jnp.where(beyond_Bn, place_1n, n), axis=-1)
  return jnp.where(first_B < n, first_B, jnp.max(jnp.where(mass_Bn > 0, place_1n, 0), axis=-1))


def _at(x_BV, index_B):
  return jnp.take_along_axis(x_BV, index_B[:, None], axis=1)[:, 0]


def _greatest(x_BV):
  """argmax, the first of equals; as two plain passes, a CPU's argmax being many."""
  best_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
  V = x_BV.shape[-1]
  return jnp.min(jnp.where(x_BV == best_B1, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def draw(logits_BV, key_B2, index_B, sampling):
  """(a token a row, its log-probability under the model, that under what it was drawn from).

  Nats, float32. The model's is untempered and untruncated, for that is what the trainer computes;
  the other is of the distribution after temperature, truncations and the ban on stop ids before
  `min_tokens`, 0 where sampling is greedy.
  """
  V = logits_BV.shape[-1]
  allowed_BV = logits_BV
  if sampling.min_tokens and sampling.stop_ids:
    stop_V = jnp.isin(jnp.arange(V), jnp.array(sampling.stop_ids, jnp.int32))
    early_B1 = (index_B < sampling.min_tokens)[:, None]
    allowed_BV = jnp.where(stop_V[None] & early_B1, -jnp.inf, logits_BV)
  if sampling.temperature > 0:
    token_B, behaviour_logp_B = _pick(truncate(allowed_BV, sampling), _uniform(key_B2, index_B))
  else:
    token_B = _greatest(allowed_BV)
    behaviour_logp_B = jnp.zeros(token_B.shape, jnp.float32)
  if sampling.plain():
    return token_B, behaviour_logp_B, behaviour_logp_B
  logp_B = _at(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)
  return token_B, logp_B, behaviour_logp_B


class Weights(NamedTuple):
  """A model's weights as decoding reads them, over and over: matrices in the activations' type."""
  params: dict
  head_DV: jax.Array  # the unembedding, as its product reads it


def prepare(model, params):
  """The Weights of parameters, each layer's own: a stack would have to be copied from.

  Norms' scales stay as they are, as in the trainer, so the numbers are the same to the last bit.
  """
  params = jax.tree.map(lambda w, kept: w.astype(kept.dtype), params,
                        models.frozen_shapes(model.config))
  return Weights(decoder.unstacked(params, model.config), model.unembed(params).T)


def _logits(weights, features_BD):
  logits_BV = jnp.einsum("BD,DV->BV", features_BD, weights.head_DV,
                         preferred_element_type=jnp.float32)
  return sharding.constrain(logits_BV, "batch", "vocab")


def prefill(model, chunk, dtype, weights, prompt_PW, longest):
  """The cache of P prompts, read `chunk` tokens at a time up to the longest; W is a multiple."""
  P, W = prompt_PW.shape
  def read(i, cache):
    tokens_PC = jax.lax.dynamic_slice_in_dim(prompt_PW, i * chunk, chunk, axis=1)
    place_PC = jnp.broadcast_to(i * chunk + jnp.arange(chunk, dtype=jnp.int32), (P, chunk))
    return model.apply(weights.params, tokens_PC, place_PC, jnp.ones_like(place_PC), cache)[1]
  return jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, read,
                           caches.empty_cache(model.config, P, W, dtype))


def empty(cache, batch):
  """Slots of nobody, with an empty cache."""
  zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
  return Slots(cache, zeros(batch), zeros(batch), zeros(batch), jnp.zeros((batch, 2), jnp.uint32))


def admit(slots, prompts, source_B, new_B, token_B, position_B, key_B2):
  """The slots with new rows where new_B: slot b's is a sample of the prompt in row source_B[b].

  token_B is the prompt's last, at position_B; what the cache has from there on is written before it
  is read.
  """
  def start(old, own):
    own = jnp.take(own, source_B, axis=0)
    rest = own.shape[1:]
    kept = jax.lax.slice(old, (0,) * old.ndim, own.shape)
    new = new_B.reshape(-1, *(1 for _ in rest))
    return jax.lax.dynamic_update_slice(old, jnp.where(new, own, kept), (0,) * old.ndim)
  return _entered(slots, jax.tree.map(start, slots.cache, prompts), new_B, token_B, position_B,
                  key_B2)


def admit_paged(slots, prompts, from_M, to_M, new_B, token_B, position_B, key_B2):
  """`admit` to a cache in pages: page from_M of the prompts, counted through, goes to page to_M.

  Where `to` is no page nothing goes. The host sets the tables.
  """
  def pages(old_KNSH, own_PKSH):
    S, H = old_KNSH.shape[2:]
    P, K, W, _ = own_PKSH.shape
    own_KNSH = own_PKSH.reshape(P, K, W // S, S, H).swapaxes(0, 1).reshape(K, -1, S, H)
    return old_KNSH.at[:, to_M].set(own_KNSH[:, from_M].astype(old_KNSH.dtype), mode="drop")
  layers = tuple(caches.Pages(pages(old.k_KNSH, own.k_BKHS.swapaxes(2, 3)),
                               pages(old.v_KNSH, own.v_BKSH))
                 for old, own in zip(slots.cache.layers, prompts, strict=True))
  return _entered(slots, slots.cache._replace(layers=layers), new_B, token_B, position_B, key_B2)


def _entered(slots, cache, new_B, token_B, position_B, key_B2):
  return Slots(cache, jnp.where(new_B, token_B, slots.token_B),
               jnp.where(new_B, position_B, slots.position_B), jnp.where(new_B, 0, slots.drawn_B),
               jnp.where(new_B[:, None], key_B2, slots.key_B2))


def grow(slots, length):
  """The same rows with room for `length` tokens."""
  def longer(kv):
    return caches.KV(*(x if x is None else jnp.pad(
        x, [(0, length - x.shape[axis] if at == axis else 0) for at in range(x.ndim)])
        for x, axis in zip(kv, caches.SLOT_AXES, strict=True)))
  return slots._replace(cache=tuple(map(longer, slots.cache)))


def shorten(slots, length):
  """The same rows with room for `length` tokens, which are not more than they have."""
  def shorter(kv):
    return caches.KV(*(x if x is None else jax.lax.slice_in_dim(x, 0, length, axis=axis)
                       for x, axis in zip(kv, caches.SLOT_AXES, strict=True)))
  return slots._replace(cache=tuple(map(shorter, slots.cache)))


def shrink(slots, kept_b):
  """The rows kept_b alone."""
  return jax.tree.map(lambda x: jnp.take(x, kept_b, axis=0), slots)


def decode(model, sampling, most, weights, slots, alive_B, enough):
  """(Slots, Written) after up to `most` tokens more of the slots that are alive.

  It ends early when no more than `enough` are left, or when a row has filled its room.
  """
  B, T = slots.token_B.shape[0], sampling.max_tokens
  stop_ids = jnp.array(sampling.stop_ids or (-1,), jnp.int32)

  def more(carry):
    i, slots, alive_B, _ = carry
    full_B = alive_B & (slots.position_B >= caches.room(slots.cache))
    return (i < most) & (jnp.sum(alive_B) > enough) & ~jnp.any(full_B)

  def step(carry):
    i, slots, alive_B, out = carry
    features_B1D, cache = model.apply(
        weights.params, slots.token_B[:, None], slots.position_B[:, None],
        jnp.ones((B, 1), jnp.int32), slots.cache)
    token_B, *logps = draw(_logits(weights, features_B1D[:, 0]), slots.key_B2, slots.drawn_B,
                           sampling)
    def put(old_BN, new_B):
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
