"""The table of architectures: names, counts, keys of config.json, and what is refused."""

import jax
import pytest

from s2d_jax import models
from s2d_jax.errors import InputError
from s2d_jax.models import layout
from s2d_jax.models.config import RopeScaling

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


# Sums over the safetensors of https://huggingface.co/Qwen and /meta-llama, tied heads once.
@pytest.mark.parametrize("name, count", [
    ("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976), ("qwen3-4b", 4_022_468_096),
    ("qwen3-8b", 8_190_735_360), ("qwen3-14b", 14_768_307_200), ("qwen3-32b", 32_762_123_264),
    ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496),
    ("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824),
    ("llama-3.3-70b", 70_553_706_496)])
def test_published_parameter_counts(name, count):
  shapes = models.shapes(models.get(name).config)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weight_table_equals_the_parameter_tree(family, tied, tiny_json):
  config = models.get(tiny_json(family, tie_word_embeddings=tied)).config
  shapes, table = models.shapes(config), models.weights(config)
  assert table.keys() == layout.flat(shapes).keys()
  assert ("unembed" in table) == (not tied)
  is_axes = lambda x: isinstance(x, tuple)
  assert jax.tree.structure(models.axes(config), is_leaf=is_axes) == jax.tree.structure(shapes)
  sizes = {"layer": 2, "vocab": 48, "embed": 32, "heads": 4, "kv_heads": 2, "head": 16, "mlp": 40}
  jax.tree.map(lambda x, axes: [sizes[a] for a in axes] == list(x.shape) or pytest.fail(str(axes)),
               shapes, models.axes(config))


def test_equal_configs_give_one_model(tiny_json):
  assert models.get(tiny_json("qwen3")) is models.get(tiny_json("qwen3", unread=1))
  assert models.get("qwen3-1.7b") is models.get("Qwen3-1.7B")
  assert models.get("qwen3-1.7b") != models.get("qwen3-1.7b", dtype="bfloat16")
  assert hash(models.get("qwen3-1.7b")) == hash(models.get("qwen3-1.7b"))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_config_json_round_trip(family, tiny_json):
  config = models.get(tiny_json(family, tie_word_embeddings=True)).config
  assert models.read_config(models.config_json(config)) == config


def test_both_spellings_of_rope(tiny_json):
  old = models.get(tiny_json("llama", rope_theta=500000.0, rope_scaling=LLAMA3))
  new = tiny_json("llama", rope_parameters={"rope_theta": 500000.0} | LLAMA3)
  del new["rope_theta"]
  assert old is models.get(new)
  assert old.config.rope_theta == 500000.0
  assert old.config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
  assert models.read_config(models.config_json(old.config)) == old.config


def test_defaults_of_head_dim(tiny_json):
  json = tiny_json("llama")
  del json["head_dim"]
  assert models.get(json).config.head_width == 8  # width 32 over 4 heads
  assert models.get(json | {"model_type": "qwen3"}).config.head_width == 128  # Qwen3Config's own


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("key, value", [
    ("use_sliding_window", True), ("layer_types", ["full_attention", "sliding_attention"]),
    ("num_experts", 8), ("num_local_experts", 8), ("attention_bias", True), ("mlp_bias", True),
    ("quantization_config", {"quant_method": "fp8"}), ("hidden_act", "gelu")])
def test_an_unsupported_setting_is_refused_by_its_key(family, key, value, tiny_json):
  with pytest.raises(ValueError, match=f"config.json asks for {key}=.*not implemented"):
    models.get(tiny_json(family, **{key: value}))


@pytest.mark.parametrize("key, value", [("pretraining_tp", 2), ("sliding_window", 128)])
def test_an_unsupported_llama_setting_is_refused_by_its_key(key, value, tiny_json):
  with pytest.raises(ValueError, match=f"config.json asks for {key}=.*not implemented"):
    models.get(tiny_json("llama", **{key: value}))


def test_two_spellings_that_differ_are_refused(tiny_json):
  both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
          "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
  with pytest.raises(ValueError, match="rope_parameters=.* and rope_scaling=.*, which differ"):
    models.get(tiny_json("qwen3", **both))
  both["rope_scaling"] = {"rope_type": "default"}
  assert models.get(tiny_json("qwen3", **both)).config.rope_scaling is None


@pytest.mark.parametrize("rope", [
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic"}}])
def test_unknown_rope_is_refused(rope, tiny_json):
  with pytest.raises(ValueError, match="rope_type='(yarn|dynamic)', which is not implemented"):
    models.get(tiny_json("qwen3", **rope))


CONTRADICTIONS = [
    ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta=10000 and config"),
    ({"rope_theta": 5e5, "rope_scaling": {"rope_theta": 1e4}}, "has 500000, which differ"),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4} | LLAMA3}, "has 500000, which dif"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "rope_scaling={'rope_"),
    ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": LLAMA3}, "which differ: keep the on"),
    ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 32.0}}, "which differ: keep"),
    ({"rope_parameters": LLAMA3, "rope_scaling": {"factor": 8.0}}, "which differ: keep the one"),
    ({"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 8.0}}, "which diffe"),
    ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "'default' and type='linear', "),
    ({"rope_scaling": LLAMA3 | {"type": "default"}}, "rope_type='llama3' and type='default', whic"),
    ({"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}}, "factor=0"),
    ({"original_max_position_embeddings": 64, "rope_scaling": LLAMA3}, "itself has 64, which diff"),
    ({"rope_scaling": {"factor": 8.0}}, "has the key 'factor', which RoPE of type default does no"),
    ({"rope_parameters": {"mrope_section": [2, 3, 3]}}, "key 'mrope_section', which RoPE of type "),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "has the key 'full_attention',"),
    ({"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "key 'attention_factor', which RoPE of"),
    ({"rope_scaling": LLAMA3 | {"factor": -8.0}}, "has -8.0 under 'factor'"),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 0}}, "has 0 under 'high_freq_factor'"),
    *(({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != key}}, f"has no '{key}'")
      for key in sorted(LLAMA3.keys() - {"rope_type"})),
    ({"rope_scaling": {"rope_type": "Llama3"}}, "rope_type='Llama3', which is not implemented"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, "rope_type='linear', which is not"),
]


@pytest.mark.parametrize("changes, reason", CONTRADICTIONS)
def test_settings_of_rope_that_contradict_each_other_are_refused(changes, reason, tiny_json):
  with pytest.raises(InputError) as error:
    models.get(tiny_json("llama", **changes))
  assert reason in str(error.value) and str(error.value).startswith("config.json")


def test_equal_settings_of_rope_in_two_places_are_taken(tiny_json):
  plain = models.get(tiny_json("llama", rope_theta=5e5, rope_scaling=LLAMA3)).config
  for changes in (
      {"rope_parameters": {"rope_theta": 5e5} | LLAMA3, "rope_scaling": LLAMA3},
      {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"rope_theta": 500000}},
      {"rope_scaling": LLAMA3 | {"type": "llama3", "partial_rotary_factor": None}},
      {"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()},
       "rope_parameters": LLAMA3 | {"partial_rotary_factor": 1}},
      {"rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k},
       "original_max_position_embeddings": 8192},
      {"rope_scaling": LLAMA3, "rope_parameters": {}}):
    assert models.get(tiny_json("llama", rope_theta=5e5, **changes)).config == plain


def test_partial_rope_is_refused(tiny_json):
  with pytest.raises(ValueError, match="partial_rotary_factor=0.5"):
    models.get(tiny_json("llama", partial_rotary_factor=0.5))


def test_a_missing_key_is_named(tiny_json):
  json = tiny_json("llama")
  del json["intermediate_size"]
  with pytest.raises(ValueError, match="no 'intermediate_size'"):
    models.get(json)


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
         "num_key_value_heads", "intermediate_size", "max_position_embeddings")
NUMBERS = ("rms_norm_eps", "rope_theta")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.5, 64.0, True, "64", [64], {}, 10**12, 10**40])
def test_a_size_that_is_no_positive_integer_is_refused(key, value, tiny_json):
  with pytest.raises(InputError, match=rf"^config.json has .* under '{key}': make it an integer"):
    models.get(tiny_json("llama", **{key: value}))


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, -1e-6, "NaN", "10000", True, [1.0], 1e-40, 1e39, 10**40,
                                   float("nan"), float("inf")])
def test_a_number_that_no_model_has_is_refused(key, value, tiny_json):
  with pytest.raises(InputError, match=rf"^config.json has .* under '{key}': make it a number"):
    models.get(tiny_json("qwen3", **{key: value}))


# A key with a default may be null; each of these must have a value.
@pytest.mark.parametrize("key", sorted({*SIZES, *NUMBERS} - {"head_dim", "num_key_value_heads"}))
def test_a_key_that_is_null_is_refused(key, tiny_json):
  with pytest.raises(InputError, match=f"^config.json has null under '{key}'"):
    models.get(tiny_json("llama", **{key: None}))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_null_is_the_default_of_a_key_that_has_one(family, tiny_json):
  nulls = dict.fromkeys(("rope_scaling", "rope_parameters", "layer_types", "num_key_value_heads",
                         "tie_word_embeddings", "sliding_window", "attention_bias", "num_experts"))
  config = models.get(tiny_json(family, **nulls)).config
  assert (config.rope_scaling, config.kv_heads, config.tied) == (None, 4, False)


@pytest.mark.parametrize("changes, sentence", [
    ({"tie_word_embeddings": "false"}, "'false' under 'tie_word_embeddings': make it true or fal"),
    ({"tie_word_embeddings": 1}, "1 under 'tie_word_embeddings'"),
    ({"layer_types": "full_attention"}, "under 'layer_types': make it a list"),
    ({"layer_types": [None, 3]}, "asks for layer_types=3, which is not implemented"),
    ({"layer_types": ["full_attention"]}, "has 1 layer_types and num_hidden_layers is 2: take"),
    ({"rope_scaling": "llama3"}, "under 'rope_scaling': make it an object"),
    ({"rope_parameters": [1e4]}, "under 'rope_parameters': make it an object"),
    ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope_scaling has .* 'rope_type': make it a te"),
    ({"rope_scaling": {"type": 3}}, "rope_scaling has 3 under 'type': make it a text"),
    ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters has '1e4' under 'rope_theta'"),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters has -1.0 under 'rope_theta'"),
    ({"rope_scaling": LLAMA3 | {"factor": 0}}, "rope_scaling has 0 under 'factor'"),
    ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling has null under 'factor'"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": "1"}}, "'1' under 'low_freq_factor'"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor 4 and high_freq_factor 4"),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0.5}}, "make it an integer"),
    ({"hidden_act": ["silu"]}, "asks for hidden_act=.'silu'., which is not implemented"),
    ({"attention_bias": "no"}, "asks for attention_bias='no', which is not implemented"),
    ({"quantization_config": {}}, "asks for quantization_config={}, which is not implemented"),
    ({"model_type": ["llama"]}, "asks for model_type=.'llama'., which is not implemented"),
    ({"model_type": None}, "asks for model_type=None, which is not implemented"),
    ({"head_dim": None, "num_attention_heads": 64}, "head_dim 0 is zero and RoPE rotates pairs")])
def test_a_wrong_value_is_a_sentence(changes, sentence, tiny_json):
  with pytest.raises(InputError, match=sentence):
    models.get(tiny_json("llama", **changes))


def test_unknown_names_and_families_list_the_known_ones():
  with pytest.raises(ValueError, match="no model is called 'qwen4-1b': choose from qwen3-0.6b"):
    models.get("qwen4-1b")
  with pytest.raises(ValueError, match="model_type='qwen3_moe', which is not implemented"):
    models.get({"model_type": "qwen3_moe"})


@pytest.mark.parametrize("changes, sentence", [
    ({"num_key_value_heads": 3}, "4 query heads do not share 3 key heads"),
    ({"head_dim": 15}, "head_dim 15 is odd")])
def test_impossible_heads_are_refused(changes, sentence, tiny_json):
  with pytest.raises(ValueError, match=sentence):
    models.get(tiny_json("qwen3", **changes))


def test_unknown_run_settings_are_refused():
  with pytest.raises(ValueError, match="dtype 'float16' is unknown: choose it from float32, bf"):
    models.get("qwen3-0.6b", dtype="float16")
  with pytest.raises(ValueError, match="remat 'all' is unknown: choose it from none, block, dots"):
    models.get("qwen3-0.6b", remat="all")
  with pytest.raises(ValueError, match="attention 'flash' is unknown: choose it from auto, xla"):
    models.get("qwen3-0.6b", attention="flash")


def test_a_tree_of_shapes_is_the_callers_own():
  config = models.get("qwen3-1.7b").config
  first = models.shapes(config)
  first["layers"].clear()
  assert models.shapes(config)["layers"]
