"""Logits equal to transformers' own classes, in float32, and folders that go both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from s2d_jax import models
from s2d_jax.models import folders, hf, layout

pytestmark = pytest.mark.torch

CLASSES = {"qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
           "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}
# An original window of 32 puts waves of each of the three kinds among the 8 of a tiny head.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
CASES = [
    ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}, PLAIN),
    ("qwen3", {"num_key_value_heads": 2, "tie_word_embeddings": False}, PLAIN),
    ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 8}, PLAIN),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}, LLAMA3),
    ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}, LLAMA3),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 8}, PLAIN),
]
ATOL = 1e-4  # two layers in float32, on logits of order one to ten


def torch_model(family, changes, rope):
  """A tiny random model of transformers, its weights large enough for every one to show."""
  torch.manual_seed(0)
  config_class, model_class = CLASSES[family]
  settings = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 40,
              "max_position_embeddings": 256, "rope_parameters": dict(rope)}
  model = model_class(config_class(**settings | changes)).to(torch.float32).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
  return model


def logits(model, params, ids):
  rows, length = ids.shape
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  features, _ = jax.jit(model.apply)(params, ids, positions, np.ones_like(ids))
  return jnp.einsum("BTD,VD->BTV", features.astype(jnp.float32), model.unembed(params))


def torch_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor(ids).long()).logits.float().numpy()


@pytest.mark.medium
@pytest.mark.parametrize("family, changes, rope", CASES)
def test_logits_both_ways(family, changes, rope, tmp_path):
  theirs = torch_model(family, changes, rope)
  theirs.save_pretrained(tmp_path / "theirs")
  model, params = hf.load(tmp_path / "theirs")
  ids = np.random.default_rng(0).integers(0, 48, (2, 60)).astype(np.int32)
  want = torch_logits(theirs, ids)
  assert np.std(want) > 0.5
  np.testing.assert_allclose(logits(model, params, ids), want, atol=ATOL, rtol=0)

  for source in (None, tmp_path / "theirs"):  # a config.json of our own, and theirs
    hf.save(tmp_path / "ours", model, params, source=source)
    again = CLASSES[family][1].from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    np.testing.assert_allclose(torch_logits(again, ids), want, atol=1e-6, rtol=0)


def bare(tensors):
  """The names of a checkpoint of the model without its head's class."""
  return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def head_alone(tensors):
  """A tied model's one matrix under the name of its head."""
  tensors = dict(tensors)
  return {"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors}


def frequencies(tensors):
  """With what an old checkpoint stores of RoPE."""
  name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
  return tensors | {name.format(i): np.ones(8, np.float32) for i in range(2)}


@pytest.mark.medium
@pytest.mark.parametrize("stored", [bare, head_alone, frequencies])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_names_that_transformers_loads_are_loaded_alike(family, stored, tmp_path):
  folder = tmp_path / "theirs"
  torch_model(family, {"num_key_value_heads": 2, "tie_word_embeddings": True}, PLAIN
              ).save_pretrained(folder)
  path = folder / "model.safetensors"
  tensors = stored(safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})
  theirs = CLASSES[family][1].from_pretrained(folder, dtype=torch.float32).eval()
  model, params = hf.load(folder)
  ids = np.random.default_rng(0).integers(0, 48, (2, 60)).astype(np.int32)
  np.testing.assert_allclose(logits(model, params, ids), torch_logits(theirs, ids), atol=ATOL,
                             rtol=0)


@pytest.mark.parametrize("name", sorted(models.PUBLISHED))
def test_transformers_reads_our_config_as_we_do(name):
  config = models.get(name).config
  json = models.config_json(config)
  theirs = CLASSES[config.architecture][0](**json)
  assert models.read_config(theirs.to_dict()) == config


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_rope_frequencies(scaling):
  model = torch_model("llama", {"num_key_value_heads": 2}, scaling or PLAIN)
  config = models.read_config(model.config.to_dict())
  got = models.decoder.rope_frequencies(16, config.rope_theta, config.rope_scaling)
  np.testing.assert_allclose(got, model.model.rotary_emb.inv_freq, rtol=1e-6)


def test_rms_norm_equals_theirs():
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(2, 5, 32)).astype(np.float32), rng.normal(1, 0.3, 32)
  theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(32, eps=1e-5)
  with torch.no_grad():
    theirs.weight.copy_(torch.tensor(scale))
    want = theirs(torch.tensor(x)).numpy()
  got = models.decoder.rms_norm(x, jnp.asarray(scale, jnp.float32), 1e-5)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_rope_equals_theirs(scaling):
  model = torch_model("llama", {"num_key_value_heads": 2}, scaling or PLAIN)
  config = models.read_config(model.config.to_dict())
  x = np.random.default_rng(0).normal(size=(2, 60, 4, 16)).astype(np.float32)
  positions = np.stack([np.arange(60), np.arange(60) * 3 + 5])
  heads_first = torch.tensor(x).transpose(1, 2)
  with torch.no_grad():
    cos, sin = model.model.rotary_emb(heads_first, torch.tensor(positions))
    apply = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    want, _ = apply(heads_first, heads_first, cos, sin)
  frequency = models.decoder.rope_frequencies(16, config.rope_theta, config.rope_scaling)
  angle = jnp.asarray(positions[..., None], jnp.float32) * frequency[None, None]
  got = models.decoder.rope(jnp.asarray(x), angle)
  np.testing.assert_allclose(got, want.transpose(1, 2).numpy(), atol=5e-5)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]['num_key_value_heads']}")
def pair(request, tmp_path):
  """(their model, our model and parameters) of one case."""
  theirs = torch_model(*request.param)
  theirs.save_pretrained(tmp_path / "theirs")
  return theirs, *hf.load(tmp_path / "theirs")


@pytest.mark.medium
def test_attention_and_one_layer_equal_theirs(pair):
  theirs, model, params = pair
  c, T = model.config, 20
  x = np.random.default_rng(0).normal(size=(2, T, 32)).astype(np.float32)
  positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  rows = torch.tensor(x)
  angles = theirs.model.rotary_emb(rows, torch.tensor(positions).long())
  mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
  layer = theirs.model.layers[1]
  with torch.no_grad():
    attended, _ = layer.self_attn(rows, position_embeddings=angles, attention_mask=mask)
    whole = layer(rows, position_embeddings=angles, attention_mask=mask)
    whole = whole[0] if isinstance(whole, tuple) else whole
  layer_params = jax.tree.map(lambda x: x[1], params["layers"])
  ones = np.ones((2, T), np.int32)
  reads = models.attention.reading("xla", positions, ones)
  frequency = models.decoder.rope_frequencies(c.head_width, c.rope_theta, c.rope_scaling)
  angle = jnp.asarray(positions[..., None], jnp.float32) * frequency[None, None]
  arguments = angle, reads, None, None
  got, _ = models.decoder.Attention(c, "xla").apply({"params": layer_params["attn"]}, x, *arguments)
  np.testing.assert_allclose(got, attended.numpy(), atol=ATOL)
  got, _ = models.decoder.Block(c, "xla").apply({"params": layer_params}, x, *arguments)
  np.testing.assert_allclose(got, whole.numpy(), atol=ATOL)


@pytest.mark.medium
def test_the_gradient_of_every_weight_equals_theirs(pair):
  theirs, model, params = pair
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 48, (2, 20)).astype(np.int32)
  weight = rng.normal(size=(2, 20, 48)).astype(np.float32)
  (torch.log_softmax(theirs(torch.tensor(ids).long()).logits, -1) * torch.tensor(weight)
   ).sum().backward()
  def loss(params):
    return jnp.sum(jax.nn.log_softmax(logits(model, params, ids)) * weight)
  grads = layout.flat(jax.jit(jax.grad(loss))(params))
  want = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
  ours = folders.names(model.config)
  assert ours.keys() == want.keys()
  for name, (path, table, layer) in ours.items():
    got = table.to_theirs(np.asarray(grads[path] if layer is None else grads[path][layer]))
    scale = np.abs(want[name]).max()
    np.testing.assert_allclose(got / scale, want[name] / scale, atol=2e-5, err_msg=name)


@pytest.mark.medium
def test_bfloat16_deviates_at_most_twice_as_far_as_theirs(pair):
  theirs, model, params = pair
  ids = np.random.default_rng(0).integers(0, 48, (4, 60)).astype(np.int32)
  exact = torch_logits(theirs, ids)
  half = models.build(dataclasses.replace(model.config, dtype="bfloat16"))
  error = np.asarray(logits(half, params, ids), np.float32) - exact
  other = torch_logits(theirs.to(torch.bfloat16), ids) - exact
  assert 0 < np.sqrt(np.mean(error**2)) <= 2 * np.sqrt(np.mean(other**2))
