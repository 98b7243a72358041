r"""The letter of a choice with its text behind it: \textbf{(B) }12, B. 12, Option B."""

from s2d_jax.rewards import lexer

_LETTERS = frozenset("ABCDEFGH")
_NAMES = frozenset({"Option", "option", "Choice", "choice", "Answer", "answer"})
_LAYOUT = frozenset({"\\text", "{", "}", " "})
# Where the text says more of the choice, or names another one, nothing is certain.
_SAYS_MORE = frozenset({"and", "or", "nor", "not", "is", "wrong", "incorrect", "false", "except"})
_BEGINNINGS = frozenset({"\\frac", "\\sqrt", "\\pi", "\\$"})


def letter(text: str) -> str:
  """The letter of the one choice that an answer names, or ""."""
  try:
    tokens = [token for token in lexer.tokens(text) if token not in _LAYOUT]
  except lexer.Malformed:
    return ""
  named = tokens[:1] and tokens[0] in _NAMES
  tokens = tokens[1:] if named else tokens
  bracket = tokens[:1] == ["("]
  found, *behind = tokens[bracket:] or [""]
  closed = behind[:1] == [")"] or not bracket and behind[:1] == ["."]
  behind = behind[1:] if closed else behind
  if found not in _LETTERS or bracket and not closed or not (behind or named):
    return ""
  if behind and not (closed and (behind[0][0].isalnum() or behind[0] in _BEGINNINGS)):
    return ""
  return "" if any(token in _SAYS_MORE or token in _LETTERS for token in behind) else found
