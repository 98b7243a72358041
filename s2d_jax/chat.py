"""Tokenizer and chat template of a Hugging Face folder; the only run-time import of transformers.

No other file turns text into ids, so training, sampling and scoring read the same ids.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Without torch, transformers announces that it has tokenizers alone. That is all this file uses.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import transformers

from s2d_jax.errors import InputError


class Chat:
  """The tokenizer of a local folder, its chat template, and the ids that end a response.

  Nothing is downloaded and no code of the folder is run.

  Args:
    folder: its path.
    **template: arguments of the chat template, such as `enable_thinking=False` for Qwen3.

  Raises:
    InputError: the folder has no tokenizer, chat template or end token, or needs code of its own.
  """

  def __init__(self, folder: str | Path, **template: Any) -> None:
    self.folder = Path(folder)
    self._template = template
    self._tokenizer = _load(self.folder)
    self.eos_ids = _eos_ids(self.folder, self._tokenizer)
    self.vocabulary = self._tokenizer.get_vocab()  # {token: id}, added tokens included
    self.chat_template = self._tokenizer.get_chat_template()

  def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
    """Ids of [{"role", "content"}, ...] and of the header that opens the assistant's response."""
    # A dict is asked for, because the default form depends on the version of transformers.
    encoded = self._tokenizer.apply_chat_template(
      messages, add_generation_prompt=True, tokenize=True, return_dict=True, **self._template
    )
    return [int(i) for i in encoded["input_ids"]]

  def encode_response(self, text: str) -> list[int]:
    """Ids of a response of the assistant, including the end token."""
    # The header of `render` is before it, so a start token here would be a second one.
    ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
    return [int(i) for i in ids] + [self.eos_ids[0]]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids without special tokens; `decode(encode_response(x)) == x`."""
    # The library's clean-up would drop spaces before punctuation, and rewards read the text.
    return self._tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

  def check_stops(self, strings: Iterable[str]) -> None:
    """Refuses stop strings that no response can end with.

    Raises:
      InputError: one contains a special token, which the text of a response does not.
    """
    special = sorted(t.content for t in self._tokenizer.added_tokens_decoder.values() if t.special)
    for string in strings:
      for token in special:
        if token in string:
          raise InputError(
            f"the stop string {string!r} holds {token!r}, a special token of {self.folder}, and a "
            "response is decoded without those: choose another."
          )

  def fingerprint(self) -> str:
    """SHA-256 of everything that determines the ids of a text, for manifests."""
    # Sorted, because the order of a vocabulary is not defined.
    facts = (sorted(self.vocabulary.items()), self.eos_ids, self.chat_template, self._template)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def same_tokenizer(teacher: Chat, student: Chat) -> None:
  """Checks that two `Chat`s turn every text into equal ids.

  Raises:
    InputError: they do not; the message names the first difference.
  """
  a = teacher.vocabulary
  b = student.vocabulary
  folders = f"{teacher.folder} and {student.folder}"
  remedy = "take a teacher and a student that share one tokenizer"
  if a != b:
    token = min(t for t in a.keys() | b.keys() if a.get(t) != b.get(t))
    raise InputError(
      f"the vocabularies of {folders} differ (the token {token!r} is {a.get(token, 'absent')} and "
      f"{b.get(token, 'absent')}): {remedy}."
    )
  if teacher.eos_ids != student.eos_ids:
    raise InputError(
      f"the end tokens of {folders} differ ({teacher.eos_ids} and {student.eos_ids}): {remedy}."
    )
  if teacher.chat_template != student.chat_template:
    raise InputError(f"the chat templates of {folders} differ: {remedy}, or copy one over.")


def _load(folder: Path) -> transformers.PreTrainedTokenizerBase:
  path = folder / "tokenizer_config.json"
  if not path.is_file():
    raise InputError(f"{folder} has no tokenizer_config.json: name a folder with a tokenizer.")
  # Read here first, so that the error names the file; the library's would not name the remedy.
  for file in (path, folder / "tokenizer.json", folder / "generation_config.json"):
    try:
      config = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
      raise InputError(f"{file} is not JSON ({error}): download it again.") from error
    if "auto_map" in config:
      raise InputError(
        f"{file} asks for code of its own (auto_map), which is never run: remove it."
      )
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    folder, local_files_only=True, trust_remote_code=False
  )
  if tokenizer.chat_template is None:
    raise InputError(f"{folder} has no chat template: add a chat_template.jinja to it.")
  return tokenizer


def _eos_ids(folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[int, ...]:
  """Ids that end a response, the tokenizer's own first, then those of generation_config.json."""
  ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
  # Some models end a response with a token that only this file names.
  path = folder / "generation_config.json"
  if path.is_file():
    named = json.loads(path.read_text()).get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    ids += [i for i in named if i is not None and i not in ids]
  if not ids:
    raise InputError(f"{folder} names no end token: add eos_token to its tokenizer_config.json.")
  return tuple(ids)
