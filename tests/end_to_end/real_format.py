"""Folders of tiny random models whose tokenizers and templates are built as the published ones.

Byte-level BPE that is trained here, each family's pre-tokenizer, special tokens, end ids, padded
vocabulary and template structure. The published files themselves are used where a test finds them.
"""

import json
import pathlib

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from s2d_jax import models as decoder_models
from s2d_jax.data.word_problems import problems
from s2d_jax.models import hf, layout

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Qwen3 reads a number digit by digit, Llama 3 in groups of three.
_SPLITS = {"qwen3": _WORDS + r"\p{N}" + _OTHERS, "llama3": _WORDS + r"\p{N}{1,3}" + _OTHERS}
_SPECIAL = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
               "<|eot_id|>", "<|eom_id|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
_HEADERS = """\
{%- for message in messages %}
    {%- if loop.first %}{{- bos_token }}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_SYSTEM = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' }}
{%- endif %}
"""
_TEMPLATES = {"qwen3": _CHATML, "llama3": _HEADERS, "smollm2": _SYSTEM + _CHATML}
_ENDS = {"qwen3": ("<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
         "llama3": ("<|eot_id|>", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
         "smollm2": ("<|im_end|>", ["<|im_end|>"])}
_SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
          "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "hidden_act": "silu"}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 128}
_MODELS = {"qwen3": {"model_type": "qwen3", "rope_theta": 1e6},
           "llama3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": _LLAMA3},
           "smollm2": {"model_type": "llama", "rope_theta": 1e5}}


def tokenizer(family: str) -> tokenizers.Tokenizer:
  """A byte-level BPE of some hundred tokens, in the family's form."""
  found = tokenizers.Tokenizer(models.BPE())
  # As published: Qwen3 normalises, and SmolLM2 keeps each digit a token.
  if family == "qwen3":
    found.normalizer = normalizers.NFC()
  splits = [pre_tokenizers.Digits(individual_digits=True)]
  if family in _SPLITS:
    splits = [pre_tokenizers.Split(tokenizers.Regex(_SPLITS[family]), "isolated")]
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family == "smollm2")
  found.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
  found.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=480, show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  found.train_from_iterator((row["problem"] for row in problems.splits()["labelled"]), trainer)
  # Behind the ordinary tokens, as in the published files.
  found.add_special_tokens(_SPECIAL[family])
  if family == "qwen3":
    found.add_tokens(["<think>", "</think>"])
  if family == "llama3":
    start = "<|begin_of_text|>"
    found.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1",
        special_tokens=[(start, found.token_to_id(start))])
  return found


def write(folder: pathlib.Path, family: str, width: int, layers: int, tied: bool) -> None:
  """Writes a random model of the family, with its tokenizer, template and end ids."""
  trained = tokenizer(family)
  # More rows than tokens, as in the published models.
  size = -(-trained.get_vocab_size() // 64) * 64 + 64
  model = decoder_models.get(_SHAPE | _MODELS[family] | {
      "vocab_size": size, "hidden_size": width, "intermediate_size": 2 * width,
      "num_hidden_layers": layers, "tie_word_embeddings": tied})
  rng = np.random.default_rng(width)
  params = {}
  for path, leaf in layout.flat(decoder_models.shapes(model.config)).items():
    centre = 1.0 if path.endswith("norm") else 0.0
    params[path] = rng.normal(centre, 0.2, leaf.shape).astype(np.float32)
  hf.save(folder, model, layout.nest(params))
  trained.save(str(folder / "tokenizer.json"))
  end, ends = _ENDS[family]
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end,
              "clean_up_tokenization_spaces": False, "model_max_length": 512}
  if family == "llama3":
    settings["bos_token"] = "<|begin_of_text|>"
  else:
    settings["pad_token"] = "<|endoftext|>"
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  (folder / "chat_template.jinja").write_text(_TEMPLATES[family])
  (folder / "generation_config.json").write_text(json.dumps(
      {"eos_token_id": [trained.token_to_id(token) for token in ends]}))
