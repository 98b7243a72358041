"""The ids that end a response: which files name them, and what is refused."""

import json
import shutil

import pytest

from configs import arithmetic
from s2d_jax.chat import Chat
from s2d_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
  """A copy of the student, whose ids are 0 to 23 and whose end token has the id 1."""
  return shutil.copytree(arithmetic.get_config().student, tmp_path / "model")


def write(folder, name, **changes):
  """Changes keys of a JSON file; None removes one."""
  path = folder / name
  tree = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps({k: v for k, v in (tree | changes).items() if v is not None}))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [-1, 24, 999_999, "258", "1", 1.0, True, [1, -1], [1, "2"], [[1]],
                                   [None], {"id": 1}, 10**30, [1, 1.5]])
def test_an_id_that_no_token_has_is_refused(name, value, folder):
  (folder / "generation_config.json").unlink()
  write(folder, name, eos_token_id=value)
  with pytest.raises(InputError, match=f"/{name} has .* under 'eos_token_id', which is not"):
    Chat(folder)


@pytest.mark.parametrize("value, ids", [
    (5, (1, 5)), ([5, 1, 7], (1, 5, 7)), (1, (1,)), ([5, 5], (1, 5)), ([], (1,)), (0, (1, 0))])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_ids_of_a_file_count(name, value, ids, folder):
  (folder / "generation_config.json").unlink()
  write(folder, name, eos_token_id=value)
  assert Chat(folder).eos_ids == ids


@pytest.mark.parametrize("value", [None, []])
def test_the_models_own_config_counts_where_the_other_names_none(value, folder):
  write(folder, "generation_config.json", eos_token_id=value)
  write(folder, "config.json", eos_token_id=[1, 9])
  assert Chat(folder).eos_ids == (1, 9)


def test_the_generation_config_comes_first(folder):
  write(folder, "generation_config.json", eos_token_id=[1, 5])
  write(folder, "config.json", eos_token_id=[1, 9])
  assert Chat(folder).eos_ids == (1, 5)


@pytest.mark.parametrize("token", ["<|nope|>", "end", "</s>", "<|END|>"])
def test_an_end_token_that_the_tokenizer_lacks_is_refused(token, folder):
  write(folder, "tokenizer_config.json", eos_token=token)
  with pytest.raises(InputError, match="/tokenizer_config.json has '.*' under 'eos_token', "):
    Chat(folder)


def test_a_token_that_the_configuration_declares_with_its_id_is_taken(folder):
  entry = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False,
           "normalized": False, "single_word": False}
  write(folder, "tokenizer_config.json", eos_token="<|new|>", added_tokens_decoder={"24": entry})
  assert Chat(folder).eos_ids[0] == 24


@pytest.mark.parametrize("text", ["null", "[1]", "3", "{", ""])
def test_a_generation_config_that_is_no_object_is_refused(text, folder):
  (folder / "generation_config.json").write_text(text)
  with pytest.raises(InputError, match="generation_config.json is (not|empty)"):
    Chat(folder)


def test_a_folder_without_any_end_token_is_refused(folder):
  write(folder, "tokenizer_config.json", eos_token=None)
  (folder / "generation_config.json").unlink()
  with pytest.raises(InputError, match="names no end token: add eos_token to its tokenizer_config"):
    Chat(folder)
