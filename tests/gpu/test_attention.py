"""Attention in programs for a GPU that is not here: cuDNN's kernels, and what they spare."""

import re

import jax
import jax.numpy as jnp
import pytest

from s2d_jax import models, sampler, sharding
from s2d_jax.preflight import costs, hlo, topologies
from s2d_jax.sampler import capacity, programs
from tests.gpu.test_preflight import LAYERS, lowered_update

pytestmark = pytest.mark.gpu

T = 18_432  # a prompt of 2,048 tokens and a response of 16,384


def squares(text):
  """The types of arrays that have two axes of T tokens."""
  found = set(re.findall(r"\w+\[[\d,]+\]", text))
  return {x for x in found
          if sum(axis == str(T) for axis in re.findall(r"\d+", x.partition("[")[2])) > 1}


# An H200 reached these: in the product of two matrices, and in reading.
RATES = topologies.chip("h100")._replace(flops=800e12, bandwidth=4.4e12)


def test_a_long_update_holds_no_tokens_times_tokens():
  text = lowered_update("qwen3-1.7b", 1, T, num_hidden_layers=LAYERS).compile().as_text()
  assert not squares(text)
  # The forward pass, that pass again where a layer is recomputed, and the backward pass: nothing of
  # them is about future keys, nor about a mask.
  found = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', text)
  assert sorted(set(found)) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
  assert text.count('"mask_type": "PADDING_CAUSAL"') == len(found)
  # tests/gpu/test_update.py has the least time of such an update.


def test_packed_rows_have_a_kernel_with_a_mask():
  # Which is also what the test above would find.
  where = sharding.make_mesh((1, 1, 1), topologies.devices("h100"))
  model = models.get(models.PUBLISHED["qwen3-1.7b"] | {"num_hidden_layers": 1},
                     dtype="bfloat16", attention="cudnn_packed")
  ids = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=sharding.replicated(where))
  with jax.set_mesh(where):
    text = jax.jit(lambda *args: model.apply(*args)[0]).lower(
        models.laid_out(model.config, where), ids, ids, ids).compile().as_text()
  assert "__cudnn$fmhaScaleBiasSoftmax" in text and squares(text)


def lowered_decode(layers, rows=64, length=192):
  """The program that decodes rows of 1.7 B parameters' shapes, lowered for a card."""
  where = sharding.make_mesh((1, 1, 1), topologies.devices("h100"))
  model = models.get(models.PUBLISHED["qwen3-1.7b"] | {"num_hidden_layers": layers},
                     dtype="bfloat16")
  config = sampler.SamplerConfig()
  shapes = capacity.Shapes((rows,), (length,), 128, 128, prompts=1, shards=1, pages=0, table=0)
  with jax.set_mesh(where):
    weights = programs.abstract_weights(model, models.laid_out(model.config, where), where)
    slots = programs.abstract_slots(model.config, config, shapes, rows, length, where)
    return programs.lower_decode(model, sampler.Sampling(100, (5,)), config.tokens, weights, slots,
                                 where)


def decoding(layers):
  """The compiled text of `lowered_decode`, and the kernels of a step."""
  text = lowered_decode(layers).compile().as_text()
  trips = 10**6  # far more than any other loop has
  return text, [kernel._replace(count=kernel.count // trips, flops=kernel.flops / trips,
                                bytes=kernel.bytes / trips)
                for kernel in hlo.kernels(text, unknown_trips=trips) if kernel.count >= trips]


def test_a_decoding_step_reads_its_cache_once_and_moves_none_of_it():
  # 64 rows with caches of 192 tokens, of eight key heads of 128.
  text, inside = decoding(LAYERS)
  assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == LAYERS
  cache = r"bf16\[64,192,8,128\]"
  assert re.search(cache, text)
  # No copy, no transpose and no other order of the axes.
  assert not re.search(rf"= {cache}\S* (copy|transpose)\(", text)
  assert not re.search(r"bf16\[64,8,(192,128|128,192)\]", text)
  # One loop, over tokens.
  assert len(re.findall(r" while\(", text)) == 1
  # A step moves the layers' weights and cache once, and a quarter of that in activations. A
  # copy of one layer's MLP weights would move another 150 MB.
  _, larger = decoding(2 * LAYERS)
  few, many = (sum(kernel.bytes for kernel in found) for found in (inside, larger))
  layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144) + 2 * 2 * 64 * 192 * 1024
  assert LAYERS * layer < many - few < 1.3 * LAYERS * layer
  # Four products, attention, the heads with the writes into the cache, SiLU, and two residuals
  # with their norms: nine kernels a layer. All 28 layers, by what LAYERS more of them add:
  count, larger_count = (sum(kernel.count for kernel in found) for found in (inside, larger))
  assert larger_count - count == 9 * LAYERS
  assert count + 9 * (28 - LAYERS) <= 265
  few, many = (costs.least(found, RATES).seconds for found in (inside, larger))
  assert few + (28 - LAYERS) * (many - few) / LAYERS <= 1.51e-3


@pytest.mark.parametrize("flags, alone", [("", True), ("--xla_gpu_enable_command_buffer=", False)])
def test_a_dispatch_is_one_cuda_graph_unless_the_user_says_otherwise(flags, alone, tmp_path,
                                                                     monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", flags)
  lowered_decode(1).compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True})
  (dumped,) = tmp_path.glob("*jit_decode.thunk_sequence_after_thunk_passes.txt")
  # The host launches those at the beginning of a line.
  launched = re.findall(r"^\d+: (k\w+)", dumped.read_text(encoding="utf-8"), re.M)
  # The loop is in the graph, or the host drives it.
  assert (launched == ["kCommandBuffer"]) == alone
  assert ("kWhile" in launched) != alone
