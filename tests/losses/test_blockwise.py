"""Both doors against the readable losses on full logits, block sizes that divide and do not."""

import functools
import math
import re

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
BLOCKS = pytest.mark.parametrize("block", [1, 6, 7, 64])  # of 14 tokens: some divide, some do not
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

  (total, value_BT), grads = jax.jit(jax.value_and_grad(door, has_aux=True))(STUDENT, GUIDE)
  want, want_grads = jax.jit(
      jax.value_and_grad(direct_divergence, argnums=1), static_argnums=0)(f, STUDENT, GUIDE)
  assert door(STUDENT, GUIDE)[0] == pytest.approx(float(total), rel=1e-6)  # without a gradient
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


def test_what_is_found_besides_the_loss_is_read_in_the_same_pass():
  def f(student_BTV, guide_BTV, targets_BT):
    logp_BT = tokens.log_prob(student_BTV, targets_BT)
    return (kl.reverse_kl(student_BTV, guide_BTV),
            {"entropy": tokens.entropy(student_BTV), "logp": logp_BT})
  (total, (value_BT, found)), grads = jax.value_and_grad(
      lambda s: blockwise.divergence(f, s, GUIDE, WEIGHT_BT, 6, TARGETS_BT), has_aux=True)(STUDENT)
  logp_BT, entropy_BT = direct_logp(STUDENT)
  np.testing.assert_allclose(found["entropy"], entropy_BT, rtol=1e-5)
  np.testing.assert_allclose(found["logp"], logp_BT, rtol=1e-5)
  want, want_grads = jax.value_and_grad(
      lambda s: direct_divergence(kl.reverse_kl, s, GUIDE))(STUDENT)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


def test_a_loss_of_the_student_alone():
  def nll(student_BTV, _, targets_BT):
    return tokens.negative_log_likelihood(student_BTV, targets_BT)
  total, grads = jax.value_and_grad(
      lambda s: blockwise.divergence(nll, s, None, WEIGHT_BT, 6, TARGETS_BT)[0])(STUDENT)
  want, want_grads = jax.value_and_grad(
      lambda s: -jnp.sum(WEIGHT_BT * direct_logp(s)[0]))(STUDENT)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


@DIRECTIONS
def test_vocabularies_padded_to_different_sizes_are_compared_on_what_both_have(f):
  def padded(head, rows):
    more = np.random.default_rng(5).normal(size=(rows, head.weight_VD.shape[1])).astype(np.float32)
    return head._replace(weight_VD=jnp.concatenate([head.weight_VD, more * 9]))
  want, want_grads = jax.value_and_grad(lambda s: direct_divergence(f, s, GUIDE))(STUDENT)
  for student, guide in ((padded(STUDENT, 3), GUIDE), (STUDENT, padded(GUIDE, 2))):
    total, grads = jax.value_and_grad(
        lambda s, g=guide: blockwise.divergence(f, s, g, WEIGHT_BT, 6)[0])(student)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    np.testing.assert_allclose(grads.weight_VD[:V], want_grads.weight_VD, atol=1e-5)
    np.testing.assert_array_equal(grads.weight_VD[V:], 0.0)


def test_a_token_without_weight_has_no_gradient_whatever_it_holds():
  def wild(student_BTV, guide_BTV):
    return kl.reverse_kl(student_BTV, guide_BTV) * jnp.inf
  grads = jax.grad(
      lambda s: blockwise.divergence(wild, s, GUIDE, jnp.zeros((B, T)), 6)[0])(STUDENT)
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), grads)


def arrays_in(jaxpr):
  """Shapes of everything a program computes, loops looked into."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars)
    for inner in jaxprs_in_params(eqn.params):
      yield from arrays_in(inner)


def doors(student, guide, targets_BT, weight_BT, block):
  """A loss that enters both."""
  logp_BT, entropy_BT = blockwise.logp(student, targets_BT, block)
  parts = (blockwise.divergence(kl.reverse_kl, student, guide, weight_BT, block)[0],
           jnp.sum(logp_BT * weight_BT), jnp.sum(entropy_BT * weight_BT))
  return sum(parts), parts


def test_no_array_of_all_tokens_by_vocabulary():
  program = jax.make_jaxpr(jax.value_and_grad(doors, has_aux=True), static_argnums=4)(
      STUDENT, GUIDE, TARGETS_BT, WEIGHT_BT, 4)
  shapes = [shape for shape in arrays_in(program.jaxpr) if V in shape and shape[0] != V]
  assert max(int(np.prod(shape)) for shape in shapes) == 4 * V  # one block of logits, no more


def test_temporaries_are_three_arrays_of_a_block_and_do_not_grow_with_the_tokens():
  def temporaries(count, block, D=512, V=4096):
    head = blockwise.Head(jax.ShapeDtypeStruct((1, count, D), jnp.float32),
                          jax.ShapeDtypeStruct((V, D), jnp.float32))
    def total(student, guide):
      weight_BT = jnp.ones((1, count), jnp.float32)
      return blockwise.divergence(kl.reverse_kl, student, guide, weight_BT, block)[0]
    program = jax.jit(jax.value_and_grad(total)).lower(head, head).compile()
    return program.memory_analysis().temp_size_in_bytes / (4 * block * V)  # the gradient is output
  # Two models' logits and what is made of them; beside them a block's features, an eighth each.
  assert 2 < temporaries(1024, 256) < 3.5
  assert temporaries(4096, 256) < temporaries(1024, 256) + 0.01


def on_mesh(shape, axes=("data", "fsdp", "tensor"), rows=8, T=48, D=32, V=96):
  """(mesh, heads and batch laid out on it) with sizes that tell axes apart."""
  mesh = sharding.make_mesh(shape)
  rng = np.random.default_rng(4)
  def head(width):
    weight = (rng.normal(size=(V, width)) * width**-0.5).astype(np.float32)
    features = rng.normal(size=(rows, T, width)).astype(np.float32)
    where = sharding.weight_sharding(mesh, ("vocab", "embed"), weight.shape)
    return blockwise.Head(*sharding.put_batch((features,), mesh), jax.device_put(weight, where))
  batch = sharding.put_batch((rng.integers(V, size=(rows, T)).astype(np.int32),
                              rng.random((rows, T)).astype(np.float32)), mesh)
  return mesh, (head(D), head(D + 8), *batch)


def loops(text):
  """The lines of a compiled program that run in a loop: bodies of `while` and what they call."""
  found = re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
  computations = dict(found)
  inside, todo = set(), re.findall(r"body=%([\w.-]+)", text)
  while todo:
    name = todo.pop()
    if name not in inside:
      inside.add(name)
      todo += [n for n in re.findall(r"%([\w.-]+)", computations[name]) if n in computations]
  return [line for name in inside for line in computations[name].splitlines()]


def reduced(lines):
  """Elements of each array that a line adds up over devices."""
  for line in lines:
    if re.search(r" (all-reduce|reduce-scatter)(-start)?\(", line):
      for dims in re.findall(r"[a-z]\d+\[([\d,]+)\]", re.split(" (all-r|reduce-s)", line)[0]):
        yield math.prod(map(int, dims.split(",")))


def sizes(text):
  """How many elements the arrays of a compiled program have."""
  return {math.prod(map(int, dims.split(",")))
          for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)}


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_the_gradient_of_the_unembedding_crosses_devices_once_after_the_loop(shape):
  mesh, args = on_mesh(shape)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(doors, has_aux=True), static_argnums=4)
    text = step.lower(*args, 16).compile().as_text()
  own = 96 * 32 // shape[2]  # a device's part of the vocabulary, whole rows
  everywhere, inside = list(reduced(text.splitlines())), list(reduced(loops(text)))
  assert [size for size in everywhere if size >= own // 8]  # the search finds what it looks for
  assert max(inside, default=0) <= 16 * 40  # in the loop: at most a block of features
  tokens_of_one = 8 * 48 // (shape[0] * shape[1])
  assert tokens_of_one * 96 // shape[2] not in sizes(text)  # a device's whole logits


@pytest.mark.medium
@pytest.mark.parametrize("block", [5, 16])
def test_the_mesh_changes_nothing(block):
  def run(shape):
    mesh, args = on_mesh(shape)
    with jax.set_mesh(mesh):
      step = jax.jit(jax.value_and_grad(doors, has_aux=True), static_argnums=4)
      (_, parts), grads = jax.device_get(step(*args, block))
      return parts, grads
  want = run((1, 1, 1))
  for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
    for got, right in zip(jax.tree.leaves(run(shape)), jax.tree.leaves(want), strict=True):
      assert np.abs(got - right).max() <= 1e-6 * np.abs(right).max(), shape
