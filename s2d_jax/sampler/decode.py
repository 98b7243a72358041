"""Jitted prefill, fork and decode over an explicit cache, with the trainer's own forward code.

A prompt is read once; its cache is then copied to its G samples, which decode side by side until
every row has stopped. A token is drawn as argmax(logits + Gumbel noise), the noise a function of
the row's own key and the token's index, so a row does not depend on its neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import sharding
from s2d_jax.models import decoder


class Sampling(NamedTuple):
  """How to sample; hashable, so it is part of the compiled program.

  temperature 0 is greedy. top_p 1, top_k 0 and min_p 0 switch a truncation off; they apply to the
  tempered distribution in the order top-k, top-p, min-p, as in transformers. Lengths are tokens;
  a stop id ends a response and belongs to it.
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
    # What top-k left is sorted as it came, and has all the mass: no second sort of the vocabulary.
    best_Bn = best_Bn if narrow else -jnp.sort(-logits_BV, axis=-1)
    p_Bn = jax.nn.softmax(best_Bn, axis=-1)
    kept_Bn = jnp.cumsum(p_Bn, axis=-1) - p_Bn < sampling.top_p  # the mass before this token
    least_B1 = jnp.min(jnp.where(kept_Bn, best_Bn, best_Bn[:, :1]), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.min_p > 0:
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
    logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
  return logits_BV


def _noise(key_B2, index, V):
  """Gumbel noise [B, V], a function of each row's key and the token's index alone."""
  def row(key_2):
    key = jax.random.fold_in(jax.random.wrap_key_data(key_2), index)
    return jax.random.gumbel(key, (V,), jnp.float32)
  return jax.vmap(row)(key_B2)


def draw(logits_BV, key_B2, index, sampling):
  """One token a row, and its log-probability in nats under the untempered, untruncated model.

  Before `min_tokens` the stop ids cannot be drawn; the log-probability reported is the model's own
  all the same, for that is what the trainer computes.
  """
  V = logits_BV.shape[-1]
  allowed_BV = logits_BV
  if sampling.min_tokens:
    stop_V = jnp.isin(jnp.arange(V), jnp.array(sampling.stop_ids, jnp.int32))
    allowed_BV = jnp.where(stop_V[None] & (index < sampling.min_tokens), -jnp.inf, logits_BV)
  if sampling.temperature > 0:
    allowed_BV = truncate(allowed_BV, sampling) + _noise(key_B2, index, V)
  token_B = jnp.argmax(allowed_BV, axis=-1).astype(jnp.int32)
  logp_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=1)[:, 0]
  return token_B, logp_B


def _logits(model, params, features_BD):
  logits_BV = jnp.einsum("BD,VD->BV", features_BD, model.unembed(params).astype(features_BD.dtype),
                         preferred_element_type=jnp.float32)
  return sharding.constrain(logits_BV, "batch", "vocab")


def _prefill(model, params, prompt_PW, length_P):
  """Reads each prompt once: the logits after its last token, and the cache [L, P, W, K, H]."""
  P, W = prompt_PW.shape
  place_PW = jnp.broadcast_to(jnp.arange(W, dtype=jnp.int32)[None], (P, W))
  segments_PW = (place_PW < length_P[:, None]).astype(jnp.int32)
  # In the type of the activations: attention reads keys and values so, cached or not.
  cache = decoder.empty_cache(model.config, P, W, decoder.DTYPES[model.config.dtype])
  features_PWD, cache = model.apply(params, prompt_PW, place_PW, segments_PW, cache)
  last_PD = jnp.take_along_axis(features_PWD, (length_P - 1)[:, None, None], axis=1)[:, 0]
  return _logits(model, params, last_PD), cache


def _fork(cache, samples, extra):
  """Copies each prompt's cache to its samples and leaves `extra` empty slots behind it."""
  def rows(x, axis):
    return jnp.repeat(x, samples, axis=axis)
  def room(x, axis):
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])
  def kv(x_LPWKH):
    return sharding.constrain(room(rows(x_LPWKH, 1), 2),
                              "layer", "batch", "cache", "kv_heads", "head")
  return decoder.Cache(kv(cache.k_LBSKH), kv(cache.v_LBSKH), room(rows(cache.positions_BS, 0), 1),
                       room(rows(cache.segments_BS, 0), 1), cache.slot)


def program(model, sampling, mesh=None):
  """The jitted sampler of (params, prompt_PW, length_P, key_B2), B = P·G rows.

  Returns tokens_BT int32 (0 after the end), sampler_logp_BT float32 nats, length_B int32 and
  stopped_B bool: replicated, so that every host reads the same.
  """
  G, T = sampling.samples_per_prompt, sampling.max_tokens

  def sample(params, prompt_PW, length_P, key_B2):
    logits_PV, cache = _prefill(model, params, prompt_PW, length_P)
    cache = _fork(cache, G, T)
    B = logits_PV.shape[0] * G
    position_B = jnp.repeat(length_P, G)
    stop_ids = jnp.array(sampling.stop_ids or (-1,), jnp.int32)

    def alive(carry):
      t, _, _, _, _, _, done_B, _ = carry
      return (t < T) & ~jnp.all(done_B)

    def step(carry):
      t, logits_BV, cache, tokens_BT, logp_BT, length_B, done_B, stopped_B = carry
      token_B, logp_B = draw(logits_BV, key_B2, t, sampling)
      token_B = jnp.where(done_B, 0, token_B)
      tokens_BT = jax.lax.dynamic_update_slice(tokens_BT, token_B[:, None], (0, t))
      logp_BT = jax.lax.dynamic_update_slice(
          logp_BT, jnp.where(done_B, jnp.float32(0), logp_B)[:, None], (0, t))
      length_B = length_B + (~done_B).astype(jnp.int32)
      stopped_B = stopped_B | (~done_B & jnp.isin(token_B, stop_ids))
      features_B1D, cache = model.apply(
          params, token_B[:, None], (position_B + t)[:, None], jnp.ones((B, 1), jnp.int32), cache)
      return (t + 1, _logits(model, params, features_B1D[:, 0]), cache, tokens_BT, logp_BT,
              length_B, done_B | stopped_B, stopped_B)

    nobody_B = jnp.zeros(B, bool)
    carry = (jnp.int32(0), jnp.repeat(logits_PV, G, axis=0), cache, jnp.zeros((B, T), jnp.int32),
             jnp.zeros((B, T), jnp.float32), jnp.zeros(B, jnp.int32), nobody_B, nobody_B)
    _, _, _, tokens_BT, logp_BT, length_B, _, stopped_B = jax.lax.while_loop(alive, step, carry)
    return tokens_BT, logp_BT, length_B, stopped_B

  return jax.jit(sample, out_shardings=None if mesh is None else sharding.replicated(mesh))
