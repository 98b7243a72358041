"""How a token is chosen: the settings, the truncation of a distribution, and one sample of it.

A token is chosen with one uniform number, a function of the row's own key and the token's index. A
row therefore does not depend on its neighbours, on its slot or on the time at which it is admitted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax import keys, sharding
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.sampler import one_pass

Decode = Callable[[np.ndarray], str]  # token ids -> text

# The fields of a Sampling that choose no token: how many there are, and where a response ends.
# Whether the vocabulary excludes a token depends on the model, so `plain` looks at it by itself.
LENGTHS = ("samples_per_prompt", "max_tokens", "min_tokens", "stop_ids", "stop_strings",
           "vocabulary")


class Sampling(NamedTuple):
  """How to sample; hashable, so it is part of the compiled program.

  The defaults sample from the model's own distribution. temperature 0 is greedy. top_p 1, top_k 0
  and min_p 0 switch a truncation off; they apply to the tempered distribution in the order top-k,
  top-p, min-p, as in transformers. Lengths are tokens. A stop id ends a response and belongs to
  it, and so does the token that completes a stop string. Ids from `vocabulary` on are never drawn;
  0: all may be. Many models embed more ids than their tokenizer has tokens, and such an id would be
  learned from without being seen in any text.
  """
  max_tokens: int
  stop_ids: tuple[int, ...] = ()
  samples_per_prompt: int = 1
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  min_p: float = 0.0
  min_tokens: int = 0
  stop_strings: tuple[str, ...] = ()
  vocabulary: int = 0

  KEYS = {  # the block of a config that becomes a Sampling; the tokenizer gives the other two
      "samples_per_prompt": keys.at_least(1),
      # Logits that are divided by less than this overflow.
      "temperature": Key(lambda x: x == 0 or 1e-4 <= x < math.inf,
                         "choose 0 (greedy), or 0.0001 or more", neutral=1.0),
      "top_p": Key(lambda p: 0 < p <= 1, "choose it above 0, up to 1 (off)", neutral=1.0),
      "top_k": Key(lambda k: k >= 0 and k % 1 == 0, "choose 0 (off) or more", neutral=0),
      "min_p": Key(lambda p: 0 <= p <= 1, "choose it from 0 (off) to 1", neutral=0.0),
      "max_tokens": keys.at_least(1),
      "min_tokens": keys.at_least(0, neutral=0),
      "stop_strings": Key(lambda texts: isinstance(texts, tuple) and all(
          isinstance(text, str) and text for text in texts),
          "give a tuple of texts, none of them empty", neutral=())}

  def padded(self, ids: int) -> bool:
    """True if some of a model's ids have no token."""
    return 0 < self.vocabulary < ids

  def plain(self, ids: int = 0) -> bool:
    """True if tokens are drawn from the own distribution of a model of `ids` ids, unchanged.

    0: of a model whose ids all have tokens.
    """
    # Then one log-probability serves as both of `sample_token`, and a pass over the vocabulary is
    # saved. Every field counts that does not say how many tokens there are or where they end, so a
    # new truncation cannot be forgotten here: without a neutral value its samples are never plain.
    changes = [name for name in self._fields
               if name not in LENGTHS and getattr(self, name) != self.KEYS[name].neutral]
    bans_stops = self.min_tokens and self.stop_ids
    return not (changes or bans_stops or self.padded(ids))


def check_sampling(sampling: Sampling) -> None:
  """Checks a Sampling, or a config's block of one.

  Raises:
    InputError: a field is out of its range; the message begins with its name.
  """
  keys.check_values(sampling, Sampling.KEYS)
  # Each key's range is a table's; a relation between two keys is not in it.
  if sampling.min_tokens > sampling.max_tokens:
    raise InputError(f"min_tokens is {sampling.min_tokens}: choose at most max_tokens, "
                     f"{sampling.max_tokens}.")


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
    least_B1 = (_top_p_threshold_of_sorted(best_Bn, logits_BV, sampling.top_p) if narrow
                else _top_p_threshold(logits_BV, sampling.top_p))
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.min_p > 0:
    # A ratio of probabilities is a difference of logits, so no softmax is needed.
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
    logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
  return logits_BV


def _top_p_threshold_of_sorted(best_Bn: jax.Array, logits_BV: jax.Array,
                               top_p: float) -> jax.Array:
  """The smallest logit that top-p keeps, of the largest ones in falling order."""
  # All that is left has the mass: of several logits equal to the k-th, `best_Bn` has not all.
  p_Bn = jnp.exp(best_Bn - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True))
  inside_Bn = jnp.cumsum(p_Bn, axis=-1) - p_Bn < top_p  # the mass before this token
  return jnp.min(jnp.where(inside_Bn, best_Bn, best_Bn[:, :1]), axis=-1, keepdims=True)


def _top_p_threshold(logits_BV: jax.Array, top_p: float) -> jax.Array:
  """The largest number such that the logits at or above it hold mass `top_p`; float32 [B, 1]."""
  # A bisection of the 32 bits of a float is exact. It takes one pass over the row for each bit,
  # where a sort of the vocabulary takes hundreds.
  top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  # Without the barriers XLA may fuse both into the loop and compute them again in every pass.
  p_BV = jax.lax.optimization_barrier(jnp.exp(logits_BV - top_B1))
  ordered_BV = jax.lax.optimization_barrier(_sortable_bits(logits_BV))
  # The floor is for a top_p that vanishes: an empty set would have enough mass for a target of 0.
  target_B1 = jnp.maximum(top_p * jnp.sum(p_BV, axis=-1, keepdims=True), 1e-30)
  def bit(i: jax.Array, found_B1: jax.Array) -> jax.Array:
    # From the highest bit on: the bit is set if the logits at or above the number with it have
    # enough mass.
    higher_B1 = found_B1 | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    mass_B1 = jnp.sum(jnp.where(ordered_BV >= higher_B1, p_BV, 0.0), axis=-1, keepdims=True)
    return jnp.where(mass_B1 >= target_B1, higher_B1, found_B1)
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
  flipped = jnp.where(ordered >> 31 == 1, jnp.uint32(0x80000000), jnp.uint32(0xFFFFFFFF))
  return jax.lax.bitcast_convert_type(ordered ^ flipped, jnp.float32)


def _uniform(key_B2: jax.Array, index_B: jax.Array) -> jax.Array:
  """One number in [0, 1) for each row, a function of its key and the token's index alone."""
  # A key for each row and not for the batch: the token is the same in any slot and any batch.
  def row(key_2: jax.Array, index: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key_2), index)
    return jax.random.uniform(key, (), jnp.float32)
  return jax.vmap(row)(key_B2, index_B)


GROUP = 128  # tokens of the vocabulary that are added up together
_LEAST_GROUP = 8  # every device gets the sum of each group: smaller ones would save little


def _group_size(vocabulary: int) -> int:
  """GROUP, or fewer where devices split the vocabulary and would share a group."""
  shard = vocabulary // sharding.shards("vocab", vocabulary)
  # With a shared group each device would get the probabilities of all words.
  size = math.gcd(shard, GROUP)
  return size if GROUP < shard < vocabulary and size >= _LEAST_GROUP else GROUP


def _pick(logits_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(the token where the running sum of probabilities passes `uniform`, its log-probability).

  The token is int32 [B] and its log-probability float32 nats.
  """
  if one_pass.applies(logits_BV.shape[-1]):
    return one_pass.pick(logits_BV, uniform_B)
  # One uniform number and not a Gumbel noise for each token: V random numbers cost more than a sum.
  # The group is found first and then the token in it, so running sums have V / size + size entries
  # in place of V.
  B, V = logits_BV.shape
  size = _group_size(V)
  top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  p_BV = jnp.pad(jnp.exp(logits_BV - top_B1), ((0, 0), (0, -V % size)))
  # Sums and probabilities have several readers. A barrier makes XLA compute them once.
  p_Bgn = jax.lax.optimization_barrier(p_BV.reshape(B, -1, size))
  # Whole on each device, or every step of the search below would be a message.
  mass_Bg = sharding.constrain(jnp.sum(p_Bgn, axis=-1), "batch", "time")
  mass_Bg = jax.lax.optimization_barrier(mass_Bg)
  upto_Bg = jnp.cumsum(mass_Bg, axis=-1)
  total_B = upto_Bg[:, -1]
  aim_B = uniform_B * total_B
  # The aim is a part of the sum as rounded, so that a uniform below 1 stays below the total.
  group_B = _first_beyond(upto_Bg, mass_Bg, aim_B)
  group_Bn = jnp.take_along_axis(p_Bgn, group_B[:, None, None], axis=1)[:, 0]
  remaining_B = aim_B - (_at(upto_Bg, group_B) - _at(mass_Bg, group_B))
  token_B = group_B * size + _first_beyond(jnp.cumsum(group_Bn, axis=-1), group_Bn, remaining_B)
  return token_B.astype(jnp.int32), _at(logits_BV, token_B) - top_B1[:, 0] - jnp.log(total_B)


def _first_beyond(upto_Bn: jax.Array, mass_Bn: jax.Array, aim_B: jax.Array) -> jax.Array:
  """The first index with a mass whose running sum is above the aim, or the last with a mass."""
  # Running sums are rounded and may even fall. Excluded tokens have mass 0, and the condition on
  # the mass guarantees that rounding never picks one.
  n = mass_Bn.shape[-1]
  index_1n = jnp.arange(n, dtype=jnp.int32)[None]
  beyond_Bn = (upto_Bn > aim_B[:, None]) & (mass_Bn > 0)
  first_B = jnp.min(jnp.where(beyond_Bn, index_1n, n), axis=-1)
  return jnp.where(first_B < n, first_B, jnp.max(jnp.where(mass_Bn > 0, index_1n, 0), axis=-1))


def _at(x_BV: jax.Array, index_B: jax.Array) -> jax.Array:
  """The entry of each row at the row's index."""
  return jnp.take_along_axis(x_BV, index_B[:, None], axis=1)[:, 0]


def _argmax(x_BV: jax.Array) -> jax.Array:
  """The index of each row's largest entry, the first of equals."""
  # XLA's argmax on a CPU takes the time of many passes; a maximum and a minimum are two.
  best_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
  V = x_BV.shape[-1]
  return jnp.min(jnp.where(x_BV == best_B1, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def sample_token(logits_BV: jax.Array, key_B2: jax.Array, index_B: jax.Array,
                 sampling: Sampling) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(token_B, its log-probability under the model, its log-probability as sampled).

  Log-probabilities are nats, float32. The model's is untempered and untruncated, because the
  trainer computes that one. The other is under the distribution after temperature, truncations and
  the bans on stop ids before `min_tokens` and on ids without a token; it is 0 where sampling is
  greedy.

  Args:
    logits_BV: float32.
    key_B2: uint32, the key of each row.
    index_B: int32, the token's index in the row's response.
  """
  V = logits_BV.shape[-1]
  allowed_BV = logits_BV
  if sampling.min_tokens and sampling.stop_ids:
    # The ban is masking before truncation, so top-k and top-p count only tokens that are allowed.
    stop_V = jnp.isin(jnp.arange(V), jnp.array(sampling.stop_ids, jnp.int32))
    early_B1 = (index_B < sampling.min_tokens)[:, None]
    allowed_BV = jnp.where(stop_V[None] & early_B1, -jnp.inf, logits_BV)
  if sampling.padded(V):
    allowed_BV = jnp.where(jnp.arange(V) < sampling.vocabulary, allowed_BV, -jnp.inf)
  if sampling.temperature > 0:
    token_B, behaviour_logp_B = _pick(truncate(allowed_BV, sampling), _uniform(key_B2, index_B))
  else:
    token_B = _argmax(allowed_BV)
    behaviour_logp_B = jnp.zeros(token_B.shape, jnp.float32)
  if sampling.plain(V):
    return token_B, behaviour_logp_B, behaviour_logp_B
  logp_B = _at(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)
  return token_B, logp_B, behaviour_logp_B
