"""An update's work is split over devices: each has 1/n of the products of one device."""

import jax
import ml_collections
import pytest

from configs import common
from s2d_jax import compiling, models, objectives, optim, sharding, training
from s2d_jax.preflight import hlo

MODEL = {"model_type": "qwen3", "vocab_size": 512, "hidden_size": 128, "head_dim": 32,
         "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
         "tie_word_embeddings": True, "max_position_embeddings": 64}
ROWS = 16
WIDTH = 32


def kernels(shape):
  """The sum of the kernels of one update by negative log-likelihood on a mesh."""
  mesh = sharding.make_mesh(shape)
  model = models.get(MODEL, remat="block")
  hp = ml_collections.ConfigDict(common.adamw(lr=1e-3) | {
      "microbatches": 1, "block": ROWS * WIDTH, "mean": "token"})  # a device has one block
  with jax.set_mesh(mesh):
    optimizer = optim.make(hp, 10, models.axes(model.config))
    state = training.abstract(optimizer, mesh, models.laid_out(model.config, mesh))
    update = training.jit_update(model, None, objectives.NEGATIVE_LOG_LIKELIHOOD, optimizer, hp,
                                 training.shardings(state))
    compiled = update.lower(state, None, compiling.abstract_batch(ROWS, WIDTH, mesh)).compile()
  return hlo.total(hlo.kernels(compiled.as_text()))


@pytest.mark.medium
def test_the_products_of_a_device_fall_with_their_number():
  one = kernels((1, 1, 1))
  # Forward, recomputed and backward: four times each weight but the last, whose product is not
  # recomputed. The unembedding runs forward and twice backward.
  layer = 3 * 128 * 128 + 3 * 128 * 256
  weights = 2 * ROWS * WIDTH * (2 * (4 * layer - 128 * 256) + 3 * 512 * 128)
  # Attention is two products of all pairs of tokens, recomputed too, and four backward.
  attention = 2 * 8 * 2 * ROWS * 4 * WIDTH**2 * 32
  assert one.flops == weights + attention
  assert one.collective_bytes == 0
  for shape in ((1, 2, 1), (1, 4, 1), (1, 8, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 2, 2)):
    found = kernels(shape)
    count = shape[0] * shape[1] * shape[2]
    print(f"{shape}: {found.flops:,.0f} FLOPs of {one.flops:,.0f} on one device, "
          f"{found.collective_bytes:,.0f} bytes sent")
    assert abs(found.flops * count / one.flops - 1) < 0.1, shape
    assert found.collective_bytes > 0
