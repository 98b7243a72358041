"""Categorical distributions over a vocabulary, one a token: log-probability, entropy, expectation.

Logits are finite, of any float type, with the vocabulary on the last axis; targets are int32 token
ids. Results are float32, in nats, unreduced. The shapes in the names are the usual ones: a loss in
blocks calls these functions with one axis of tokens in place of [B, T].

How XLA is kept from slow or large programs is decided in this file alone, by `computed_once`,
`expectation` and `gradient_columns`. They change the program and not the value.
"""

import math

import jax
import jax.numpy as jnp

from s2d_jax import sharding

_COLUMNS = 256  # of a gradient at a time on a CPU, see `gradient_columns`


def log_prob(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  """Log-probability of each target, in nats.

    log π(a) = z(a) − log Σ_v exp z(v),   z the logits, a the target.
  """
  shifted_BTV, log_BT1 = shifted_logits(logits_BTV)
  # Compare and select: it fuses, and with the vocabulary split over devices each reads its own part
  # only. A gather would collect the whole vocabulary first.
  is_target_BTV = jax.nn.one_hot(targets_BT, logits_BTV.shape[-1], dtype=jnp.bool_)
  target_BT = jnp.sum(jnp.where(is_target_BTV, shifted_BTV, 0.0), axis=-1)
  return target_BT - log_BT1[..., 0]


def rank(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  """The place of each target among the tokens by probability, float32: 1 + the number above it."""
  is_target_BTV = jax.nn.one_hot(targets_BT, logits_BTV.shape[-1], dtype=jnp.bool_)
  target_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True, initial=-jnp.inf, where=is_target_BTV)
  return 1 + jnp.sum(logits_BTV > target_BT1, axis=-1, dtype=jnp.float32)


def entropy(logits_BTV: jax.Array) -> jax.Array:
  """Entropy at each position, in nats: between 0 and log V.

    H(π) = −Σ_v π(v) · log π(v).
  """
  if sharding.platform() == "gpu":
    return _entropy_of_sums(logits_BTV)
  logp_BTV = computed_once(log_softmax(logits_BTV))
  return -expectation(computed_once(jnp.exp(logp_BTV)), logp_BTV)


def _entropy_of_sums(logits_BTV: jax.Array) -> jax.Array:
  """`entropy` as log Σ e − Σ e·z / Σ e, where z are the shifted logits and e = exp z."""
  # Both sums are of the logits and the largest alone, so one kernel reads the logits for them and
  # for what `log_prob` adds up. The other form reads them again when the log-sum is there.
  shifted_BTV, log_BT1 = shifted_logits(logits_BTV)
  weight_BTV = jnp.exp(shifted_BTV)
  mean_BT = jnp.sum(weight_BTV * shifted_BTV, axis=-1) / jnp.sum(weight_BTV, axis=-1)
  return log_BT1[..., 0] - mean_BT


def negative_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  """−log π(a) at each position, in nats: the loss of supervised fine-tuning."""
  return -log_prob(logits_BTV, targets_BT)


def log_softmax(logits_BTV: jax.Array) -> jax.Array:
  """log π(v) of every token of the vocabulary, in nats."""
  shifted_BTV, log_BT1 = shifted_logits(logits_BTV)
  return shifted_BTV - log_BT1


def shifted_logits(logits_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(logits less the largest one, log Σ_v exp of these): log π(v) is their difference.

  Apart, because logits lose small digits where something large is subtracted from them at once.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  top_BT1 = computed_once(jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True)))
  # Everything after this line reads the shifted logits, so they take the place of the logits in
  # memory. Without it XLA for CPUs (jax 0.12) keeps both: another array of the vocabulary.
  shifted_BTV = computed_once(logits_BTV - top_BT1)
  log_BT1 = jnp.log(jnp.sum(jnp.exp(shifted_BTV), axis=-1, keepdims=True))
  return shifted_BTV, computed_once(log_BT1)


def log_sum_exp(logits_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(largest logit, log Σ_v exp(z(v) − largest)), [B, T, 1] each: their sum is log Σ_v exp z(v)."""
  top_BT1 = computed_once(jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True)))
  log_BT1 = jnp.log(jnp.sum(jnp.exp(logits_BTV - top_BT1), axis=-1, keepdims=True))
  return top_BT1, computed_once(log_BT1)


def compare(p_logits_BTV: jax.Array,
            q_logits_BTV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(p, q, log p/q) of every token of the vocabulary.

  The log-ratio is exactly 0 where the logits are equal.
  """
  log_p_BTV = log_softmax(p_logits_BTV)
  log_q_BTV = log_softmax(q_logits_BTV)
  return (computed_once(jnp.exp(log_p_BTV)), computed_once(jnp.exp(log_q_BTV)),
          computed_once(log_p_BTV - log_q_BTV))


def expectation(p_BTV: jax.Array, x_BTV: jax.Array) -> jax.Array:
  """Σ_v p(v) · x(v) at each position, in float32.

  On a CPU this is a product of matrices and not a sum of products: XLA (jax 0.10) would fuse exp,
  product and sum into a kernel that is fifty times slower. Elsewhere the sum needs no memory for
  its operands.
  """
  if sharding.platform() != "cpu":
    return jnp.sum(p_BTV * x_BTV, axis=-1)
  return jnp.einsum("...v,...v->...", p_BTV, x_BTV, precision="highest",
                    preferred_element_type=jnp.float32)


def computed_once(x: jax.Array) -> jax.Array:
  """The value x itself, computed once on a CPU.

  XLA's CPU backend otherwise fuses a value's computation into each of its readers, and so repeats
  exponentials. Other backends decide well by themselves.
  """
  return jax.lax.optimization_barrier(x) if sharding.platform() == "cpu" else x


def gradient_columns(width: int) -> int:
  """Columns of an unembedding's gradient, of `width` in all, that are added up at a time.

  A CPU cannot add a product to a sum in place. It forms the whole product first, another array of
  [vocabulary, width]; a few columns at a time keep that array small. Other backends take all.
  """
  return math.gcd(width, _COLUMNS) if sharding.platform() == "cpu" else width
