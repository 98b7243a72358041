"""Losses on unembedded blocks of tokens, without an array of [tokens, vocabulary].

Two functions: `logp` gives log-probabilities and entropies, `divergence` the sum of any per-token
loss of two models' logits. Logits exist for `block` tokens of a device at a time, and only for the
tokens that a mask selects: prompts and padding cost nothing.

The gradient of the unembedding is summed in float32 over a device's own blocks, and over devices
once, after the last block. `divergence` forms its gradients in the forward pass, while a block's
logits are there. `logp` cannot know the cotangents yet, so its backward pass forms logits again.

A head is the pair (features_BTD, weight_VD). The weight is cast to the features' type; products are
accumulated in float32. Block arrays have the suffix t: the tokens of one block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from s2d_jax import sharding
from s2d_jax.errors import InputError
from s2d_jax.losses import tokens

_Arrays = Any  # a tree of arrays, or None


class Head(NamedTuple):
  """A model's last features and its unembedding: logits = features · weightᵀ."""
  features_BTD: jax.Array
  weight_VD: jax.Array


def logp(head: Head, targets_BT: jax.Array, block: int,
         mask_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy at each position, in nats, float32 [B, T] each.

  Equal to `tokens.log_prob` and `tokens.entropy` of the head's logits, and differentiable in the
  head for any cotangent: every policy-gradient loss is a function of the log-probabilities.

  Args:
    targets_BT: int32 token ids.
    block: tokens per block, on each device.
    mask_BT: bool; where it is false nothing is computed and both results are 0. None selects all.

  Raises:
    InputError: `block` is less than 1.
  """
  if mask_BT is None:
    mask_BT = jnp.ones(targets_BT.shape, bool)
  return _logp(block, tuple(head), targets_BT, mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logp(block: int, head: tuple, targets_BT: jax.Array,
          mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _values(_logp_and_entropy, block, head, None, mask_BT.astype(jnp.float32), (targets_BT,))


def _logp_fwd(block: int, *arguments: _Arrays) -> tuple[tuple[jax.Array, jax.Array], tuple]:
  # With symbolic_zeros, each array comes with a flag that says whether it is differentiated.
  saved = jax.tree.map(lambda argument: argument.value, arguments)
  return _logp(block, *saved), saved


def _logp_bwd(block: int, saved: tuple, cotangents: tuple) -> tuple:
  head, targets_BT, mask_BT = saved
  # A result that nothing differentiates has a symbolic cotangent. Leaving it out saves the backward
  # pass of an entropy that is only logged, which is an array of [block, vocabulary].
  used = [i for i, cotangent in enumerate(cotangents) if not isinstance(cotangent, SymbolicZero)]

  # The gradient of this sum is the one that the cotangents pull back.
  def f(logits_tV: jax.Array, _: None, targets_t: jax.Array, cotangents_t: list) -> jax.Array:
    results = _logp_and_entropy(logits_tV, None, targets_t)
    return sum(results[i] * cotangent_t
               for i, cotangent_t in zip(used, cotangents_t, strict=True))

  more_BT = targets_BT, [cotangents[i] for i in used]
  _, dfeatures_BTD, dweight_VD = _gradients(
      f, block, head, None, mask_BT.astype(jnp.float32), more_BT)
  return (dfeatures_BTD, dweight_VD.astype(head[1].dtype)), None, None


_logp.defvjp(_logp_fwd, _logp_bwd, symbolic_zeros=True)


def _logp_and_entropy(logits_tV: jax.Array, _: None,
                      targets_t: jax.Array) -> tuple[jax.Array, jax.Array]:
  return tokens.log_prob(logits_tV, targets_t), tokens.entropy(logits_tV)


def common(student_head: Head, guide_head: Head) -> tuple[Head, Head]:
  """Both heads on the rows of the vocabulary that both have: their padding may differ."""
  # Only padding differs: two models of one tokenizer share the lower rows.
  V = min(student_head[1].shape[0], guide_head[1].shape[0])

  def cut(head: Head) -> Head:
    features_BTD, weight_VD = head
    return Head(features_BTD, weight_VD if len(weight_VD) == V else weight_VD[:V])

  return cut(student_head), cut(guide_head)


def divergence(f: Callable[..., _Arrays], student_head: Head, guide_head: Head | None,
               weight_BT: jax.Array, block: int, *more_BT: _Arrays) -> tuple[jax.Array, _Arrays]:
  """Weighted sum of a per-token loss, and everything that the loss function returned.

  The sum is differentiable in the student's head and in no other argument. Its gradient is formed
  in the same pass. The returned values are for reading: they carry no gradient.

  Args:
    f: f(student_logits, guide_logits, *more) maps arrays of [t, V], [t, V] and [t] each to the loss
      of t tokens, [t], as `kl.forward_kl` does; or to a tuple of such arrays with the loss first.
      The t tokens may come from any rows.
    guide_head: None calls f with None. Vocabularies of different sizes are cut to the smaller one.
    weight_BT: float32; where it is 0 nothing is computed and the returned values are 0.
    block: tokens per block, on each device.
    more_BT: trees of arrays that f also reads, such as the targets.

  Returns:
    Σ weight · loss, a float32 scalar, and f's values for every token, [B, T].

  Raises:
    InputError: `block` is less than 1.
  """
  guide = None
  if guide_head is not None:
    student_head, guide_head = common(student_head, guide_head)
    guide = tuple(guide_head)
  return _divergence(f, block, tuple(student_head), guide, weight_BT, more_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(f: Callable, block: int, student: tuple, guide: tuple | None, weight_BT: jax.Array,
                more_BT: tuple) -> tuple[jax.Array, _Arrays]:
  values = _values(f, block, student, guide, weight_BT, more_BT)
  return _weighted_sum(values, weight_BT), values


def _divergence_fwd(f: Callable, block: int, student: tuple, guide: tuple | None,
                    weight_BT: jax.Array, more_BT: tuple) -> tuple[tuple, tuple]:
  values, dfeatures_BTD, dweight_VD = _gradients(f, block, student, guide, weight_BT, more_BT)
  # The finished gradients are saved, not the logits; the other arguments for their shapes alone.
  saved = dfeatures_BTD, dweight_VD, student[1], guide, weight_BT, more_BT
  return (_weighted_sum(values, weight_BT), values), saved


def _divergence_bwd(f: Callable, block: int, saved: tuple, cotangents: tuple) -> tuple:
  dfeatures_BTD, dweight_VD, weight_VD, *others = saved
  scale = cotangents[0]  # of the sum; the values' own are ignored
  dstudent = ((dfeatures_BTD.astype(jnp.float32) * scale).astype(dfeatures_BTD.dtype),
              (dweight_VD * scale).astype(weight_VD.dtype))
  return dstudent, *jax.tree.map(_no_gradient, others)


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


def _values(f: Callable, block: int, student: tuple, guide: tuple | None, weight_BT: jax.Array,
            more_BT: tuple) -> _Arrays:
  """f's values for every token of positive weight; arguments as `divergence`."""
  def on_device(per_token: _Arrays, weights: _Arrays) -> tuple[_Arrays, _Arrays]:
    def block_fn(total: tuple, student_tD: jax.Array, guide_tD: jax.Array | None,
                 weight_t: jax.Array, more_t: tuple) -> tuple:
      student_tV = _logits(student_tD, weights[0])
      return total, f(student_tV, _guide_logits(guide_tD, weights[1]), *more_t)

    values, _ = _over_blocks(block_fn, block, (), per_token, per_token[2] > 0)
    return values, ()

  per_token, weights = _split_arguments(student, guide, weight_BT, more_BT)
  values, _ = sharding.per_device(on_device, per_token, weights)
  return values


def _gradients(f: Callable, block: int, student: tuple, guide: tuple | None, weight_BT: jax.Array,
               more_BT: tuple) -> tuple[_Arrays, jax.Array, jax.Array]:
  """(`_values`, and the gradients of Σ weight · loss in the student's features and unembedding)."""
  def on_device(per_token: _Arrays, weights: _Arrays) -> tuple[_Arrays, _Arrays]:
    def block_fn(dweight_VD: jax.Array, student_tD: jax.Array, guide_tD: jax.Array | None,
                 weight_t: jax.Array, more_t: tuple) -> tuple:
      def loss(student_tV: jax.Array) -> tuple[jax.Array, _Arrays]:
        values = f(student_tV, _guide_logits(guide_tD, weights[1]), *more_t)
        return jax.tree.leaves(values)[0], values  # the loss alone is differentiated

      student_tV = _logits(student_tD, weights[0])
      loss_t, pull, values_t = jax.vjp(loss, student_tV, has_aux=True)
      dlogits_tV, = pull(weight_t.astype(loss_t.dtype))
      # Unused slots of the last block have weight 0, and f may give NaN for their zero logits.
      dlogits_tV = jnp.where(weight_t[..., None] > 0, dlogits_tV, 0.0)
      dweight_VD, dfeatures_tD = _add_gradients(dweight_VD, dlogits_tV, student_tD, weights[0])
      return dweight_VD, (values_t, dfeatures_tD)

    zeros_VD = sharding.constrain(jnp.zeros(weights[0].shape, jnp.float32), "vocab", "embed")
    return _over_blocks(block_fn, block, zeros_VD, per_token, per_token[2] > 0)

  per_token, weights = _split_arguments(student, guide, weight_BT, more_BT)
  (values, dfeatures_BTD), dweight_VD = sharding.per_device(on_device, per_token, weights)
  return values, dfeatures_BTD, dweight_VD


def _split_arguments(student: tuple, guide: tuple | None, weight_BT: jax.Array,
                     more_BT: tuple) -> tuple[_Arrays, _Arrays]:
  """(one value a token, the two unembeddings) of a divergence's arguments."""
  student_BTD, student_VD = student
  guide_BTD, guide_VD = (None, None) if guide is None else guide
  if guide is not None:
    guide_VD = _compute_weight(guide_VD, guide_BTD)
  per_token = student_BTD, guide_BTD, weight_BT, more_BT
  return per_token, (_compute_weight(student_VD, student_BTD), guide_VD)


def _guide_logits(guide_tD: jax.Array | None, guide_VD: jax.Array | None) -> jax.Array | None:
  return None if guide_tD is None else _logits(guide_tD, guide_VD)


def _weighted_sum(values: _Arrays, weight_BT: jax.Array) -> jax.Array:
  """Σ weight · loss, the loss being the first of the values; tokens of weight 0 are left out."""
  return jnp.sum(jax.tree.leaves(values)[0] * weight_BT, where=weight_BT > 0)


def _no_gradient(x: jax.Array) -> jax.Array | None:
  # JAX wants zeros for an array of floats and None for one of integers.
  return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None


def _compute_weight(weight_VD: jax.Array, features_BTD: jax.Array) -> jax.Array:
  """The weight as the loop reads it: whole rows on each device, in the features' type."""
  return sharding.constrain(weight_VD, "vocab", "embed").astype(features_BTD.dtype)


def _logits(features_tD: jax.Array, weight_VD: jax.Array) -> jax.Array:
  """Float32 logits of a block's tokens."""
  # Two axes and not three: XLA for CPUs (jax 0.12) writes into a product's own memory only where no
  # reader sees it in another shape, and an axis of one would cost an array of [block, vocabulary].
  logits_tV = jnp.einsum("tD,VD->tV", features_tD, weight_VD, preferred_element_type=jnp.float32)
  return sharding.constrain(logits_tV, "time", "vocab")


def _add_gradients(dweight_VD: jax.Array, dlogits_tV: jax.Array, features_tD: jax.Array,
                   weight_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Adds a block's part to the unembedding's gradient; returns it and the features' gradient."""
  D = features_tD.shape[1]
  columns = tokens.gradient_columns(D)
  dlogits_tV = dlogits_tV.astype(features_tD.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def add_columns(i: jax.Array | int, carry: tuple) -> tuple:
    dweight_VD, dlogits_tV = carry
    features_td = jax.lax.dynamic_slice_in_dim(features_tD, i * columns, columns, axis=1)
    old_Vd = jax.lax.dynamic_slice_in_dim(dweight_VD, i * columns, columns, axis=1)
    new_Vd = old_Vd + product("tV,td->Vd", dlogits_tV, features_td)
    dweight_VD = jax.lax.dynamic_update_slice_in_dim(dweight_VD, new_Vd, i * columns, axis=1)
    return dweight_VD, dlogits_tV

  # The logits' gradient has two readers: this loop and the product after it. XLA would fuse its
  # computation into both, and keep all of its operands until the second. As a value that the loop
  # carries it is computed once.
  carry = dweight_VD, dlogits_tV
  if columns == D:
    dweight_VD, dlogits_tV = add_columns(0, carry)
  else:
    dweight_VD, dlogits_tV = jax.lax.fori_loop(0, D // columns, add_columns, carry)
  dfeatures_tD = product("tV,VD->tD", dlogits_tV, weight_VD).astype(features_tD.dtype)
  return sharding.constrain(dweight_VD, "vocab", "embed"), dfeatures_tD


def _over_blocks(block_fn: Callable[..., tuple[_Arrays, _Arrays]], block: int, carry: _Arrays,
                 per_token: _Arrays, mask_BT: jax.Array) -> tuple[_Arrays, _Arrays]:
  """Calls block_fn on successive blocks of the masked tokens: (outputs, the last carry).

  Args:
    block_fn: block_fn(carry, *block) -> (carry, outputs); `block` are the entries of `per_token` at
      `block` tokens, [t, ...], and so are the outputs.
    per_token: a tuple of trees of arrays [B, T, ...].
    mask_BT: bool. Outputs of other tokens are 0.

  Three things keep the shapes fixed while the number of masked tokens is not. Masked tokens are
  sorted first, so that they fill whole blocks. Unused slots of the last block get token ids beyond
  the last one: a gather fills them with zeros and a scatter drops them. And every device runs as
  many blocks as the device with most tokens, because devices that share the vocabulary wait for
  each other in every block.
  """
  if block < 1:
    raise InputError(f"block is {block}: give the tokens per block of the loss, at least 1.")
  B, T = mask_BT.shape
  N = B * T
  size = min(block, N)
  per_token_N = jax.tree.map(lambda x_BT: jnp.reshape(x_BT, (N, *x_BT.shape[2:])), per_token)
  mask_N = jnp.reshape(mask_BT, N)
  # Stable, so that tokens keep their order and a block's sums their rounding.
  order_N = jnp.argsort(~mask_N, stable=True)
  block_count = sharding.max_over_devices(-(-jnp.sum(mask_N) // size))

  def token_ids(i: jax.Array | int) -> jax.Array:
    """Token ids of block i; those of unused slots are N and more, all different."""
    slot_t = i * size + jnp.arange(size)
    token_t = order_N[jnp.minimum(slot_t, N - 1)]
    is_used_t = (slot_t < N) & jnp.take(mask_N, token_t)
    return jnp.where(is_used_t, token_t, N + jnp.arange(size))

  def on_block(token_t: jax.Array, carry: _Arrays) -> tuple[_Arrays, _Arrays]:
    block = jax.tree.map(
        lambda x_N: jnp.take(x_N, token_t, axis=0, mode="fill", fill_value=0), per_token_N)
    return block_fn(carry, *block)

  def step(i: jax.Array, state: tuple[_Arrays, _Arrays]) -> tuple[_Arrays, _Arrays]:
    carry, outputs_N = state
    token_t = token_ids(i)
    carry, outputs_t = on_block(token_t, carry)
    outputs_N = jax.tree.map(
        lambda x_N, x_t: x_N.at[token_t].set(x_t, mode="drop", unique_indices=True),
        outputs_N, outputs_t)
    return carry, outputs_N

  # The outputs' shapes are block_fn's own business: they are asked for without running it.
  _, shapes = jax.eval_shape(on_block, token_ids(0), carry)
  zeros_N = jax.tree.map(lambda x: jnp.zeros((N, *x.shape[1:]), x.dtype), shapes)
  carry, outputs_N = jax.lax.fori_loop(0, block_count, step, (carry, zeros_N))
  outputs = jax.tree.map(lambda x_N: x_N.reshape(B, T, *x_N.shape[1:]), outputs_N)
  return outputs, carry
