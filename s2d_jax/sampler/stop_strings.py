"""Where a stop string ends a response: found on the host, because only text shows it."""

import re

import numpy as np

from s2d_jax.sampler.sampling import Decode


def _occurrences(string: str, text: str) -> int:
  """How often a string occurs; an occurrence may begin inside the one before, as in "aaa"."""
  return len(re.findall(f"(?={re.escape(string)})", text))


class StopDetector:
  """Finds the token that completes a stop string in a response."""

  def __init__(self, strings: tuple[str, ...], min_tokens: int, decode: Decode | None) -> None:
    self.strings = strings
    self.min_tokens = min_tokens
    self.decode = decode

  def cut(self, ids: np.ndarray, start: int) -> int | None:
    """Length of a response up to the token that completes a stop string, or None without one.

    A string that is complete within the first `min_tokens` tokens does not count.

    Args:
      ids: the response's token ids.
      start: tokens before it were searched by an earlier call.
    """
    if not self.strings or len(ids) <= self.min_tokens or not self._may_contain(ids, start):
      return None
    early = self.decode(ids[: self.min_tokens])
    before = {string: _occurrences(string, early) for string in self.strings}

    def complete(length: int) -> bool:
      text = self.decode(ids[:length])
      return any(_occurrences(string, text) > count for string, count in before.items())

    if not complete(len(ids)):
      return None
    # Tokens may split a string anywhere, so only decoded prefixes show which token completes it.
    first = max(start, self.min_tokens) + 1
    return next(length for length in range(first, len(ids) + 1) if complete(length))

  def _may_contain(self, ids: np.ndarray, start: int) -> bool:
    """False only if no stop string ends among the tokens from `start` on.

    Decodes only the last tokens, so that a long response is not decoded again for each dispatch.
    """
    longest = max(map(len, self.strings))
    # A token may have no text of its own, or a part of a character that spoils the text after it.
    # So the tokens before `start` are taken until their text is longer than any string and begins
    # with a whole character.
    back = 0
    before = ""
    while back < start and (len(before) < longest + 8 or before.startswith("\ufffd")):
      back = 2 * back + 1
      before = self.decode(ids[max(0, start - back): start])
    tail = self.decode(ids[max(0, start - back):])
    return any(string in tail for string in self.strings)
