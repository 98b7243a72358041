"""Both doors against the readable losses on full logits, block sizes that divide and do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from s2d_jax import sharding
from s2d_jax.losses import blockwise, kl, tokens

B, T, D, V = 2, 7, 4, 11
RNG = np.random.default_rng(0)
TARGETS_BT = RNG.integers(V, size=(B, T))
WEIGHT_BT = jnp.asarray(RNG.random((B, T)) * (RNG.random((B, T)) > 0.3), jnp.float32)
COTANGENTS = [jnp.asarray(RNG.normal(size=(B, T)), jnp.float32) for _ in range(2)]
BLOCKS = pytest.mark.parametrize("block", [1, 6, 64])  # 1, 3 and 7 of the 7 positions
DIRECTIONS = pytest.mark.parametrize("f", [kl.forward_kl, kl.reverse_kl])


def head(width=D, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  return blockwise.Head(jnp.asarray(rng.normal(size=(B, T, width)), dtype),
                        jnp.asarray(rng.normal(size=(V, width)), jnp.float32))


STUDENT, GUIDE = head(), head(width=6, seed=1)  # a guide may be wider


def full_logits(head):
  return jnp.einsum("BTD,VD->BTV", *head, preferred_element_type=jnp.float32)


def direct_logp(head):
  return tokens.log_prob(full_logits(head), TARGETS_BT), tokens.entropy(full_logits(head))


def direct_divergence(f, student, guide):
  return jnp.sum(WEIGHT_BT * f(full_logits(student), full_logits(guide)))


@BLOCKS
def test_logp_equals_the_direct_form_for_any_cotangent(block):
  @functools.partial(jax.jit, static_argnums=0)
  def value_and_pull(f, head):
    value, pull = jax.vjp(f, head)
    return value, pull(tuple(COTANGENTS))

  got, got_grads = value_and_pull(lambda head: blockwise.logp(head, TARGETS_BT, block), STUDENT)
  want, want_grads = value_and_pull(direct_logp, STUDENT)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), got, want)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got_grads, want_grads)


@BLOCKS
@DIRECTIONS
def test_divergence_equals_the_direct_form(f, block):
  def door(student, guide):
    return blockwise.divergence(f, student, guide, WEIGHT_BT, block)

  (total, value_BT), grads = jax.jit(
      jax.value_and_grad(door, argnums=(0, 1), has_aux=True))(STUDENT, GUIDE)
  want, want_grads = jax.jit(
      jax.value_and_grad(direct_divergence, argnums=(1, 2)), static_argnums=0)(f, STUDENT, GUIDE)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(value_BT, f(full_logits(STUDENT), full_logits(GUIDE)), rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


@DIRECTIONS
def test_divergence_of_equal_heads_is_exactly_zero_and_so_is_its_gradient(f):
  door = jax.jit(jax.value_and_grad(
      lambda student, guide: blockwise.divergence(f, student, guide, WEIGHT_BT, 6)[0]))
  total, grads = door(STUDENT, STUDENT)
  assert total == 0
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), grads)


def test_value_carries_no_gradient():
  def total(student):
    return blockwise.divergence(kl.reverse_kl, student, GUIDE, WEIGHT_BT, 6)[1].sum()
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), jax.grad(total)(STUDENT))


def test_weight_zero_leaves_a_token_out_whatever_it_holds():
  def wild(student_logits_BTV, guide_logits_BTV):
    value_BT = kl.reverse_kl(student_logits_BTV, guide_logits_BTV)
    return jnp.where(value_BT > 0, jnp.inf, value_BT)  # every token's value is infinite
  total, _ = blockwise.divergence(wild, STUDENT, GUIDE, jnp.zeros((B, T)), 6)
  assert total == 0


def test_bfloat16_features_accumulate_in_float32():
  features_BTD, weight_VD = head(width=256, dtype=jnp.bfloat16)
  got_BT, _ = blockwise.logp((features_BTD, weight_VD), TARGETS_BT, 6)
  exact_BTV = np.einsum("BTD,VD->BTV", np.asarray(features_BTD.astype(jnp.float32), np.float64),
                        np.asarray(weight_VD.astype(jnp.bfloat16).astype(jnp.float32), np.float64))
  want_BT = tokens.log_prob(jnp.asarray(exact_BTV, jnp.float32), TARGETS_BT)
  assert got_BT.dtype == jnp.float32
  # Logits of size 50, if rounded to bfloat16, would be off by 0.1.
  np.testing.assert_allclose(got_BT, want_BT, atol=1e-4)


@pytest.mark.parametrize("block", [0, -4])
def test_a_block_without_tokens_is_refused(block):
  with pytest.raises(ValueError, match="at least 1"):
    blockwise.logp(STUDENT, TARGETS_BT, block)


def arrays_in(jaxpr):
  """Shapes of everything a program computes, loops and checkpoints looked into."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars)
    for inner in jaxprs_in_params(eqn.params):
      yield from arrays_in(inner)


def test_no_array_of_all_tokens_by_vocabulary():
  def doors(student, guide):
    logp_BT, entropy_BT = blockwise.logp(student, TARGETS_BT, 4)
    total, _ = blockwise.divergence(kl.reverse_kl, student, guide, WEIGHT_BT, 4)
    return total + logp_BT.sum() + entropy_BT.sum()

  program = jax.make_jaxpr(jax.grad(doors))(STUDENT, GUIDE)
  sizes = [int(np.prod(shape)) for shape in arrays_in(program.jaxpr) if V in shape]
  assert max(sizes) == 4 * V  # one block of logits: seen, and nothing larger


@pytest.mark.medium
def test_the_mesh_changes_nothing():
  rng = np.random.default_rng(4)
  features_BTD = rng.normal(size=(8, T, 8)).astype(np.float32)
  weight_VD = rng.normal(size=(16, 8)).astype(np.float32)
  targets_BT = rng.integers(16, size=(8, T))

  def loss(head, targets_BT):
    logp_BT, entropy_BT = blockwise.logp(head, targets_BT, 24)
    return jnp.sum(logp_BT + 0.1 * entropy_BT)

  def run(shape):
    mesh = sharding.make_mesh(shape)
    weight = jax.device_put(
        weight_VD, sharding.weight_sharding(mesh, ("vocab", "embed"), weight_VD.shape))
    features, targets = sharding.put_batch((features_BTD, targets_BT), mesh)
    with jax.set_mesh(mesh):
      return jax.device_get(jax.jit(jax.value_and_grad(loss))((features, weight), targets))

  want = run((1, 1, 1))
  for shape in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
                 run(shape), want)
