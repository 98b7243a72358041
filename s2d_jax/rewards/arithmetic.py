"""Exact check of chained addition: the text after the last "=" must be the answer."""

from collections.abc import Mapping


def reward(problem: Mapping[str, str], text: str) -> float:
  """1.0 where the text's last number is the answer to the digit ("03", not "3"), else 0.0.

  "12+34=46+57=03" answers "03", and so does a bare "03". The steps before it are not checked.
  """
  # Numbers are compared as texts: every number of this world has two digits.
  return float(answer(text) == problem["answer"])


def answer(text: str) -> str:
  """The text after the last "=", or the whole text where there is none."""
  return text.rpartition("=")[2]
