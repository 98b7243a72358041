"""Programs compiled ahead of time for TPUs that are not here.

Run by `make test-tpu`, in an environment of its own that has libtpu; elsewhere it is left out.
"""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import loss
from configs import common
from s2d_jax import compiling, models, objectives, optim, sampler, sharding, training
from s2d_jax.losses import blockwise
from s2d_jax.models import paged
from s2d_jax.preflight.hlo import kernels
from s2d_jax.sampler import capacity, programs
from tests.losses import test_blockwise as hlo
from tests.tpu import cycles

pytestmark = pytest.mark.tpu


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
  def loss(params, ids, positions, segments):
    features, _ = model.apply(params, ids, positions, segments)
    return jnp.mean(features.astype(jnp.float32) ** 2)
  with jax.set_mesh(where):
    return jax.jit(jax.grad(loss), out_shardings=layout).lower(params, ids, ids, ids)


def scores(text, tokens):
  """The shapes with two axes of the tokens, or of the tokens of several heads."""
  return [dims for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)
          if sum(int(axis) % tokens == 0 for axis in dims.split(",")) > 1]


@pytest.mark.parametrize("topology, shape", [("v5e:4x4", (1, 4, 4)), ("v6e:4x4", (4, 4, 1)),
                                             ("v5p:2x2x2", (1, 1, 8))])
def test_the_tpus_own_kernel_is_compiled_and_holds_no_scores(topology, shape):
  text = lowered("qwen3-1.7b", mesh(topology, shape), 16, 4096, layers=2).compile().as_text()
  assert "tpu_custom_call" in text and not scores(text, 4096)


def test_scores_are_found_where_no_kernel_is():
  where = mesh("v5e:4x4", (1, 16, 1))
  text = lowered("qwen3-1.7b", where, 16, 4096, layers=1, attention="xla").compile().as_text()
  assert "tpu_custom_call" not in text and scores(text, 4096)


def test_more_devices_than_key_heads_are_not_refused():
  # Eight key heads on sixteen devices: whole on each, and the kernel takes its own.
  where = mesh("v5e:4x4", (1, 1, 16))
  program = lowered("qwen3-8b", where, 4, 1024, layers=2).compile()
  assert "tpu_custom_call" in program.as_text()


def test_head_width_64_compiles():
  # Llama 3.2 1B: heads of 64, and a length that the kernel's tiles do not divide.
  program = lowered("llama-3.2-1b", mesh("v5e:4x4", (2, 2, 4)), 4, 1000, layers=2).compile()
  assert "tpu_custom_call" in program.as_text()


def test_an_8b_training_step_of_a_slice_fits():
  # One whole update of Qwen3-8B with AdamW, 16 rows of 4,096 tokens on 16 chips of 32 GiB.
  where = mesh("v6e:4x4", (1, 16, 1))
  model = models.get("qwen3-8b", dtype="bfloat16", remat="block")
  axes, shapes = models.axes(model.config), models.shapes(model.config)
  params = sharding.laid_out(shapes, sharding.weight_shardings(where, axes, shapes))
  hp = types.SimpleNamespace(**common.adamw(lr=1e-6), microbatches=1, block=512)
  optimizer = optim.make(hp, 10, axes)
  state = training.abstract(optimizer, where, params)
  step = training.jit_update(model, None, objectives.NEGATIVE_LOG_LIKELIHOOD, optimizer, hp,
                     training.shardings(state))
  with jax.set_mesh(where):
    needs = step.lower(state, None, compiling.abstract_batch(16, 4096, where)).compile(
        ).memory_analysis()
  total = (needs.argument_size_in_bytes + needs.temp_size_in_bytes
           + needs.output_size_in_bytes - needs.alias_size_in_bytes)
  state_bytes = 3 * 4 * 8_190_735_360 / 16  # parameters and two moments: 6.1 GB of a device's 34.4
  assert state_bytes < total < 32 * 2**30


def test_an_update_pads_rows_to_whole_tiles():
  # A batch is one token shorter than its rollout. Four such rows on a device were folded to one
  # axis by moving every tile, in programs that took minutes to compile.
  where = mesh("v5e:2x2", (1, 4, 1))
  model = models.get("qwen3-0.6b", dtype="bfloat16", remat="block")
  hp = types.SimpleNamespace(**common.adamw(lr=1e-6), microbatches=2, block=256)
  with jax.set_mesh(where):
    optimizer = optim.make(hp, 10, models.axes(model.config))
    state = training.abstract(optimizer, where, models.laid_out(model.config, where))
    step = training.jit_update(model, None, objectives.NEGATIVE_LOG_LIKELIHOOD, optimizer, hp,
                               training.shardings(state))
    text = step.lower(state, None, compiling.abstract_batch(32, 1023, where)).as_text()
  assert "tensor<16x1024x1024xbf16>" in text  # the features of a microbatch
  # The batch comes with rows of 1,023, and no microbatch has them.
  assert set(re.findall(r"tensor<([\dx]*1023[\dx]*)x", text)) == {"32x1023"}


@pytest.mark.parametrize("topology, shape", [("v5e:4x4", (2, 4, 2)), ("v6e:4x4", (1, 16, 1))])
def test_the_gradient_of_the_unembedding_is_added_up_after_the_loop(topology, shape):
  where, (rows, T, D, V, block) = mesh(topology, shape), (16, 512, 320, 4096, 128)
  def head(width):
    weight = jax.ShapeDtypeStruct((V, width), jnp.float32, sharding=sharding.weight_sharding(
        where, ("vocab", "embed"), (V, width)))
    features = jax.ShapeDtypeStruct((rows, T, width), jnp.bfloat16,
                                    sharding=sharding.batch_sharding(where, (rows, T, width)))
    return blockwise.Head(features, weight)
  def per_token(dtype):
    return jax.ShapeDtypeStruct((rows, T), dtype,
                                sharding=sharding.batch_sharding(where, (rows, T)))
  with jax.set_mesh(where):
    text = jax.jit(jax.grad(hlo.both_losses, has_aux=True), static_argnums=4).lower(
        head(D), head(2 * D), per_token(jnp.int32), per_token(jnp.float32), block
        ).compile().as_text()
  part = V // shape[2]
  hlo.check_one_reduction(text, part * D, block * part)
  tokens = rows * T // (shape[0] * shape[1])
  assert tokens * part not in hlo.sizes(text)  # a device's logits of all its tokens


@pytest.mark.parametrize("kind", ["all-reduce", "reduce-scatter"])
def test_a_gradient_added_up_at_every_block_is_found(kind):
  where, (D, V, block) = mesh("v6e:4x4", (1, 16, 1)), (512, 4096, 128)
  def laid_out(names, shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(where, shape, names))
  with jax.set_mesh(where):
    text = hlo.wrong(kind, block).lower(
        laid_out(("batch",), (16, 512, D)), laid_out((), (V, D)),
        laid_out(("batch",), (16, 512), jnp.int32)).compile().as_text()
  with pytest.raises(AssertionError, match=f"{V * D} <= "):
    hlo.check_one_reduction(text, V * D, block * V)


def test_temporaries_are_a_small_share_of_those_of_all_logits():
  # 8,192 tokens, widths 2,048 and 4,096, Qwen3's vocabulary, bfloat16, on one v5p.
  sizes = types.SimpleNamespace(**loss.FULL | {"dtype": "bfloat16"})
  one = loss.one_device_mesh("v5p:2x2x1")
  def beyond(tokens, block):
    with jax.set_mesh(one):
      account = loss.compiled_memory(sizes, tokens, block, sharding.replicated(one))
    return account["beyond_gradient_bytes"]
  ours, direct = beyond(8192, 256), beyond(8192, 0)
  assert 0 < beyond(8192, 128) <= direct / 30  # 0.16 of 12.4 GB
  assert ours <= direct / 30  # 0.32 GB
  assert beyond(16_384, 256) < 1.01 * ours < beyond(8192, 512)  # it grows with the block alone


@pytest.mark.parametrize("page", [0, 32])
def test_decoding_compiles_and_pages_are_read_by_the_kernel(page):
  # Two layers of Qwen3-1.7B on 16 chips, four of them for the heads. A row's keys and values are
  # not copied out of the pages: no array has a whole row's tokens.
  model = models.get("qwen3-1.7b", dtype="bfloat16")
  model = models.build(dataclasses.replace(model.config, layers=2))
  where = mesh("v5e:4x4", (2, 2, 4))
  shapes = models.shapes(model.config)
  params = sharding.laid_out(shapes, sharding.weight_shardings(
      where, models.axes(model.config), shapes))
  sampling = sampler.Sampling(100, (5,), samples_per_prompt=8, temperature=0.7, top_p=0.8, top_k=20)
  with jax.set_mesh(where):
    config = sampler.SamplerConfig(page=page, chunk=140)
    compiled_sampler = sampler.Sampler(model, sampling, 1, 140, config, params=params)
  text = compiled_sampler.decode_program.as_text()
  assert ("tpu_custom_call" in text) == bool(page)
  longest = compiled_sampler.programs.shapes.lengths[-1]
  assert longest == 240
  held = [dims for dims in re.findall(r"bf16\[([\d,]+)\]", text)
          if {str(longest), "128"} <= set(dims.split(","))]
  assert bool(held) == (not page)


def decoding(name, where, rows, length, layers, **config):
  """The text of the program that decodes `rows` rows with caches of `length` tokens."""
  model = models.get(name, dtype="bfloat16")
  model = models.build(dataclasses.replace(model.config, layers=layers))
  config = sampler.SamplerConfig(**config)
  pages = length // config.page if config.page else 0
  shapes = capacity.Shapes((rows,), (length,), 128, 128, prompts=1, shards=1, pages=rows * pages,
                           table=paged.table_size(pages))
  with jax.set_mesh(where):
    weights = programs.abstract_weights(model, models.laid_out(model.config, where), where)
    slots = programs.abstract_slots(model.config, config, shapes, rows, length, where)
    return programs.lower_decode(model, sampler.Sampling(100, (5,)), config.tokens, weights, slots,
                                 where).compile().as_text()


def test_a_decoding_step_takes_at_most_14_million_cycles():
  # Qwen3-1.7B on one v5e: reading its weights takes 6.3 million at 819 GB/s and 1.5 GHz. A write to
  # the cache that loops over the 64 rows took 27 million in addition.
  text = decoding("qwen3-1.7b", mesh("v5e:2x2", (1, 1, 1)), 64, 192, 28)
  program = cycles.read(text)
  assert [loop.depth for loop in program.loops] == [0]  # the loop over tokens
  assert 6.3e6 < program.cycles <= 14e6
  # A step reads all weights and the cache once. The compiler takes most layers' caches, of 25 MB an
  # array, onto the chip and writes them back; nothing else is copied.
  trips = 10**6  # far more than any other loop has
  inside = [kernel for kernel in kernels(text, unknown_trips=trips) if kernel.count >= trips]
  moved = {True: 0.0, False: 0.0}
  for kernel in inside:
    moved[kernel.opcode.startswith("copy")] += kernel.bytes / trips
  cache = 28 * 2 * 2 * 64 * 192 * 1024
  layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144)
  needed = 28 * layer + cache + 2 * 151_936 * 2048
  assert needed < moved[False] < 1.01 * needed and moved[True] <= cache


@pytest.mark.parametrize("length, cache", [(2304, "auto"), (18_432, "auto"), (2304, "int8")])
def test_a_decoding_step_has_no_loop_over_rows(length, cache):
  # Two layers of Qwen3-8B, 61 rows for each of four devices, its heads split over four.
  text = decoding("qwen3-8b", mesh("v5p:2x2x4", (1, 4, 4)), 244, length, 2, cache=cache)
  assert [loop.depth for loop in cycles.read(text).loops] == [0]
  # Each device writes its own rows: only activations are exchanged, and no part of a cache.
  exchanged = re.findall(r"= \(?(?:bf16|f32|s8)\[([\d,]*)\]\S* all-(?:gather|reduce)", text)
  assert exchanged and not any(str(length) in dims.split(",") for dims in exchanged)


def test_a_write_to_pages_copies_none():
  # Two layers of Qwen3-1.7B: 64 rows of six pages. The pool is written in place.
  text = decoding("qwen3-1.7b", mesh("v5e:2x2", (1, 1, 1)), 64, 192, 2, page=32)
  assert [loop.depth for loop in cycles.read(text).loops] == [0]
  pool = r"= bf16\[8,384,32,128\]\S* "
  assert re.search(pool + r"fusion\(", text) and not re.search(pool + r"copy(-start)?\(", text)


def test_a_loop_over_rows_is_found():
  # The write that a TPU runs as a loop: a range of each row from a position of its own.
  def write(old_BSH, new_BH, position_B):
    return jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new[None], (at, 0)))(
        old_BSH, new_BH, position_B)
  where = sharding.replicated(mesh("v5e:2x2", (1, 1, 1)))
  arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in (
      ((64, 192, 128), jnp.bfloat16), ((64, 128), jnp.bfloat16), ((64,), jnp.int32))]
  program = cycles.read(jax.jit(write, donate_argnums=0).lower(*arrays).compile().as_text())
  assert [loop.depth for loop in program.loops] == [0]
