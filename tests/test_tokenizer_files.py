"""Files of a tokenizer's folder that cannot be what their names say are refused by name."""

import json

import pytest

from s2d_jax import chat
from s2d_jax.assets import tokenizer
from s2d_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
  """A folder with the tokenizer of arithmetic, without older files."""
  tokenizer.write(tmp_path / "model", max_length=64)
  return tmp_path / "model"


def change(path, **values):
  """Sets keys of a JSON file; None removes a key."""
  found = json.loads(path.read_text()) | values
  path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json",
                                  "added_tokens.json", "config.json", "tokenizer.json",
                                  "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind, reason", [("folder", "Is a directory"),
                                          ("link", "No such file or directory")])
def test_a_folder_or_a_link_to_nothing_in_the_place_of_a_file_is_refused(folder, name, kind,
                                                                         reason):
  change(folder / "tokenizer_config.json", added_tokens_decoder=None)
  path = folder / name
  path.unlink(missing_ok=True)
  if kind == "folder":
    path.mkdir()
  else:
    path.symlink_to(folder / "absent")
  with pytest.raises(InputError) as error:
    chat.Chat(folder)
  sentence = str(error.value)
  assert sentence.startswith(f"{path} cannot be read") and reason in sentence
  assert sentence.endswith(": download it again.")


def test_a_link_to_a_file_is_read(folder, tmp_path):
  moved = (folder / "tokenizer.json").rename(tmp_path / "elsewhere")
  (folder / "tokenizer.json").symlink_to(moved)
  assert chat.Chat(folder).decode([]) == ""


# Classes that expect a vocabulary of another form, or files or libraries that are absent.
@pytest.mark.parametrize("kind", ["T5TokenizerFast", "AlbertTokenizer", "BertJapaneseTokenizer"])
def test_a_class_that_cannot_read_the_vocabulary_is_named(folder, kind):
  change(folder / "tokenizer_config.json", tokenizer_class=kind)
  with pytest.raises(InputError) as error:
    chat.Chat(folder)
  sentence = str(error.value)
  assert sentence.startswith(f"{folder}/tokenizer_config.json has the tokenizer_class {kind!r}, "
                             "which transformers ")
  assert sentence.endswith("write PreTrainedTokenizerFast there, or take the files that came with "
                           "the weights.")
  # The remedy is one.
  change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
  assert chat.Chat(folder).size == 24
