"""Programs compiled ahead of time for TPUs that are not here.

Run by `make test-tpu`, in an environment of its own that has libtpu; elsewhere it is left out.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import models, sharding

pytestmark = [pytest.mark.tpu, pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="make test-tpu has libtpu")]


def mesh(topology, shape):
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  return sharding.make_mesh(shape, devices)


def lowered(name, where, rows, tokens, **changes):
  """The gradient of a loss of a model's features on a mesh, lowered."""
  config = models.get(name, dtype="bfloat16", remat="block").config
  model = models.build(dataclasses.replace(config, **changes))
  shapes = models.shapes(model.config)
  layout = sharding.weight_shardings(where, models.axes(model.config), shapes)
  params = sharding.laid_out(shapes, layout)
  ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32,
                             sharding=sharding.batch_sharding(where, (rows, tokens)))
  def loss(params, ids, places, segments):
    features, _ = model.apply(params, ids, places, segments)
    return jnp.mean(features.astype(jnp.float32) ** 2)
  with jax.set_mesh(where):
    return jax.jit(jax.grad(loss), out_shardings=layout).lower(params, ids, ids, ids)


@pytest.mark.parametrize("topology, shape", [("v5e:4x4", (1, 4, 4)), ("v6e:4x4", (4, 4, 1)),
                                             ("v5p:2x2x2", (1, 1, 8))])
def test_the_tpus_own_kernel_is_compiled_and_holds_no_scores(topology, shape):
  # 4,096 tokens of 16 heads: scores of one layer's local part would be 512 MiB and more.
  rows = 16
  where = mesh(topology, shape)
  programs = {how: lowered("qwen3-1.7b", where, rows, 4096, layers=2, attention=how).compile()
              for how in ("auto", "xla")}
  text = programs["auto"].as_text()
  assert "tpu_custom_call" in text and "tpu_custom_call" not in programs["xla"].as_text()
  needs = {how: program.memory_analysis().temp_size_in_bytes for how, program in programs.items()}
  local = rows // (shape[0] * shape[1]) * (16 // shape[2]) * 4096 * 4096
  assert needs["xla"] - needs["auto"] > 2 * local  # at least the scores in bfloat16


def test_more_devices_than_key_heads_are_not_refused():
  # Eight key heads on sixteen devices: whole on each, and the kernel takes its own.
  where = mesh("v5e:4x4", (1, 1, 16))
  program = lowered("qwen3-8b", where, 4, 1024, layers=2).compile()
  assert "tpu_custom_call" in program.as_text()


def test_heads_of_half_a_lane_are_compiled():
  # Llama 3.2 1B: heads of 64, and a length that is no multiple of the kernel's tiles.
  program = lowered("llama-3.2-1b", mesh("v5e:4x4", (2, 2, 4)), 4, 1000, layers=2).compile()
  assert "tpu_custom_call" in program.as_text()


def test_an_8b_training_step_of_a_slice_fits(capsys):
  # The bytes that a device of a v5e slice has: 16 GiB.
  where = mesh("v5e:4x4", (1, 16, 1))
  memory = lowered("qwen3-8b", where, 16, 4096).compile().memory_analysis()
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert np.isfinite(total) and total < 16 * 2**30
