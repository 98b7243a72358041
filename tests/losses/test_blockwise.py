"""Blockwise losses equal the readable ones on full logits, for block sizes that divide or not."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2d_jax import compiling, objectives, sharding, training
from s2d_jax.losses import blockwise, kl, tokens

B, T, D, V = 2, 7, 4, 11
RNG = np.random.default_rng(0)
TARGETS_BT = RNG.integers(V, size=(B, T))
WEIGHT_BT = jnp.asarray(RNG.random((B, T)) * (RNG.random((B, T)) > 0.3), jnp.float32)
COUNTS_BT = (np.asarray(WEIGHT_BT) > 0).astype(np.float32)
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
  def summed(student, guide):
    return blockwise.divergence(f, student, guide, WEIGHT_BT, block)

  (total, value_BT), grads = jax.jit(jax.value_and_grad(summed, has_aux=True))(STUDENT, GUIDE)
  want, want_grads = jax.jit(
      jax.value_and_grad(direct_divergence, argnums=1), static_argnums=0)(f, STUDENT, GUIDE)
  # Without a gradient it is another program.
  assert summed(STUDENT, GUIDE)[0] == pytest.approx(float(total), rel=1e-6)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(
      value_BT, COUNTS_BT * f(full_logits(STUDENT), full_logits(GUIDE)), rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


@DIRECTIONS
def test_divergence_of_equal_heads_is_exactly_zero_and_so_is_its_gradient(f):
  loss_function = jax.jit(jax.value_and_grad(
      lambda student, guide: blockwise.divergence(f, student, guide, WEIGHT_BT, 6)[0]))
  total, grads = loss_function(STUDENT, STUDENT)
  assert total == 0
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), grads)


def test_value_carries_no_gradient():
  def total(student):
    return blockwise.divergence(kl.reverse_kl, student, GUIDE, WEIGHT_BT, 6)[1].sum()
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), jax.grad(total)(STUDENT))


def test_unused_slots_of_a_block_add_nothing_even_if_their_loss_is_nan():
  def wild(student_logits_BTV, guide_logits_BTV):  # not a number for logits of 0, nor its gradient
    value_BT = kl.reverse_kl(student_logits_BTV, guide_logits_BTV)
    return value_BT / jnp.sum(jnp.abs(student_logits_BTV), axis=-1)
  def tame(student):
    student_BTV, guide_BTV = full_logits(student), full_logits(GUIDE)
    return jnp.sum(WEIGHT_BT * kl.reverse_kl(student_BTV, guide_BTV)
                   / jnp.sum(jnp.abs(student_BTV), axis=-1))
  assert np.isnan(wild(jnp.zeros((1, 1, V)), jnp.zeros((1, 1, V))))
  def summed(student):
    return blockwise.divergence(wild, student, GUIDE, WEIGHT_BT, 64)[0]
  np.testing.assert_allclose(summed(STUDENT), tame(STUDENT), rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), jax.grad(summed)(STUDENT),
               jax.grad(tame)(STUDENT))


def test_a_batch_without_weight_has_loss_0_and_gradient_0_even_on_nan():
  def wild(student_BTV, guide_BTV):
    return kl.reverse_kl(student_BTV, guide_BTV) * jnp.inf
  total, grads = jax.value_and_grad(lambda s: blockwise.divergence(
      wild, s, GUIDE, jnp.zeros((B, T)), 6)[0])(STUDENT)
  assert total == 0
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), grads)


@pytest.mark.parametrize("count, block, blocks", [(0, 2, 0), (1, 2, 1), (5, 2, 3), (14, 2, 7),
                                                 (6, 6, 1), (7, 6, 2), (14, 64, 1)])
def test_tokens_without_weight_are_in_no_block(count, block, blocks):
  weight_BT = np.zeros(B * T, np.float32)
  weight_BT[RNG.permutation(B * T)[:count]] = 1
  weight_BT, formed = weight_BT.reshape(B, T), []
  def f(student_BTV, guide_BTV):
    jax.debug.callback(lambda: formed.append(1))
    return kl.reverse_kl(student_BTV, guide_BTV)
  total, value_BT = blockwise.divergence(f, STUDENT, GUIDE, jnp.asarray(weight_BT), block)
  jax.effects_barrier()
  assert len(formed) == blocks
  want_BT = weight_BT * kl.reverse_kl(full_logits(STUDENT), full_logits(GUIDE))
  np.testing.assert_allclose(value_BT, want_BT, rtol=1e-5)
  np.testing.assert_allclose(total, want_BT.sum(), rtol=1e-5)
  both = blockwise.logp(STUDENT, TARGETS_BT, block, weight_BT > 0)
  for got_BT, want_BT in zip(both, direct_logp(STUDENT), strict=True):
    np.testing.assert_allclose(got_BT, weight_BT * want_BT, atol=2e-6)
  grads = jax.grad(lambda s: jnp.sum(
      blockwise.logp(s, TARGETS_BT, block, weight_BT > 0)[0] * COTANGENTS[0]))(STUDENT)
  want = jax.grad(lambda s: jnp.sum(weight_BT * COTANGENTS[0] * direct_logp(s)[0]))(STUDENT)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want)


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


def test_logged_values_come_from_the_pass_of_the_loss():
  def f(student_BTV, guide_BTV, targets_BT):
    logp_BT = tokens.log_prob(student_BTV, targets_BT)
    return (kl.reverse_kl(student_BTV, guide_BTV),
            {"entropy": tokens.entropy(student_BTV), "logp": logp_BT})
  (total, (value_BT, found)), grads = jax.value_and_grad(
      lambda s: blockwise.divergence(f, s, GUIDE, WEIGHT_BT, 6, TARGETS_BT), has_aux=True)(STUDENT)
  logp_BT, entropy_BT = direct_logp(STUDENT)
  np.testing.assert_allclose(found["entropy"], COUNTS_BT * entropy_BT, rtol=1e-5)
  np.testing.assert_allclose(found["logp"], COUNTS_BT * logp_BT, rtol=1e-5)
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
def test_vocabularies_padded_to_different_sizes_are_compared_on_shared_tokens(f):
  def padded(head, rows):
    padding = np.random.default_rng(5).normal(size=(rows, head.weight_VD.shape[1]))
    padding = padding.astype(np.float32)
    return head._replace(weight_VD=jnp.concatenate([head.weight_VD, padding * 9]))
  want, want_grads = jax.value_and_grad(lambda s: direct_divergence(f, s, GUIDE))(STUDENT)
  for student, guide in ((padded(STUDENT, 3), GUIDE), (STUDENT, padded(GUIDE, 2))):
    total, grads = jax.value_and_grad(
        lambda s, g=guide: blockwise.divergence(f, s, g, WEIGHT_BT, 6)[0])(student)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    np.testing.assert_allclose(grads.weight_VD[:V], want_grads.weight_VD, atol=1e-5)
    np.testing.assert_array_equal(grads.weight_VD[V:], 0.0)


def both_losses(student, guide, targets_BT, weight_BT, block):
  """A loss that enters both."""
  logp_BT, entropy_BT = blockwise.logp(student, targets_BT, block, weight_BT > 0)
  parts = (blockwise.divergence(kl.reverse_kl, student, guide, weight_BT, block)[0],
           jnp.sum(logp_BT * weight_BT), jnp.sum(entropy_BT * weight_BT))
  return sum(parts), parts


def sizes(text):
  """How many elements the arrays of a compiled program have, of any type."""
  return {math.prod(map(int, dims.split(",")))
          for dims in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)}


@pytest.mark.parametrize("loss_function", ["logp", "divergence"])
@pytest.mark.parametrize("backward", [False, True])
def test_no_array_of_all_tokens_by_vocabulary(loss_function, backward):
  count, wide, block = 256, 512, 16  # 131,072 logits, of which a block has 8,192
  def head(width):
    return blockwise.Head(jax.ShapeDtypeStruct((2, count // 2, width), jnp.float32),
                          jax.ShapeDtypeStruct((wide, width), jnp.float32))
  def total(student, guide, targets_BT, weight_BT, direct=False):
    if direct:
      return jnp.sum(weight_BT * kl.reverse_kl(full_logits(student), full_logits(guide)))
    if loss_function == "logp":
      logp_BT, entropy_BT = blockwise.logp(student, targets_BT, block)
      return jnp.sum(weight_BT * (logp_BT + entropy_BT))
    return blockwise.divergence(kl.reverse_kl, student, guide, weight_BT, block)[0]
  def largest(direct):
    f = jax.value_and_grad(total) if backward else total
    program = jax.jit(f, static_argnums=4).lower(
        head(8), head(12), jax.ShapeDtypeStruct((2, count // 2), jnp.int32),
        jax.ShapeDtypeStruct((2, count // 2), jnp.float32), direct)
    return max(sizes(program.compile().as_text()))
  assert largest(False) == block * wide  # one block of logits, and no more
  assert largest(True) >= count * wide  # the search finds what it looks for


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


def on_mesh(shape, rows=8, T=48, D=32, V=480):
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
  """The loops of a compiled program: for each `while`, the lines of its body and what they call."""
  found = re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
  computations = {name: lines.splitlines() for name, lines in found}
  def lines_of(name, visited):
    visited.add(name)
    lines = list(computations[name])
    for called in re.findall(r"%([\w.-]+)", "\n".join(computations[name])):
      if called in computations and called not in visited:
        lines += lines_of(called, visited)
    return lines
  return [lines_of(name, set()) for name in re.findall(r"body=%([\w.-]+)", text)]


def instructions(lines):
  """{name: (what it is, the sizes of its arrays, its operands)}."""
  def matches(kind, result, operands):
    dims = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", result)
    return kind, [math.prod(map(int, d.split(","))) for d in dims], re.findall(
        r"%([\w.-]+)", operands)
  parts = (re.match(r" *(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)", line) for line in lines)
  return {part[1]: matches(part[3], part[2], part[4].split("), ")[0]) for part in parts if part}


def reduced(lines):
  """Elements of each array that is added up over devices, before it is: what is left of it on a
  device may be a part of the sum."""
  every = instructions(lines)
  return sorted(size for kind, _, operands in every.values()
                if re.fullmatch(r"(all-reduce|reduce-scatter)(-start)?", kind)
                for name in operands for size in every[name][1])


def blocks(text, logits):
  """The loops over blocks: the innermost that hold a product of `logits` elements."""
  def holds(lines):
    return any(kind in ("dot", "convolution") and logits in results
               for kind, results, _ in instructions(lines).values())
  held = [set(lines) for lines in loops(text) if holds(lines)]
  return [lines for lines in held if not any(other < lines for other in held)]


def check_one_reduction(text, elements, logits):
  """A gradient of `elements` numbers is added up over devices, and in no loop over blocks."""
  found = blocks(text, logits)
  assert found
  assert elements in reduced(text.splitlines())
  assert max((size for lines in found for size in reduced(lines)), default=0) <= elements // 8


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_the_gradient_of_the_unembedding_crosses_devices_once_after_the_loop(shape):
  mesh, args = on_mesh(shape)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(both_losses, has_aux=True), static_argnums=4)
    text = step.lower(*args, 16).compile().as_text()
  part = 480 // shape[2]  # a device's part of the vocabulary, whole rows
  check_one_reduction(text, part * 32, 16 * part)
  assert reduced(text.splitlines()).count(part * 32) == 2  # one of each function
  assert max(sizes(text)) < 48 * part  # a device's whole logits


def wrong(kind, block):
  """A wrong program, as a control: the gradient is added up over `fsdp` at every block."""
  def over_devices(part_VD):
    if kind == "all-reduce":
      return jax.lax.psum(part_VD, "fsdp")
    return jax.lax.psum_scatter(part_VD, "fsdp", scatter_dimension=1, tiled=True)
  def local(features_BTD, weight_VD, targets_BT):
    def on_block(total, xs):
      grad = jax.grad(lambda w: jnp.sum(tokens.log_prob(xs[0] @ w.T, xs[1])))(weight_VD)
      return total + jnp.abs(over_devices(grad)), ()  # of plain sums a TPU's compiler makes one
    split = features_BTD.reshape(-1, block, weight_VD.shape[1]), targets_BT.reshape(-1, block)
    return jax.lax.scan(on_block, jnp.zeros_like(over_devices(weight_VD)), split)[0]
  return jax.jit(jax.shard_map(
      local, in_specs=(jax.P("fsdp"), jax.P(), jax.P("fsdp")), check_vma=False,
      out_specs=jax.P() if kind == "all-reduce" else jax.P(None, "fsdp")))


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["all-reduce", "reduce-scatter"])
def test_a_program_that_reduces_at_every_block_is_detected(kind):
  # A reduce-scatter leaves an eighth on a device, and adds up all of it.
  mesh, (student, _, targets_BT, _) = on_mesh((1, 8, 1))
  with jax.set_mesh(mesh):
    text = wrong(kind, 16).lower(*student, targets_BT).compile().as_text()
  assert f" {kind}(" in text
  with pytest.raises(AssertionError, match=r"15360 <= \(15360 // 8\)"):
    check_one_reduction(text, 480 * 32, 16 * 480)


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_whole_update_adds_the_gradient_up_once_a_microbatch(shape):
  # Microbatches are a loop of their own around that over blocks: in its body stands one reduction.
  mesh = sharding.make_mesh(shape)
  model = types.SimpleNamespace(
      apply=lambda params, ids, *_: (params["in"][ids % 4], None), unembed=lambda p: p["out"])
  hp = types.SimpleNamespace(microbatches=2, block=16)
  params = {name: jax.ShapeDtypeStruct((rows, 32), jnp.float32, sharding=sharding.weight_sharding(
      mesh, ("vocab", "embed"), (rows, 32))) for name, rows in (("in", 4), ("out", 480))}
  optimizer = optax.sgd(0.1)
  with jax.set_mesh(mesh):
    state = training.abstract(optimizer, mesh, params)
    step = training.jit_update(model, None, objectives.NEGATIVE_LOG_LIKELIHOOD, optimizer, hp,
                       training.shardings(state))
    text = step.lower(state, None, compiling.abstract_batch(16, 48, mesh)).compile().as_text()
  part = 480 // shape[2]
  check_one_reduction(text, part * 32, 16 * part)
  assert reduced(text.splitlines()).count(part * 32) == 1
  around = [lines for lines in loops(text) if any(over < set(lines) for over in blocks(
      text, 16 * part))]
  assert len(around) == 1 and reduced(around[0]).count(part * 32) == 1


@pytest.mark.medium
@pytest.mark.parametrize("block", [5, 16])
@pytest.mark.parametrize("uneven", [False, True])
def test_the_mesh_changes_nothing(block, uneven):
  def run(shape):
    mesh, args = on_mesh(shape)
    if uneven:  # the first rows have no token that counts, the last have all: devices wait
      weight_BT = np.asarray(args[3])
      rows, count = weight_BT.shape
      kept_BT = np.arange(count) < count * (np.arange(rows)[:, None] // 2) / (rows / 2 - 1)
      args = *args[:3], sharding.put_batch((weight_BT * kept_BT).astype(np.float32), mesh)
    with jax.set_mesh(mesh):
      step = jax.jit(jax.value_and_grad(both_losses, has_aux=True), static_argnums=4)
      (_, parts), grads = jax.device_get(step(*args, block))
      return parts, grads
  want = run((1, 1, 1))
  for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
    for got, right in zip(jax.tree.leaves(run(shape)), jax.tree.leaves(want), strict=True):
      assert np.abs(got - right).max() <= 1e-6 * np.abs(right).max(), shape
