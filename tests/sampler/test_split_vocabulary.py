"""The choice of a token where devices split the vocabulary: the token of one device, few bytes."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from s2d_jax import sharding
from s2d_jax.preflight import hlo
from s2d_jax.sampler.sampling import Sampling, sample_token

ROWS = 16


@pytest.mark.parametrize("vocabulary, group", [(8 * 1040, 16), (8 * 1024, 128)])
def test_each_device_gets_sums_of_groups_and_not_the_logits(vocabulary, group):
  rng = np.random.default_rng(0)
  logits_BV = 3 * rng.standard_normal((ROWS, vocabulary)).astype(np.float32)
  key_B2 = rng.integers(0, 2**32, (ROWS, 2), dtype=np.uint32)
  index_B = np.arange(ROWS, dtype=np.int32)
  expected = jax.jit(sample_token, static_argnums=3)(logits_BV, key_B2, index_B, Sampling(8))

  mesh = sharding.make_mesh((1, 1, 8))
  whole = sharding.replicated(mesh)
  def sample(*args):
    logits_BV = sharding.constrain(args[0], "batch", "vocab")
    return sample_token(logits_BV, *args[1:], Sampling(8))
  with jax.set_mesh(mesh):
    split = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    compiled = jax.jit(sample, in_shardings=(split, whole, whole), out_shardings=whole).lower(
        logits_BV, key_B2, index_B).compile()
    found = compiled(jax.device_put(logits_BV, split), *jax.device_put((key_B2, index_B), whole))
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
  # Of each group one float32 number, which a device sends to seven others, and of each row a group
  # of words, a logit and the largest one, which are added up.
  sent = hlo.total(hlo.kernels(compiled.as_text())).collective_bytes
  sums = ROWS * 4 * vocabulary / group * 7 / 8
  assert sums <= sent <= sums + 2 * ROWS * 4 * (group + 2) * 7 / 8
