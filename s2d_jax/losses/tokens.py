"""What a categorical distribution says about one token: log-probability and entropy, in nats.

Logits are finite, [B, T, V], of any float type; targets are int32 token ids, [B, T]. Results are
float32, [B, T], unreduced.
"""

import jax
import jax.numpy as jnp

from s2d_jax import sharding


def log_prob(logits_BTV, targets_BT):
  """Log-probability of each target, in nats.

    log π(a) = z(a) − log Σ_v exp z(v),   z the logits, a the target.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  # Compare and select: it fuses, and with the vocabulary split over devices each reads its own part
  # only; a gather would collect the whole vocabulary first.
  target_BTV = jax.nn.one_hot(targets_BT, logits_BTV.shape[-1], dtype=jnp.bool_)
  logit_BT = jnp.sum(jnp.where(target_BTV, logits_BTV, 0.0), axis=-1)
  top_BT1, log_BT1 = log_sum(logits_BTV)
  return (logit_BT - top_BT1[..., 0]) - log_BT1[..., 0]


def expectation(p_BTV, x_BTV):
  """Σ_v p(v) · x(v) at each position, in float32.

  On a CPU a product of matrices and not a sum of products: XLA (jax 0.10) fuses exp, product and
  sum there into a kernel fifty times slower. Elsewhere the operands of the sum need no memory.
  """
  if sharding.platform() != "cpu":
    return jnp.sum(p_BTV * x_BTV, axis=-1)
  return jnp.einsum("...v,...v->...", p_BTV, x_BTV, precision="highest",
                    preferred_element_type=jnp.float32)


def once(x):
  """x, computed once: XLA's CPU backend repeats an exponential for each of its readers."""
  return jax.lax.optimization_barrier(x) if sharding.platform() == "cpu" else x


def log_sum(logits_BTV):
  """(largest logit, log Σ_v exp(z(v) − largest)), [B, T, 1] each: their sum is the log-normaliser.

  Apart, because logits lose what is small where something large is taken from them at once.
  """
  top_BT1 = once(jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True)))
  return top_BT1, once(jnp.log(jnp.sum(jnp.exp(logits_BTV - top_BT1), axis=-1, keepdims=True)))


def log_softmax(logits_BTV):
  """log π(v) of every token, [B, T, V], in nats; `once` is the reader's to ask for."""
  top_BT1, log_BT1 = log_sum(logits_BTV)
  return logits_BTV - top_BT1 - log_BT1


def entropy(logits_BTV):
  """Entropy at each position, in nats: between 0 and log V.

    H(π) = −Σ_v π(v) · log π(v).
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  logp_BTV = once(log_softmax(logits_BTV))
  return -expectation(once(jnp.exp(logp_BTV)), logp_BTV)


def negative_log_likelihood(logits_BTV, targets_BT):
  """−log π(a) at each position, in nats: the loss of supervised fine-tuning."""
  return -log_prob(logits_BTV, targets_BT)
