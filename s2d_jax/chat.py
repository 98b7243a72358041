"""Tokenizer and chat template of a Hugging Face folder; the only run-time import of transformers.

No other file turns text into ids, so training, sampling and scoring read the same ids.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Without torch, transformers announces that it has tokenizers alone. That is all this file uses.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jinja2
import transformers

from s2d_jax import end_ids, json_objects
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Json
from s2d_jax.templates import CLOCK, Template

# Read back where a folder is opened: spaces, digits, TeX, punctuation and new lines.
PROBES = ("Let x = 3 and y = 12,345.", "  two  spaces ,  then 1 000 ; don't stop . ",
          "\\frac{1}{2} + \\sqrt{x^2 - 1} \\le \\boxed{-0.5}\n\n$$a_1 = b$$\n",
          "12 + 34 = 46\n\n\t7 * 8\n")
# Its words are in no template, so that a template that leaves the message out is noticed.
_QUESTION = {"role": "user", "content": "Let x = 3 + 4."}
_SYSTEM = {"role": "system", "content": "Be brief, 5."}


class Chat:
  """The tokenizer of a local folder, its chat template, and the ids that end a response.

  Nothing is downloaded and no code of the folder is run. A prompt is a function of the folder, the
  arguments and the messages: a template that asks for the date is refused unless an argument pins
  it.

  Args:
    folder: its path.
    **template: arguments of the chat template, such as `enable_thinking=False` for Qwen3.

  Raises:
    InputError: the folder has no tokenizer, chat template or end token, or needs code of its own;
      text does not survive the tokenizer; the template does not read an argument, leaves messages
      out, or asks for the date.
  """

  def __init__(self, folder: str | Path, **template: Any) -> None:
    self.folder = Path(folder)
    self._template = _json_values(template)
    self._tokenizer, objects = _load(self.folder)
    self.vocabulary = self._tokenizer.get_vocab()  # {token: id}, added tokens included
    self.size = max(self.vocabulary.values()) + 1  # ids that have tokens; a model may embed more
    self.eos_ids = end_ids.read(self.folder, objects, self._tokenizer.eos_token, self.vocabulary)
    self.chat_template = _chat_template(self.folder, self._tokenizer, template.get("tools"))
    self._special = {i: token.content for i, token in self._tokenizer.added_tokens_decoder.items()
                     if token.special}
    self._syntax = Template(self.chat_template, f"the chat template of {self.folder}")
    self._check_arguments()
    self._probe_template()
    self._probe_round_trip()

  def render(self, messages: Sequence[Mapping[str, str]],
             name: str = "the conversation") -> list[int]:
    """Ids of [{"role", "content"}, ...] and of the header that opens the assistant's response.

    Args:
      name: of the messages, for an error message: "problem 7 of labelled".

    Raises:
      InputError: a message is not of texts, holds a special token, or is left out by the template.
    """
    texts = (isinstance(message, Mapping) and isinstance(message.get(key), str)
             for message in messages for key in ("role", "content"))
    if not messages or not all(texts):
      raise InputError(f"{name} is not a list of messages: give each a role and a content, texts.")
    for text in _texts(messages):
      self._check_text(text, name)
    rendered = self._render(messages, name)
    for message in messages:
      # An assistant's earlier thoughts are left out on purpose, by Qwen3's template and others.
      if message["role"] in ("system", "user") and message["content"].strip() not in rendered:
        raise InputError(f"{self._syntax.source} leaves out or changes the {message['role']} "
                         f"message of {name}: take the template that came with the weights.")
    return self._encode(rendered)

  def encode_response(self, text: str, name: str = "the response") -> list[int]:
    """Ids of a response of the assistant, including the end token.

    Args:
      name: of the text, for an error message: "the solution of problem 7".

    Raises:
      InputError: the text holds a special token, such as the end token.
    """
    # The header of `render` is before it, so a start token here would be a second one.
    return [*self._check_text(text, name), self.eos_ids[0]]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids without special tokens; `decode(encode_response(x)) == x`."""
    # The library's clean-up would drop spaces before punctuation, and rewards read the text.
    return self._tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

  def _encode(self, text: str) -> list[int]:
    """Ids of a text, without a start or end token."""
    return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

  def _check_text(self, text: str, name: str) -> list[int]:
    """The ids of a text of data, which may hold no special token: those are the template's own."""
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise InputError(f"{name} holds half of a surrogate pair ({text[error.start]!a}), half "
                       "of a character: remove it.") from error
    ids = self._encode(text)
    for i in ids:
      token = self._special.get(i)
      # An unknown character becomes a special token as well, and is not one that the text holds.
      if token is not None and (i != self._tokenizer.unk_token_id or token in text):
        raise InputError(f"{name} holds {token!r}, a special token of {self.folder}, which a "
                         "model takes for the end or the start of a message: remove it.")
    return ids

  def _render(self, messages: Sequence[Mapping[str, str]], name: str) -> str:
    """The text of a conversation, with the header of a response, by the template.

    Raises:
      InputError: the template refuses the messages, fails, or asks for the date.
    """
    # Text in place of the clock: the template still finds it defined, and fails where it asks.
    try:
      return self._tokenizer.apply_chat_template(
          messages, add_generation_prompt=True, tokenize=False, **self._template, **{CLOCK: CLOCK})
    # A template is a program of the folder's, so it may raise anything.
    except Exception as error:
      if self._syntax.asks_for_date and isinstance(error, TypeError):
        pins = self._syntax.pins_of_date()
        remedy = (f'give the argument {pins[0]} of the template, such as "26 Jul 2024"' if pins else
                  f"write a date into it in place of {CLOCK}")
        raise InputError(f"{self._syntax.source} asks for the date, so that prompts would change "
                         f"from day to day: {remedy}.") from error
      raise InputError(f"{name} is not a chat that {self._syntax.source} takes ({error}): correct "
                       "its messages.") from error

  def _check_arguments(self) -> None:
    """Refuses arguments that belong to the renderer, or that the template does not read."""
    signature = inspect.signature(self._tokenizer.apply_chat_template)
    # These two reach the template by way of parameters of the same name.
    parameters = set(signature.parameters) - {"tools", "documents", "kwargs"}
    for name in self._template:
      if name in parameters:
        raise InputError(f"{name!r} is not an argument of a chat template: remove it.")
    self._syntax.check(self._template)
    for text in _texts(self._template):
      self._check_text(text, "an argument of the chat template")

  def _probe_template(self) -> None:
    """Refuses a template that prints no message."""
    try:
      text = self._render([_QUESTION], "a single question")
    except InputError as error:
      # Some templates refuse a chat without a system message, by an error of jinja2's.
      if not isinstance(error.__cause__, jinja2.TemplateError):
        raise
      text = self._render([_SYSTEM, _QUESTION], "a question")
    if _QUESTION["content"] not in text:
      raise InputError(f"{self._syntax.source} leaves the user's message out, so every prompt "
                       "would be equal: take the template that came with the weights.")

  def _probe_round_trip(self) -> None:
    """Refuses a tokenizer that does not read text back as it was."""
    alphabet = self._alphabet()
    for probe in PROBES:
      text = "".join(c for c in probe if c in alphabet)
      found = self.decode(self._encode(text))
      if found != text:
        raise InputError(f"the tokenizer of {self.folder} reads {text!r} back as {found!r}: "
                         f"upgrade transformers, which is {transformers.__version__} here, or take "
                         "the tokenizer that came with the weights.")

  def _alphabet(self) -> set[str]:
    """The characters that are tokens of their own; a small world has few."""
    found = {token for token in self.vocabulary if len(token) == 1}
    # Byte-level tokens write a space as Ġ, and those of SentencePiece as ▁ or as <0x20>.
    if "Ġ" in found or "<0x0A>" in self.vocabulary:
      found |= set(" \n\t")
    return found | ({" "} if "▁" in found else set())

  def check_stops(self, strings: Iterable[str]) -> None:
    """Refuses stop strings that no response can end with.

    Raises:
      InputError: one contains a special token, which the text of a response does not.
    """
    for string in strings:
      for token in sorted(self._special.values()):
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


def _texts(value: Any) -> Iterator[str]:
  """Yields every text within a value of JSON, keys left out."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    yield from _texts(list(value.values()))
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _texts(item)


def _json_values(template: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments of a template as JSON would hold them, in an order of their own."""
  # Sorted, so that the fingerprint does not depend on the order of writing. A template would see a
  # nested ConfigDict as a placeholder, so it becomes a dict.
  try:
    return json.loads(json.dumps(template, sort_keys=True, default=dict, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise InputError(f"the arguments of the chat template are not JSON ({error}): give texts, "
                     "numbers, booleans, lists and objects.") from error


def _load(folder: Path) -> tuple[transformers.PreTrainedTokenizerBase, dict[str, Json]]:
  """(the tokenizer of a folder, {name: object} of its JSON files), none of them with code."""
  path = folder / "tokenizer_config.json"
  if not path.is_file():
    raise InputError(f"{folder} has no tokenizer_config.json: name a folder with a tokenizer.")
  # Read here first, so that the error names the file; the library's would not name the remedy.
  objects = {}
  for name in (path.name, "tokenizer.json", "generation_config.json", "config.json"):
    if (folder / name).is_file():
      objects[name] = json_objects.read(folder / name)
      if "auto_map" in objects[name]:
        raise InputError(f"{folder / name} asks for code of its own (auto_map), which is never "
                         "run: remove it.")
  end_ids.named(folder, objects)
  try:
    return transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True, trust_remote_code=False
    ), objects
  # The tokenizers library raises Exception itself where a file is not a tokenizer's.
  except Exception as error:
    if not (folder / "tokenizer.json").is_file():
      raise InputError(f"{folder} has no tokenizer.json: download it, or write it with the "
                       "save_pretrained of transformers' tokenizer.") from error
    reason = str(error).strip().partition("\n")[0]
    raise InputError(f"{folder / 'tokenizer.json'} is not a tokenizer that transformers "
                     f"{transformers.__version__} reads ({reason}): download it again, or upgrade "
                     "transformers.") from error


def _chat_template(folder: Path, tokenizer: transformers.PreTrainedTokenizerBase,
                   tools: Any) -> str:
  """The template of a tokenizer; of several, the default or the one for tools."""
  if tokenizer.chat_template is None:
    raise InputError(f"{folder} has no chat template: add a chat_template.jinja to it.")
  try:
    return tokenizer.get_chat_template(tools=tools)
  except ValueError as error:
    raise InputError(f"{folder} has several chat templates and none is the default: name one "
                     "'default'.") from error
