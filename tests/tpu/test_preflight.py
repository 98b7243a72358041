"""`s2d-jax preflight --topology`: a recipe's programs compiled for TPUs that are not here."""

import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import arithmetic, qwen3_math
from s2d_jax import compiling, loop, models, objectives, optim, preflight, sharding, training
from s2d_jax.models import attention
from s2d_jax.preflight import hlo, programs, topologies
from tests.preflight import options
from tests.tpu import test_aot

pytestmark = pytest.mark.tpu


def test_every_program_of_a_tiny_config_is_compiled(capsys):
  config = arithmetic.get_config("tiny")
  config.mesh = (1, 2, 2)
  with config.unlocked():
    config.stages = {name: config.stages[name] for name in ("reverse_kl", "student_grpo")}
  config.arms = "untrained,cold_grpo"
  preflight.show(config, "v5e:2x2")
  lines = capsys.readouterr().out.splitlines()
  assert not any("no formula has" in line for line in lines)
  found = [line.split()[:2] for line in lines[2:]]
  # The probe of the GRPO's start. The problems are at hand only where a run prepared them.
  assert re.match(r"4 chips x [\d.e-]+ hours at least: 1 stage, 1 probe, every response", lines[-1])
  for stage in config.stages:
    assert [stage, "update"] in found and [stage, "sample"] in found
  assert ["test", "student"] in found and ["probe", "both"] in found


def test_the_programs_of_options_are_compiled():
  config = options.config()
  with jax.set_mesh(test_aot.mesh("v5e:2x2", (1, 2, 2))):
    found = list(programs.costs_of(config, programs.Target(topologies.chip("v5e:2x2"), fast=True)))
  assert {(cost.stage, cost.program) for cost in found} == options.programs("reward")
  assert all(cost.account is not None for cost in found)


@pytest.mark.parametrize("topology, count", [
    ("v5e:1x1", 1), ("v5e:2x1", 2), ("v6e:1x1", 1), ("v5p:1x1x1", 1), ("v5e:2x2", 4),
    ("v5p:2x2x4", 16)])
def test_slices_smaller_than_a_host_exist(topology, count):
  assert len(topologies.devices(topology)) == count


@pytest.mark.parametrize("topology, shape", [
    ("v5p:4x4x4", (1, 8, 8)), ("v5p:4x4x4", (1, 32, 2)), ("v5p:2x2x4", (1, 2, 8)),
    ("v6e:8x8", (1, 32, 2)), ("v5e:4x4", (2, 8, 1))])
def test_a_mesh_need_not_follow_a_slices_own_axes(topology, shape):
  devices = topologies.devices(topology)
  mesh = sharding.make_mesh(shape, devices)
  assert mesh.devices.shape == shape
  assert sorted(device.id for device in mesh.devices.flat) == sorted(d.id for d in devices)


def test_the_first_stage_of_qwen3_8b_is_lowered_from_shapes_alone(tmp_path):
  for name in ("Qwen3-8B", "Qwen3-1.7B"):
    shutil.copytree(arithmetic.get_config().teacher, tmp_path / name,
                    ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / name / "config.json").write_text(json.dumps(models.PUBLISHED[name.lower()]))
  config = qwen3_math.get_config(f"models={tmp_path},data={tmp_path}")
  hp = config.stages.teacher_grpo
  where = test_aot.mesh("v5p:2x2x4", config.mesh)
  with jax.set_mesh(where):
    learner = preflight.abstract_role(config, "teacher", where, models.shapes)
    optimizer = optim.make(hp.optim, loop.update_count(hp), models.trained(learner.model.config))
    state = training.abstract(optimizer, where, learner.params)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    assert {x.sharding for x in moments} == {x.sharding for x in jax.tree.leaves(state.params)
                                             if x.ndim}
    start = preflight.abstract_role(config, "teacher", where)  # its KL penalty's reference
    step = training.jit_update(learner.model, start.model, objectives.GRPO, optimizer, hp,
                       training.shardings(state))
    rows = hp.prompts * hp.sampling.samples_per_prompt
    batch = compiling.abstract_batch(rows, config.prompt_tokens + hp.sampling.max_tokens - 1, where)
    text = step.lower(state, start.params, batch).as_text()
  assert "sharding" in text and sharding.platform() == "cpu"


def splash(length, heads, width):
  """The sum of the kernels of causal attention and its gradients, compiled for one TPU."""
  device = topologies.devices("v5e:2x2")[0]
  layout = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16, sharding=layout)
  integers = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=layout)

  def loss(q_BTNH, k_BTNH, v_BTNH, positions_BT, segments_BT):
    reads = attention.reading("splash", positions_BT, segments_BT)
    out_BTNH = attention.attention("splash", q_BTNH, k_BTNH, v_BTNH, reads)
    return jnp.sum(out_BTNH.astype(jnp.float32))

  with jax.set_mesh(sharding.make_mesh((1, 1, 1), [device])):
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return hlo.kernels(gradients.lower(x, x, x, integers, integers).compile().as_text())


def test_the_products_of_splash_attention_by_hand():
  length, heads, width = 1024, 2, 128
  found = [kernel for kernel in splash(length, heads, width) if kernel.opcode == "tpu_custom_call"]
  # Pairs of a query and a key that is not in its future, but for half of the diagonal.
  pairs = heads * length**2 / 2
  product = 2 * pairs * width
  # Forward q·k and p·v. Backward q·k twice, do·v twice, ds·k, p·do and ds·q, in two kernels.
  assert sorted(kernel.flops / product for kernel in found) == [2, 3, 4]


def scored(topology, rows, width):
  """(the config, the kernels, the text) of two layers that score rows, each split by fsdp alone."""
  devices = topologies.devices(topology)
  where = sharding.make_mesh((1, len(devices), 1), devices)
  model = models.get(models.PUBLISHED["qwen3-0.6b"] | {"num_hidden_layers": 2}, dtype="bfloat16",
                     remat="block")
  hp = types.SimpleNamespace(microbatches=1, block=256, mean="token")
  with jax.set_mesh(where):
    params = models.laid_out(model.config, where, models.frozen_shapes)
    lowered = training.token_logps(model, objectives.logp, hp).lower(
        params, compiling.abstract_batch(rows, width, where))
    text = lowered.compile().as_text()
  return model.config, hlo.kernels(text), text


def weights_of_two_layers(config):
  attention_weights = config.width * config.head_width * (2 * config.heads + 2 * config.kv_heads)
  return 2 * (attention_weights + 3 * config.width * config.mlp)


def test_products_during_the_gathering_of_weights_by_hand():
  config, kernels, text = scored("v5p:2x2x4", 16, 4096)
  assert "windowed_dot_general" in text  # loops that multiply two parts of a weight in each trip
  layers = [kernel for kernel in kernels if "/layers/" in kernel.source]
  products = sum(kernel.flops for kernel in layers if kernel.opcode != "tpu_custom_call")
  assert 16 * products == 2 * 16 * 4096 * weights_of_two_layers(config)
  # Parts of a weight go both ways round the ring: the 15 of the others, and two in vain.
  sent = sum(kernel.collective_bytes for kernel in layers if "permute" in kernel.opcode)
  assert sent == 2 * weights_of_two_layers(config) * 17 / 16


def test_a_gradient_that_is_scattered_is_sent_once_by_hand():
  where = test_aot.mesh("v5e:2x4", (1, 8, 1))
  split = NamedSharding(where, PartitionSpec("fsdp"))
  def gradient(x_ND, w_DF):
    return jax.grad(lambda w: jnp.tanh(x_ND @ w.astype(jnp.bfloat16)).sum())(w_DF)
  shapes = (jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=split),
            jax.ShapeDtypeStruct((1024, 2048), jnp.float32, sharding=split))
  text = jax.jit(gradient, out_shardings=split).lower(*shapes).compile().as_text()
  assert "%all-reduce-scatter" in text and "to_apply" in text
  # Weights are gathered and gradients scattered in bfloat16: 7 of 8 parts of each.
  assert hlo.total(hlo.kernels(text)).collective_bytes == 2 * 2 * 1024 * 2048 * 7 / 8


def test_weights_gathered_during_other_kernels_by_hand():
  config, kernels, text = scored("v5e:2x2", 4, 512)
  assert "AsyncCollectiveStart" in text
  sent = sum(kernel.collective_bytes for kernel in kernels
             if kernel.opcode == "fusion" or kernel.source.endswith("layers/attn/dot_general"))
  assert sent == 2 * weights_of_two_layers(config) * 3 / 4
