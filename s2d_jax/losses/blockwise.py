"""The two doors from features to losses; no array of [tokens, vocabulary] exists behind either.

Logits are formed for `block` tokens of a device at a time. `logp` forms them again on the way back,
because it cannot know what will be asked of it; `divergence` is told, and has its gradients formed
before a block's logits are gone. The gradient of the unembedding is added up in float32 on each
device over its own tokens, and over devices once, after the last block.

A head is the pair (features_BTD, weight_VD); the weight is cast to the type of the features,
products are accumulated in float32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from s2d_jax import sharding
from s2d_jax.losses import tokens

COLUMNS = 256  # of the unembedding's gradient at a time, on a CPU


class Head(NamedTuple):
  """A model's last features and its unembedding: logits = features · weightᵀ."""
  features_BTD: jax.Array
  weight_VD: jax.Array


def logp(head, targets_BT, block):
  """Log-probability of each target and entropy at each position, in nats: (logp_BT, entropy_BT).

  Equal to `tokens.log_prob` and `tokens.entropy` of the logits, differentiable in the head for any
  cotangent: every policy-gradient loss is a function of logp_BT.
  """
  return _logp(*head, targets_BT, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logp(features_BTD, weight_VD, targets_BT, block):
  def on_rows(rows, wholes):
    def on_block(features_btD, targets_bt):
      return _of_target(_logits(features_btD, wholes), targets_bt)
    return _map(on_block, block, rows), ()
  return sharding.on_rows(on_rows, (features_BTD, targets_BT), _cast(weight_VD, features_BTD))[0]


def _logp_forth(features, weight, targets, block):  # each an array and whether it is differentiated
  saved = tuple(x.value for x in (features, weight, targets))
  return _logp(*saved, block), saved


def _logp_back(block, saved, cotangents):
  features_BTD, weight_VD, targets_BT = saved
  # An entropy that is only read costs nothing on the way back.
  asked = [not isinstance(x, SymbolicZero) for x in cotangents]
  cotangents = [x for x, is_asked in zip(cotangents, asked, strict=True) if is_asked]
  def on_rows(rows, wholes):
    def on_block(dweight_VD, features_btD, targets_bt, *cotangents_bt):
      logits_btV = _logits(features_btD, wholes)
      def f(logits_btV):
        both = _of_target(logits_btV, targets_bt)
        return [x for x, is_asked in zip(both, asked, strict=True) if is_asked]
      _, back = jax.vjp(f, logits_btV)
      return _into(dweight_VD, back([*cotangents_bt])[0], features_btD, wholes)
    return _scan(on_block, block, _zeros(wholes), rows)
  dfeatures_BTD, dweight_VD = sharding.on_rows(
      on_rows, (features_BTD, targets_BT, *cotangents), _cast(weight_VD, features_BTD))
  return dfeatures_BTD, dweight_VD.astype(weight_VD.dtype), None


_logp.defvjp(_logp_forth, _logp_back, symbolic_zeros=True)


def _of_target(logits_btV, targets_bt):
  return tokens.log_prob(logits_btV, targets_bt), tokens.entropy(logits_btV)


def common(student_head, guide_head):
  """Both heads with the rows of the vocabulary that both have: they may be padded differently."""
  V = min(student_head[1].shape[0], guide_head[1].shape[0])
  return tuple(Head(x, weight_VD if len(weight_VD) == V else weight_VD[:V])
               for x, weight_VD in (student_head, guide_head))


def divergence(f, student_head, guide_head, weight_BT, block, *more_BT):
  """Weighted sum of a per-token loss and what it found: (Σ weight · loss, found).

  The sum is differentiable in the student's head and in no other argument; its gradient is formed
  with it, so that no logits are computed twice. What is found is for reading and carries none.
  Where the weight is 0 a loss is left out, whatever it is.

  Args:
    f: f(student_logits, guide_logits, *more) maps [B, t, V], [B, t, V] and [B, t] each to the loss
      [B, t], as `kl.forward_kl` does, or to a tuple of such arrays with the loss first.
    guide_head: None gives f None. Where the vocabularies are padded to different sizes, what both
      have is compared.
    more_BT: arrays that f also reads, such as the targets.

  Returns:
    The sum, a scalar, and what f returned, for every token, [B, T].
  """
  if guide_head is not None:
    student_head, guide_head = common(student_head, guide_head)
  return _divergence(f, block, tuple(student_head), guide_head and tuple(guide_head), weight_BT,
                     more_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(f, block, student, guide, weight_BT, more_BT):
  def on_rows(rows, wholes):
    def on_block(student_btD, guide_btD, _, *more_bt):
      return _values(f, _logits(student_btD, wholes[0]), guide_btD, wholes[1], more_bt)
    return _map(on_block, block, rows), ()
  rows, wholes = _split(student, guide, weight_BT, more_BT)
  found, _ = sharding.on_rows(on_rows, rows, wholes)
  return _total(found, weight_BT), found


def _divergence_forth(f, block, student, guide, weight_BT, more_BT):
  def on_rows(rows, wholes):
    def on_block(dweight_VD, student_btD, guide_btD, weight_bt, *more_bt):
      logits_btV = _logits(student_btD, wholes[0])
      found, back = jax.vjp(
          lambda logits_btV: _values(f, logits_btV, guide_btD, wholes[1], more_bt), logits_btV)
      # The loss's cotangent is its weight; what is found besides has none.
      first, *rest = jax.tree.leaves(found)
      cotangents = [weight_bt.astype(first.dtype), *(jnp.zeros_like(x) for x in rest)]
      dlogits_btV, = back(jax.tree.unflatten(jax.tree.structure(found), cotangents))
      dlogits_btV = jnp.where(weight_bt[..., None] > 0, dlogits_btV, 0.0)
      dweight_VD, dstudent_btD = _into(dweight_VD, dlogits_btV, student_btD, wholes[0])
      return dweight_VD, (found, dstudent_btD)
    return _scan(on_block, block, _zeros(wholes[0]), rows)
  rows, wholes = _split(student, guide, weight_BT, more_BT)
  (found, dfeatures_BTD), dweight_VD = sharding.on_rows(on_rows, rows, wholes)
  saved = dfeatures_BTD, dweight_VD, student[1], guide, weight_BT, more_BT
  return (_total(found, weight_BT), found), saved


def _divergence_back(f, block, saved, cotangents):
  dfeatures_BTD, dweight_VD, weight_VD, *rest = saved
  scale = cotangents[0]
  student = ((dfeatures_BTD.astype(jnp.float32) * scale).astype(dfeatures_BTD.dtype),
             (dweight_VD * scale).astype(weight_VD.dtype))
  return student, *jax.tree.map(_no_gradient, rest)


_divergence.defvjp(_divergence_forth, _divergence_back)


def _split(student, guide, weight_BT, more_BT):
  """(what rows have, what all have) of the arguments of a divergence."""
  rows = student[0], guide and guide[0], weight_BT, *more_BT
  return rows, (_cast(student[1], student[0]), guide and _cast(guide[1], guide[0]))


def _values(f, logits_btV, guide_btD, guide_VD, more_bt):
  return f(logits_btV, None if guide_btD is None else _logits(guide_btD, guide_VD), *more_bt)


def _total(found, weight_BT):
  return jnp.sum(jax.tree.leaves(found)[0] * weight_BT, where=weight_BT > 0)


def _no_gradient(x):
  return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None


def _cast(weight_VD, features_BTD):
  """The weight as the loop multiplies by it: whole rows, in the type of the features."""
  return sharding.constrain(weight_VD, "vocab", "embed").astype(features_BTD.dtype)


def _zeros(weight_VD):
  return sharding.constrain(jnp.zeros(weight_VD.shape, jnp.float32), "vocab", "embed")


def _logits(features_btD, weight_VD):
  logits_btV = jnp.einsum("btD,VD->btV", features_btD, weight_VD,
                          preferred_element_type=jnp.float32)
  return sharding.constrain(logits_btV, "batch", "time", "vocab")


def _into(dweight_VD, dlogits_btV, features_btD, weight_VD):
  """(dweight_VD with a block's part added, the gradient of the block's features)."""
  b, t, D = features_btD.shape
  dlogits_NV = dlogits_btV.reshape(b * t, -1).astype(features_btD.dtype)
  features_ND = features_btD.reshape(b * t, D)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  few = math.gcd(D, COLUMNS) if sharding.platform() == "cpu" else D
  def columns(i, carried):  # a CPU adds no product to a sum in place, but for a few at a time
    dweight_VD, dlogits_NV = carried
    own_Nd = jax.lax.dynamic_slice_in_dim(features_ND, i * few, few, axis=1)
    old_Vd = jax.lax.dynamic_slice_in_dim(dweight_VD, i * few, few, axis=1)
    dweight_VD = jax.lax.dynamic_update_slice_in_dim(
        dweight_VD, old_Vd + product("NV,Nd->Vd", dlogits_NV, own_Nd), i * few, axis=1)
    return dweight_VD, dlogits_NV
  # The next product reads what the loop carries: what XLA fuses into each of two readers is there
  # twice, and all that it is made of stays until the second.
  dweight_VD, dlogits_NV = (columns(0, (dweight_VD, dlogits_NV)) if few == D else
                            jax.lax.fori_loop(0, D // few, columns, (dweight_VD, dlogits_NV)))
  dfeatures_ND = product("NV,VD->ND", dlogits_NV, weight_VD).astype(features_btD.dtype)
  return sharding.constrain(dweight_VD, "vocab", "embed"), dfeatures_ND.reshape(b, t, D)


def _map(on_block, block, rows):
  """on_block of 1 x block tokens after the other, joined."""
  return _scan(lambda _, *xs: ((), on_block(*xs)), block, (), rows)[0]


def _scan(on_block, block, start, rows):
  """The same of an on_block that also carries something: (joined, the last of what is carried)."""
  if block < 1:
    raise ValueError(f"block is {block}: give the tokens per block of the loss, at least 1.")
  B, T = jax.tree.leaves(rows)[0].shape[:2]
  size = min(block, B * T)
  n = -(-B * T // size)

  def split(x_BT):  # the last block is filled up with zeros, whose finite results `join` drops
    x_N = x_BT.reshape(B * T, *x_BT.shape[2:])
    x_N = jnp.pad(x_N, [(0, n * size - B * T)] + [(0, 0)] * (x_N.ndim - 1))
    return x_N.reshape(n, size, *x_N.shape[1:])

  def join(x_nt):
    return x_nt.reshape(n * size, *x_nt.shape[2:])[: B * T].reshape(B, T, *x_nt.shape[2:])

  # A block's axis of one row is there inside the loop alone: outside, XLA copies for its layout.
  def step(carried, xs_t):
    carried, out_bt = on_block(carried, *jax.tree.map(lambda x_t: x_t[None], xs_t))
    return carried, jax.tree.map(lambda x_bt: x_bt[0], out_bt)

  last, out = jax.lax.scan(step, start, jax.tree.map(split, rows))
  return jax.tree.map(join, out), last
