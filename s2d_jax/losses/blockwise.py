"""The two doors from features to losses; no array of [tokens, vocabulary] exists behind either.

Logits are formed for `block` tokens of a device at a time, and only for tokens that count: prompts
and padding pay nothing. `logp` forms them again on the way back, because it cannot know what will
be asked of it; `divergence` is told, and has its gradients formed before a block's logits are gone.
The gradient of the unembedding is added up in float32 on each device over its own tokens, and over
devices once, after the last block.

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


def logp(head, targets_BT, block, counts_BT=None):
  """Log-probability of each target and entropy at each position, in nats: (logp_BT, entropy_BT).

  Equal to `tokens.log_prob` and `tokens.entropy` of the logits, differentiable in the head for any
  cotangent: every policy-gradient loss is a function of logp_BT. Where counts_BT (bool; None: all)
  is false, nothing is computed and both are 0.
  """
  if counts_BT is None:
    counts_BT = jnp.ones(targets_BT.shape, bool)
  return _logp(*head, targets_BT, counts_BT, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logp(features_BTD, weight_VD, targets_BT, counts_BT, block):
  def on_rows(rows, wholes):
    *rows, counts_BT = rows
    def on_block(features_btD, targets_bt):
      return _of_target(_logits(features_btD, wholes), targets_bt)
    return _map(on_block, block, rows, counts_BT), ()
  return sharding.per_device(on_rows, (features_BTD, targets_BT, counts_BT),
                          _cast(weight_VD, features_BTD))[0]


def _logp_forth(*args):  # each an array and whether it is differentiated, and the block's size
  *args, block = args
  saved = tuple(x.value for x in args)
  return _logp(*saved, block), saved


def _logp_back(block, saved, cotangents):
  features_BTD, weight_VD, targets_BT, counts_BT = saved
  # An entropy that is only read costs nothing on the way back.
  asked = [not isinstance(x, SymbolicZero) for x in cotangents]
  cotangents = [x for x, is_asked in zip(cotangents, asked, strict=True) if is_asked]
  def on_rows(rows, wholes):
    *rows, counts_BT = rows
    def on_block(dweight_VD, features_btD, targets_bt, *cotangents_bt):
      logits_btV = _logits(features_btD, wholes)
      def f(logits_btV):
        both = _of_target(logits_btV, targets_bt)
        return [x for x, is_asked in zip(both, asked, strict=True) if is_asked]
      _, back = jax.vjp(f, logits_btV)
      return _into(dweight_VD, back([*cotangents_bt])[0], features_btD, wholes)
    return _scan(on_block, block, _zeros(wholes), rows, counts_BT)
  dfeatures_BTD, dweight_VD = sharding.per_device(
      on_rows, (features_BTD, targets_BT, *cotangents, counts_BT), _cast(weight_VD, features_BTD))
  return dfeatures_BTD, dweight_VD.astype(weight_VD.dtype), None, None


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
  Where the weight is 0 nothing is computed and what is found is 0.

  Args:
    f: f(student_logits, guide_logits, *more) maps [1, t, V], [1, t, V] and [1, t] each to the loss
      [1, t], as `kl.forward_kl` does, or to a tuple of such arrays with the loss first. The t
      tokens come from anywhere.
    guide_head: None gives f None. Where the vocabularies are padded to different sizes, what both
      have is compared.
    more_BT: arrays that f also reads, such as the targets, or trees of them.

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
    return _map(on_block, block, rows, rows[2] > 0), ()
  rows, wholes = _split(student, guide, weight_BT, more_BT)
  found, _ = sharding.per_device(on_rows, rows, wholes)
  return _total(found, weight_BT), found


def _divergence_forth(f, block, student, guide, weight_BT, more_BT):
  def on_rows(rows, wholes):
    def on_block(dweight_VD, student_btD, guide_btD, weight_bt, *more_bt):
      logits_btV = _logits(student_btD, wholes[0])
      def loss(logits_btV):  # what is found besides has no cotangent
        found = _values(f, logits_btV, guide_btD, wholes[1], more_bt)
        return jax.tree.leaves(found)[0], found
      loss_bt, back, found = jax.vjp(loss, logits_btV, has_aux=True)
      dlogits_btV, = back(weight_bt.astype(loss_bt.dtype))
      dlogits_btV = jnp.where(weight_bt[..., None] > 0, dlogits_btV, 0.0)  # what fills up a block
      dweight_VD, dstudent_btD = _into(dweight_VD, dlogits_btV, student_btD, wholes[0])
      return dweight_VD, (found, dstudent_btD)
    return _scan(on_block, block, _zeros(wholes[0]), rows, rows[2] > 0)
  rows, wholes = _split(student, guide, weight_BT, more_BT)
  (found, dfeatures_BTD), dweight_VD = sharding.per_device(on_rows, rows, wholes)
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


def _map(on_block, block, rows, counts_BT):
  """on_block of 1 x block tokens that count after the other, each result in its token's place."""
  return _scan(lambda _, *xs: ((), on_block(*xs)), block, (), rows, counts_BT)[0]


def _scan(on_block, block, start, rows, counts_BT):
  """The same of an on_block that also carries something: (results, the last of what is carried).

  The results of tokens that do not count are 0.
  """
  if block < 1:
    raise ValueError(f"block is {block}: give the tokens per block of the loss, at least 1.")
  B, T = counts_BT.shape
  N = B * T
  size = min(block, N)
  rows_N = jax.tree.map(lambda x_BT: jnp.reshape(x_BT, (N, *x_BT.shape[2:])), rows)
  counts_N = jnp.reshape(counts_BT, N)
  order_N = jnp.argsort(~counts_N, stable=True)
  # Every device does as many blocks as the one with most to do: those that share the vocabulary
  # wait for each other in each.
  blocks = sharding.max_over_devices(-(-jnp.sum(counts_N) // size))

  def at(i):  # whose turn it is; what fills up the last block is nobody, each another
    turn_t = i * size + jnp.arange(size)
    token_t = order_N[jnp.minimum(turn_t, N - 1)]
    return jnp.where((turn_t < N) & jnp.take(counts_N, token_t), token_t, N + jnp.arange(size))

  def of_block(token_t, carried):
    # A block's axis of one row is there inside the loop alone: outside, XLA copies for its layout.
    xs_t = jax.tree.map(
        lambda x_N: jnp.take(x_N, token_t, axis=0, mode="fill", fill_value=0)[None], rows_N)
    carried, out_bt = on_block(carried, *xs_t)
    return carried, jax.tree.map(lambda x_bt: x_bt[0], out_bt)

  def step(i, state):
    carried, out_N = state
    token_t = at(i)
    carried, out_t = of_block(token_t, carried)
    return carried, jax.tree.map(
        lambda x_N, x_t: x_N.at[token_t].set(x_t, mode="drop", unique_indices=True), out_N, out_t)

  _, shapes = jax.eval_shape(of_block, at(0), start)
  nothing = jax.tree.map(lambda x: jnp.zeros((N, *x.shape[1:]), x.dtype), shapes)
  last, out_N = jax.lax.fori_loop(0, blocks, step, (start, nothing))
  return jax.tree.map(lambda x_N: x_N.reshape(B, T, *x_N.shape[1:]), out_N), last
