"""Bytes that all devices send for one token: of products by hand, of decoding, and of an update."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import arithmetic
from s2d_jax import preflight, sharding
from s2d_jax.models import hf
from s2d_jax.preflight import costs, pool, programs, verdicts


@pytest.fixture(scope="module")
def config():
  """The tiny config with on-policy distillation alone; both models have widths that 2 divides."""
  found = arithmetic.get_config("tiny")
  with found.unlocked():
    found.stages = {"reverse_kl": found.stages.reverse_kl}
  return found


class Decoding(pool.Progress):
  """Compiles decoding alone; `tokens` has those of every program."""

  def costs(self, requests, chip):
    """The costs of the requests for that program."""
    self.tokens = {one.program: one.tokens for one in requests}
    return super().costs([one for one in requests if one.program == "sample"], chip)


def decoding(config, shape):
  """(the Cost of a stage's decoding on a mesh, {program: tokens of one run on a device})."""
  progress = Decoding()
  with jax.set_mesh(sharding.make_mesh(shape)):
    (cost,) = preflight.costs_of(config, programs.Target(fast=True), progress)
  return cost, progress.tokens


def test_the_bytes_of_a_token_by_hand():
  # Four devices have 16 tokens each, and add up a gradient of 128 x 256 float32 numbers. In a ring
  # each of them sends 3 of its 4 parts, and then 3 parts of the sum: 196,608 bytes.
  mesh = sharding.make_mesh((4, 1, 1))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  arrays = [jax.ShapeDtypeStruct((64, width), jnp.float32, sharding=rows) for width in (128, 256)]
  lowered = jax.jit(lambda x, y: x.T @ y, out_shardings=sharding.replicated(mesh)).lower(*arrays)
  cost = costs.cost("sft", "update", costs.compile_or_refuse(lowered), 0, 1.0, 1, None, 64 / 4)
  assert cost.sent_per_token == 4 * 196_608 / 64 == 12_288
  assert verdicts.line(cost).split()[-1] == "12,288"


def test_a_program_without_tokens_has_a_dash():
  lowered = jax.jit(jnp.sin).lower(jnp.zeros(4))
  cost = costs.cost("sft", "apply", costs.compile_or_refuse(lowered), 0, 1.0, 1, None)
  assert cost.sent_per_token is None
  assert verdicts.line(cost).split()[-1] == "-"


@pytest.mark.medium
def test_decoding_over_rows_adds_nothing_up_and_over_heads_every_layer(config):
  hp = config.stages.reverse_kl
  rows = hp.prompts * hp.sampling.samples_per_prompt
  sent = {}
  for shape in ((1, 2, 1), (1, 1, 2)):
    cost, tokens = decoding(config, shape)
    assert tokens["update"] == rows / hp.minibatches * (
        config.prompt_tokens + hp.sampling.max_tokens - 1) / 2
    # All rows are one batch, and one dispatch decodes up to 32 tokens of each.
    assert cost.tokens == tokens["sample"] == rows * min(hp.sampling.max_tokens, 32) / 2
    sent[shape] = cost.sent_per_token
  # Two devices tell each other which rows go on, and at the end what they sampled: three numbers.
  assert 0 < sent[1, 2, 1] < 64
  # After attention and after the MLP of each layer both devices add up float32 features: each sends
  # half of them, and half of the sum.
  student = hf.read_config(config.student)
  assert sent[1, 1, 2] > 2 * student.layers * 2 * 4 * student.width
