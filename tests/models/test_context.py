"""Features between layers are split by time over the devices that split the heads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import microbatches, models, sharding

ROWS, T, LAYERS = 4, 44, 3


def gradient(shape, model, params, rows=ROWS, width=T):
  """(gradient of a loss of features, the program's text) on a mesh; odd rows are packed."""
  mesh = sharding.make_mesh(shape)
  rng = np.random.default_rng(0)
  ids_BT = rng.integers(0, 48, (rows, width)).astype(np.int32)
  position_BT = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width)).copy()
  segment_BT = np.ones((rows, width), np.int32)
  position_BT[1::2, 20:] -= 20
  segment_BT[1::2, 20:] = 2

  def loss(params, *args):
    return jnp.mean(model.apply(params, *args)[0] ** 3)

  with jax.set_mesh(mesh):
    where = sharding.weight_shardings(mesh, models.axes(model.config), models.shapes(model.config))
    args = (jax.tree.map(sharding.put, jax.device_get(params), where),
            *sharding.put_batch((ids_BT, position_BT, segment_BT), mesh))
    program = jax.jit(jax.grad(loss), out_shardings=where).lower(*args).compile()
    return jax.device_get(program(*args)), program.as_text()


def stored(text):
  """The shapes of arrays in which a program has a part of the inputs of all layers."""
  shapes = {tuple(map(int, dims.split(",")))
            for dims in re.findall(rf"f32\[({LAYERS},\d+,\d+,32)\]", text)}
  # Those of weights have no such time.
  return {shape for shape in shapes if shape[2] in (T, T - 1, T // 2, T // 4)}


@pytest.mark.medium
@pytest.mark.parametrize("K", [1, 4])
def test_layers_inputs_are_stored_in_parts_and_gradients_are_those_of_one_device(
    K, tiny_json, randomized):
  model = models.get(tiny_json("qwen3", num_hidden_layers=LAYERS, num_key_value_heads=K),
                     remat="block")
  params = randomized(model)
  want, whole = gradient((1, 1, 1), model, params)
  assert stored(whole) == {(LAYERS, ROWS, T, 32)}
  for shape in ((1, 1, 2), (2, 2, 2), (1, 1, 4)):
    got, text = gradient(shape, model, params)
    assert stored(text) == {(LAYERS, ROWS // (shape[0] * shape[1]), T // shape[2], 32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.medium
def test_times_that_do_not_divide_the_mesh_are_whole(tiny_json, randomized):
  model = models.get(tiny_json("qwen3", num_hidden_layers=LAYERS), remat="block")
  params = randomized(model)
  want, _ = gradient((1, 1, 1), model, params, width=T - 1)
  got, text = gradient((1, 1, 2), model, params, width=T - 1)
  assert stored(text) == {(LAYERS, ROWS, T - 1, 32)}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("shape, multiple", [((8, 1, 1), 1), ((1, 2, 4), 4), ((1, 1, 3), 3)])
def test_rows_are_padded_to_times_that_divide_the_mesh(shape, multiple):
  with jax.set_mesh(sharding.make_mesh(shape)):
    assert microbatches.time_multiple() == multiple
