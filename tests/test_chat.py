"""Ids of the world's tokenizer by hand, Qwen3's template switch, and refusals in one sentence."""

import json

import pytest

from s2d_jax import chat
from s2d_jax.assets import tokenizer

USER = [{"role": "user", "content": "12+34"}]
THINKING = """\
{%- if enable_thinking is defined and enable_thinking is false %}{{ '#' }}{% endif -%}"""


def change(folder, name, **values):
  path = folder / name
  tree = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(tree | values))
  return folder


@pytest.fixture
def folder(tmp_path):
  return written(tmp_path / "student")


def written(folder):
  tokenizer.write(folder, max_length=64)
  return change(folder, "config.json", model_type="qwen3", vocab_size=24)


def test_render_by_hand(folder):
  # <|user|> is 4, <|assistant|> 5, the digits 6..15, "+" 16 (tokenizer.VOCABULARY).
  loaded = chat.Chat(folder)
  assert loaded.render(USER) == [4, 7, 8, 16, 9, 10, 5]
  answer = {"role": "assistant", "content": "46"}
  messages = [{"role": "system", "content": "0"}, *USER, answer, *USER]
  assert loaded.render(messages) == [3, 6, 4, 7, 8, 16, 9, 10, 5, 10, 12, 1, 4, 7, 8, 16, 9, 10, 5]


def test_responses_round_trip(folder):
  loaded = chat.Chat(folder)
  assert loaded.encode_response("12=") == [7, 8, 19, 1]
  assert loaded.eos_ids == (1,)
  for text in ("", "12+34=46+57=03", " 1 +\n\n2;# -*  ", "".join(tokenizer.VOCABULARY[6:])):
    assert loaded.decode(loaded.encode_response(text)) == text
    assert loaded.decode(loaded.encode_response(text) + [0] * 3) == text


def test_every_id_has_a_token():
  assert len(tokenizer.VOCABULARY) == len(set(tokenizer.VOCABULARY)) == 24  # a multiple of 8


def test_template_arguments_reach_the_template(folder):
  with open(folder / "chat_template.jinja", "a") as template:
    template.write(THINKING)
  plain = [4, 7, 8, 16, 9, 10, 5]
  assert chat.Chat(folder).render(USER) == plain
  assert chat.Chat(folder, enable_thinking=True).render(USER) == plain
  assert chat.Chat(folder, enable_thinking=False).render(USER) == plain + [20 + 1]


def test_eos_ids_of_the_generation_config_count_too(folder):
  change(folder, "generation_config.json", eos_token_id=[23, 1])
  loaded = chat.Chat(folder)
  assert loaded.eos_ids == (1, 23) and loaded.encode_response("1") == [7, 1]


def test_same_tokenizer(folder, tmp_path):
  chat.same_tokenizer(chat.Chat(folder), chat.Chat(written(tmp_path / "teacher")))
  assert chat.Chat(folder).fingerprint() == chat.Chat(tmp_path / "teacher").fingerprint()


def difference(folder, other):
  with pytest.raises(ValueError) as error:
    chat.same_tokenizer(chat.Chat(other), chat.Chat(folder))
  assert chat.Chat(other).fingerprint() != chat.Chat(folder).fingerprint()
  return str(error.value)


def test_another_vocabulary_is_named(folder, tmp_path):
  other = written(tmp_path / "teacher")
  path = other / "tokenizer.json"
  path.write_text(path.read_text().replace('"#": 21', '"?": 21'))
  assert "(the token '#' is absent and 21)" in difference(folder, other)


def test_different_end_tokens_are_named(folder, tmp_path):
  other = change(written(tmp_path / "teacher"), "generation_config.json", eos_token_id=23)
  assert "end tokens" in difference(folder, other)


def test_another_template_is_named(folder, tmp_path):
  other = written(tmp_path / "teacher")
  with open(other / "chat_template.jinja", "a") as template:
    template.write(THINKING)
  assert "chat templates" in difference(folder, other)


def test_unusable_tokenizer_folders_are_refused(folder, tmp_path):
  with pytest.raises(ValueError, match="has no tokenizer_config.json"):
    chat.Chat(tmp_path)
  (folder / "chat_template.jinja").unlink()
  with pytest.raises(ValueError, match="has no chat template"):
    chat.Chat(folder)
  change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
  with pytest.raises(ValueError, match="auto_map"):
    chat.Chat(folder)


def test_a_tokenizer_without_an_end_is_refused(folder):
  path = folder / "tokenizer_config.json"
  tree = json.loads(path.read_text())
  del tree["eos_token"]
  path.write_text(json.dumps(tree))
  with pytest.raises(ValueError, match="names no end token"):
    chat.Chat(folder)
