"""Checks a Hugging Face folder before anything is sampled from it."""

import pathlib
from typing import Any

from s2d_jax import chat
from s2d_jax.errors import InputError
from s2d_jax.models import Config, hf


def read(folder: str | pathlib.Path, template: dict[str, Any],
         run: dict[str, Any]) -> tuple[Config, chat.Chat]:
  """The model's config and the tokenizer of a folder; of the weights only the headers are read.

  Args:
    template: arguments of the chat template.
    run: settings of `models.RUN`, such as the dtype.

  Raises:
    InputError: `hf.load` or `chat.Chat` would refuse the folder, or a token has no embedding.
  """
  # Headers first: a missing or damaged file is found in seconds, before weights are loaded.
  hf.check(folder)
  return read_description(folder, template, run)


def read_description(folder: str | pathlib.Path, template: dict[str, Any],
                     run: dict[str, Any]) -> tuple[Config, chat.Chat]:
  """As `read`, of a folder that need not have weights: from config.json and tokenizer alone.

  Raises:
    InputError: `chat.Chat` would refuse the folder, or a token has no embedding.
  """
  config = hf.read_config(folder, **run)
  tokenizer = chat.Chat(folder, **template)
  # On a device an index beyond an array's end raises no error: it reads NaN.
  if tokenizer.size > config.vocab_size:
    raise InputError(f"the tokenizer of {folder} has the token id {tokenizer.size - 1} and its "
                     f"model embeds {config.vocab_size} tokens: take the tokenizer that came with "
                     "the weights.")
  return config, tokenizer
