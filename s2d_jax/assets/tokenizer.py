"""The embedded worlds' tokenizer: one token per character, and one for each role of a chat."""

import json
import os
from pathlib import Path

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
SPECIAL = (PAD, END, UNKNOWN, "<|system|>", "<|user|>", "<|assistant|>")
# 24 tokens, the size of the models' embeddings: every id has a token.
VOCABULARY = SPECIAL + tuple("0123456789+-*=;# \n")
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>' + message.content -}}
{%- if message.role == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def write(folder: str | os.PathLike, max_length: int) -> None:
  """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for `AutoTokenizer`.

  Args:
    max_length: tokens of the longest sequence, as transformers' warnings have it.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  # Each character is a word of its own, and so a token.
  every_character = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated"}
  tokenizer = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      {"id": i, "content": token, **flags, "special": True} for i, token in enumerate(SPECIAL)
    ],
    "normalizer": None,
    "pre_tokenizer": {**every_character, "invert": False},
    "post_processor": None,
    # Joins the characters without spaces between them.
    "decoder": {"type": "Fuse"},
    "model": {
      "type": "WordLevel",
      "vocab": {token: i for i, token in enumerate(VOCABULARY)},
      "unk_token": UNKNOWN,
    },
  }
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "eos_token": END,
    "unk_token": UNKNOWN,
    "model_max_length": max_length,
    "clean_up_tokenization_spaces": False,
  }
  _write_json(folder / "tokenizer.json", tokenizer)
  _write_json(folder / "tokenizer_config.json", config)
  (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)


def _write_json(path: Path, tree: dict) -> None:
  path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
