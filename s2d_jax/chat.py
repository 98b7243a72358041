"""Tokenizer and chat template of a Hugging Face folder; the only run-time import of transformers.

No other file turns text into ids, so training, sampling and scoring read the same ids.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Without torch, transformers announces that it has tokenizers alone. That is all this file uses.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jinja2
import tokenizers
import transformers

from s2d_jax import end_ids, tokenizer_files
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Json, shown
from s2d_jax.templates import CLOCK, Template, is_of_template

# Read back where a folder is opened: spaces, digits, TeX, punctuation and new lines.
PROBES = ("Let x = 3 and y = 12,345.", "  two  spaces ,  then 1 000 ; don't stop . ",
          "\\frac{1}{2} + \\sqrt{x^2 - 1} \\le \\boxed{-0.5}\n\n$$a_1 = b$$\n",
          "12 + 34 = 46\n\n\t7 * 8\n")
# How Python prints a function or an object that has no text of its own.
_ADDRESS = re.compile(r"<[^\n]*? at 0x[0-9a-fA-F]+>")
# Its words are in no template, so that a template that leaves the message out is noticed.
_QUESTION = {"role": "user", "content": "Let x = 3 + 4."}
_SYSTEM = {"role": "system", "content": "Be brief, 5."}
# The class of every tokenizer.json, by its name and by the newer one of transformers.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_ROLES = ("system", "user", "assistant")  # those that published templates print


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
    tokenizer_files.check_tokens(self.folder, objects, self.vocabulary)
    self.eos_ids = end_ids.read(self.folder, objects, self._tokenizer.eos_token, self.vocabulary)
    self.chat_template, path = _chat_template(self.folder, self._tokenizer, template.get("tools"))
    self._special = {i: token.content for i, token in self._tokenizer.added_tokens_decoder.items()
                     if token.special}
    self._syntax = Template(self.chat_template, f"the chat template in {path}")
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
    if not isinstance(messages, Sequence) or not messages or not all(
        isinstance(message, Mapping) and isinstance(message.get(key), str)
        for message in messages for key in ("role", "content")):
      raise InputError(f"{name} is not a list of messages: give each a role and a content, texts.")
    for text in _texts(messages):
      self._check_text(text, name)
    rendered = self._render(messages, name)
    self._check_rendered(messages, rendered, name)
    return self._encode(rendered)

  def _check_rendered(self, messages: Sequence[Mapping[str, str]], rendered: str,
                      name: str) -> None:
    """Refuses messages of which the template printed one not at all, or in other words."""
    contents = [_printed(message) for message in messages]
    # Counted, because one message may hold the words of another.
    missing = [message["role"] for message, content in zip(messages, contents, strict=True)
               if content and rendered.count(content) < sum(x.count(content) for x in contents)]
    if missing:
      # Of two messages with equal words, the one whose role is unusual was left out.
      role = min(missing, key=lambda role: role in _ROLES)
      remedy = ("take the template that came with the weights" if role in _ROLES else
                f"choose a role from {', '.join(_ROLES)}")
      raise InputError(f"{self._syntax.source} leaves out or changes the message of role "
                       f"{shown(role)} in {name}: {remedy}.")

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
    except Exception as error:
      if not is_of_template(error):
        raise
      # So Python says where the text in place of the clock was called.
      if self._syntax.asks_for_date and "object is not callable" in str(error):
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
    """Refuses a template that prints no message, or prints an object's address in memory."""
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
    if printed := _ADDRESS.search(text):
      raise InputError(f"{self._syntax.source} prints {printed[0]}, whose address differs from "
                       "run to run, so no prompt would repeat: take that out of it.")

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

  def leaves_open(self, argument: str) -> bool:
    """Whether the template reads an argument that was not given, and so has its own default."""
    return argument in self._syntax.arguments and argument not in self._template

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


def _printed(message: Mapping[str, str]) -> str:
  """The words of a message that every template prints, without the space around them."""
  content = message["content"]
  # An assistant's earlier thoughts are left out on purpose, by Qwen3's template and others.
  if message["role"] == "assistant":
    content = content.rpartition("</think>")[2]
  return content.strip()


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
  # Read here first, so that an error names its file; the library's does not.
  objects = tokenizer_files.read(folder)
  end_ids.named(folder, objects)
  _check_text_files(folder)
  try:
    return transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True, trust_remote_code=False
    ), objects
  except Exception as error:
    reason = str(error).strip().partition("\n")[0]
    library = f"transformers {transformers.__version__}"
    path = folder / tokenizer_files.TOKENIZER
    if path.is_file() and not _is_tokenizer(path):
      raise InputError(f"{path} is not a tokenizer that {library} reads ({reason}): download it "
                       "again, or upgrade transformers.") from error
    config = folder / tokenizer_files.CONFIG
    kind = objects[tokenizer_files.CONFIG].get("tokenizer_class")
    if path.is_file() and kind not in (None, *_GENERIC) and _is_read_without_class(folder):
      raise InputError(f"{config} has the tokenizer_class {shown(kind)}, which {library} cannot "
                       f"make of its {path.name} ({reason}): write {_GENERIC[0]} there, or take "
                       "the files that came with the weights.") from error
    # The errors by which transformers refuses a file; any other is not the folder's fault.
    if not isinstance(error, OSError | ValueError | ImportError):
      raise
    if not path.is_file():
      raise InputError(f"{folder} has no {path.name}: download it, or write it with the "
                       "save_pretrained of transformers' tokenizer.") from error
    raise InputError(f"{config} does not describe a tokenizer that {library} reads ({reason}): "
                     "download it again, or upgrade transformers.") from error


def _is_tokenizer(path: Path) -> bool:
  """Whether a tokenizer.json by itself is one that the tokenizers library reads."""
  try:
    tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:
    # The error of that library has no class of its own.
    if type(error) is not Exception:
      raise
    return False
  return True


def _is_read_without_class(folder: Path) -> bool:
  """Whether transformers reads a folder's tokenizer by the class of every tokenizer.json."""
  # Whatever the error is, the class that the folder names is then not the only fault.
  with contextlib.suppress(Exception):
    transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return True
  return False


def _check_text_files(folder: Path) -> None:
  """Refuses a chat template that is not a file of UTF-8."""
  for path in _template_files(folder).values():
    try:
      path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f"{path} cannot be read as UTF-8 ({error}): download it again.") from error


def _template_files(folder: Path) -> dict[str, Path]:
  """{name of a template: its file} where templates have files of their own."""
  found = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
  default = folder / "chat_template.jinja"
  return found | ({"default": default} if os.path.lexists(default) else {})


def _chat_template(folder: Path, tokenizer: transformers.PreTrainedTokenizerBase,
                   tools: Any) -> tuple[str, Path]:
  """(the template of a tokenizer, its file); of several, the default or the one for tools."""
  templates = tokenizer.chat_template
  if templates is None:
    raise InputError(f"{folder} has no chat template: add a chat_template.jinja to it.")
  files = _template_files(folder)
  config = folder / tokenizer_files.CONFIG
  name = "default"
  if isinstance(templates, dict):
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if name not in templates:
      raise InputError(f"{folder} has several chat templates and none is the default: name one "
                       "'default'.")
    templates = templates[name]
  path = files.get(name, config)
  if not isinstance(templates, str):
    raise InputError(f"{path} has {shown(templates)} as a chat template: make it a text.")
  return templates, path
