"""What a categorical distribution says about one token: log-probability and entropy, in nats.

Logits are finite, [B, T, V], of any float type; targets are int32 token ids, [B, T]. Results are
float32, [B, T], unreduced.
"""

import jax
import jax.numpy as jnp


def log_prob(logits_BTV, targets_BT):
  """Log-probability of each target, in nats.

    log π(a) = z(a) − log Σ_v exp z(v),   z the logits, a the target.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  # Compare and select: it fuses, and with the vocabulary split over devices each reads its own part
  # only; a gather would collect the whole vocabulary first.
  target_BTV = jax.nn.one_hot(targets_BT, logits_BTV.shape[-1], dtype=jnp.bool_)
  logit_BT = jnp.sum(jnp.where(target_BTV, logits_BTV, 0.0), axis=-1)
  return logit_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def entropy(logits_BTV):
  """Entropy at each position, in nats: between 0 and log V.

    H(π) = −Σ_v π(v) · log π(v).
  """
  logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  return -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)


def negative_log_likelihood(logits_BTV, targets_BT):
  """−log π(a) at each position, in nats: the loss of supervised fine-tuning."""
  return -log_prob(logits_BTV, targets_BT)
