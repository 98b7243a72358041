"""A new model family, Mistral, touches the table of families alone: an import and an entry."""

import pytest

from tests.newcomer.checkout import Checkout

# The new code itself. Mistral has Llama's layers; its config.json names a window.
CODE = '''"""Mistral 7B v0.3 (https://arxiv.org/abs/2310.06825)."""

from typing import Any

from s2d_jax.json_objects import Json
from s2d_jax.models import layout
from s2d_jax.models.config import Config
from s2d_jax.models.layout import Weight


def config(json: Json, **run: Any) -> Config:
  """The Config of a Mistral config.json."""
  layout.refuse(json, "sliding_window")
  return layout.read(json, architecture="mistral", qk_norm=False, head_width=None, **run)


def config_json(config: Config) -> Json:
  """The config.json of a Config."""
  return layout.write(config, model_type="mistral", architecture="MistralForCausalLM")


def weights(config: Config) -> dict[str, Weight]:
  """{path of a parameter: its Weight}."""
  return layout.dense_weights(config)


PUBLISHED = {"mistral-7b-v0.3": {
    "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "tie_word_embeddings": False, "max_position_embeddings": 32768, "sliding_window": None}}
'''
INIT = "s2d_jax/models/__init__.py"
# A tiny model of the family is saved as a Hugging Face folder and loaded again.
ROUND_TRIP = """
import json, pathlib
import jax, jax.numpy as jnp, numpy as np
from s2d_jax import models
from s2d_jax.models import hf
small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32, "vocab_size": 24}
mistral = models.get(models.PUBLISHED["mistral-7b-v0.3"] | small)
llama = models.get(models.PUBLISHED["llama-3.1-8b"] | small | {
    "rope_scaling": None, "rope_theta": 1e6, "max_position_embeddings": 32768})
params = mistral.init(jax.random.key(0))
hf.save("child", mistral, params)
print(json.loads(pathlib.Path("child/config.json").read_text())["architectures"])
again, loaded = hf.load("child")
jax.tree.map(np.testing.assert_array_equal, params, loaded)
assert again == mistral
# The same layers as Llama's, so equal features from equal weights.
token_BT = jnp.arange(6)[None]
inputs = token_BT, token_BT, jnp.ones_like(token_BT)
np.testing.assert_array_equal(again.apply(loaded, *inputs)[0], llama.apply(params, *inputs)[0])
from s2d_jax.ledger import forward_flops
print(forward_flops(mistral.config, [6]) == forward_flops(llama.config, [6]) > 0)
"""


def add(checkout: Checkout, in_the_table: bool = True) -> None:
  checkout.write("s2d_jax/models/mistral.py", CODE)
  checkout.edit(INIT, "import decoder, layout, llama, qwen3",
                "import decoder, layout, llama, mistral, qwen3")
  if in_the_table:
    checkout.edit(INIT, '"llama": llama}', '"llama": llama, "mistral": mistral}')


def test_two_places_are_touched(tmp_path):
  checkout = Checkout(tmp_path)
  add(checkout)
  assert len(checkout.touched) <= 3
  ran = checkout.run(ROUND_TRIP)
  assert ran.stdout.splitlines() == ["['MistralForCausalLM']", "True"], ran.stderr


@pytest.mark.parametrize("call, message", [
    ('models.get("mistral-7b-v0.3")', "no model is called 'mistral-7b-v0.3'"),
    ('models.get({"model_type": "mistral"})', "model_type='mistral', which is not implemented"),
])
def test_a_forgotten_entry_is_an_error(tmp_path, call, message):
  checkout = Checkout(tmp_path)
  add(checkout, in_the_table=False)
  ran = checkout.run("from s2d_jax import models; " + call)
  assert ran.returncode and message in ran.stderr
