"""The memory that a stage holds, by hand, and what it leaves for the caches of its samplers."""

import jax
import pytest

from configs import common
from s2d_jax import models, optim, sampler, sharding
from s2d_jax.compiling import Samplers
from s2d_jax.roles import Role, StageModels, resident

CONFIG = {"model_type": "qwen3", "vocab_size": 16, "hidden_size": 16, "head_dim": 8,
          "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
          "tie_word_embeddings": False, "max_position_embeddings": 64}
# Numbers of a model: of each layer q, o, k, v, norms and MLP; the last norm, embedding and head.
NUMBERS = 2 * (1024 + 512 + 48 + 1152) + 16 + 2 * 256
SAMPLING = common.sampling(samples_per_prompt=4, max_tokens=8)


def role(shapes=models.shapes, **run):
  """A model with its abstract weights on one device."""
  model = models.get(dict(CONFIG), **run)
  return Role(model, models.laid_out(model.config, sharding.current_mesh(), shapes))


@pytest.fixture
def mesh():
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))) as found:
    yield found


def test_the_memory_that_a_stage_holds_by_hand(mesh):
  learner = role()
  guide = role(models.frozen_shapes, dtype="bfloat16")
  optimizer = optim.make(common.ConfigDict(common.adamw(lr=1e-3)), 10,
                         models.trained(learner.model.config))
  frozen = sum((2 * 16, 2 * 16, 2 * 8, 2 * 8, 16))  # norms stay float32
  held = resident(StageModels(learner, None, learner, on_policy=True, guide=guide), optimizer)
  assert held["learner"] == 4 * NUMBERS
  assert held["guide"] == 2 * NUMBERS + 2 * frozen
  assert 0 <= held["optimizer"] - 2 * 4 * NUMBERS < 64  # Adam's two moments, and counters
  assert set(held) == {"learner", "optimizer", "guide"}
  # An actor that is the guide is held once; another one and the start of pass rates are held too.
  held = resident(StageModels(learner, None, guide, False, guide), optimizer)
  assert set(held) == {"learner", "optimizer", "guide"}
  held = resident(StageModels(learner, None, guide, False, role(), guide), optimizer)
  assert held["actor"] == held["pass rate model"] == 2 * NUMBERS + 2 * frozen


@pytest.mark.medium
def test_a_sampler_has_the_memory_that_the_stage_leaves(mesh):
  # A row of 3 + 8 tokens; a prompt that is read, with its scores for four heads.
  row = 2 * 2 * 2 * 8 * 4 * 11
  read = 2 * 2 * 2 * 8 * 4 * 3 + 4 * 4 * 3 * 3
  held = 1_000_000
  # A change of size holds one of two layers twice.
  memory = int((7.5 * 1.5 * row + 2 * read + held + 4 * (NUMBERS + 256)) / 0.9) + 16
  samplers = Samplers(sampler.SamplerConfig(), 3, (1,), str, memory=memory, held=held)
  found = samplers.compile(role(), common.ConfigDict(SAMPLING), batch=2)
  assert found.programs.shapes.batches[0] == 7
  with pytest.raises(ValueError, match=r"^config\.sampler\.cache_gib is 0 and a device has 0 GiB "):
    samplers._replace(held=memory).compile(role(), common.ConfigDict(SAMPLING), batch=2)
