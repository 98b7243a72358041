"""The look-up of words in a table that is split over devices: values, gradients and fallbacks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import models, sharding
from s2d_jax.models import decoder

V, D = 48, 16
MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4), (1, 4, 2))


def config(tiny_json, dtype):
  return models.get(tiny_json("qwen3"), dtype=dtype).config


def on_mesh(shape, settings, table_VD, ids_BT, weight_BTD, is_split=True):
  """(vectors, the gradient of their weighted sum, the program's text) on a mesh."""
  mesh = sharding.make_mesh(shape)

  def loss(table_VD, ids_BT, weight_BTD):
    x_BTD = decoder.embedded(settings, table_VD, ids_BT, is_split)
    return jnp.sum(x_BTD * weight_BTD, dtype=jnp.float32), x_BTD

  with jax.set_mesh(mesh):
    where = sharding.weight_sharding(mesh, ("vocab", "embed"), table_VD.shape)
    # The gradient is laid out as the table is, as in an update.
    program = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(where, None)).lower(
        sharding.put(table_VD, where), *sharding.put_batch((ids_BT, weight_BTD), mesh)).compile()
    gradient_VD, x_BTD = program(sharding.put(table_VD, where),
                                 *sharding.put_batch((ids_BT, weight_BTD), mesh))
  return np.asarray(x_BTD), np.asarray(gradient_VD), program.as_text()


def arrays(B, T, dtype, width=D):
  rng = np.random.default_rng(0)
  ids_BT = rng.integers(0, V, (B, T)).astype(np.int32)
  ids_BT[:, 0] = 7  # a word of all rows, whose gradient comes from all devices
  return (rng.normal(size=(V, width)).astype(np.float32), ids_BT,
          rng.normal(size=(B, T, width)).astype(dtype))


def by_hand(table_VD, ids_BT, weight_BTD, dtype):
  """The vectors in `dtype` and their gradient, added up in float64."""
  gradient_VD = np.zeros(table_VD.shape)
  np.add.at(gradient_VD, ids_BT, weight_BTD.astype(np.float64))
  return table_VD.astype(dtype)[ids_BT], gradient_VD


@pytest.mark.medium
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", MESHES)
def test_vectors_and_gradients_on_meshes(shape, dtype, tiny_json):
  args = arrays(8, 24, jnp.dtype(dtype))
  x_BTD, gradient_VD, _ = on_mesh(shape, config(tiny_json, dtype), *args)
  want_BTD, want_VD = by_hand(*args, jnp.dtype(dtype))
  np.testing.assert_array_equal(x_BTD, want_BTD)
  # Float32 sums also of bfloat16 gradients: of 30 terms at most.
  np.testing.assert_allclose(gradient_VD, want_VD, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("B, T, width", [(6, 24, D), (8, 23, D), (8, 24, 15)])
def test_sizes_that_do_not_divide_the_mesh(B, T, width, tiny_json):
  args = arrays(B, T, np.float32, width)
  x_BTD, gradient_VD, _ = on_mesh((2, 2, 2), config(tiny_json, "float32"), *args)
  want_BTD, want_VD = by_hand(*args, np.float32)
  np.testing.assert_array_equal(x_BTD, want_BTD)
  np.testing.assert_allclose(gradient_VD, want_VD, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("is_split", [True, False])
def test_no_device_gathers_the_table(is_split, tiny_json):
  args = arrays(8, 24, np.float32)
  *_, text = on_mesh((1, 8, 1), config(tiny_json, "float32"), *args, is_split)
  # The other form has it, so the search for it finds it.
  assert bool(re.search(rf"f32\[{V},{D}\]", text)) == (not is_split)
