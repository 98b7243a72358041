r"""Check of a mathematical answer in the last \boxed{}: a string match, or math_verify.

The string match follows Hendrycks et al. 2021 (https://arxiv.org/abs/2103.03874): both answers
are brought to one spelling and compared. It never evaluates the text. Every pattern here takes
time linear in the text, because a policy may write any text during training.
"""

import atexit
import functools
import re
from collections.abc import Mapping

from s2d_jax.rewards import worker

# The patterns stand in the order in which `_normalised` applies them.
_RESPELLED = (("\\tfrac", "\\frac"), ("\\dfrac", "\\frac"), ("\\cfrac", "\\frac"))
# A dollar between two digits is left: it separates them.
_DOLLAR = re.compile(r"\\?\$(?!\d)|(?<!\d)\\?\$")
# MATH writes 1,\!000: a comma without the space behind it.
_NEGATIVE_SPACE = re.compile(r"(?:,|\{,\}) ?(?:\\! ?)+")
# Spacing and decoration. It becomes a space, so that the digits around it stay apart.
_SPACING = re.compile(
  r"(?<!\\)\\[ ,;:!]|~|\\(?:left|right)(?![a-zA-Z])|\\?%|\^(?:\{\\circ\}|\\circ)"
)
# Digits with separators: 1 000, but also 4 2, and decimals such as .141 592.
_DIGIT_GROUPS = re.compile(r"(?:\.|(?<![\d.^_]))\d++(?:(?: |\{,\})\d++)++")
_THOUSANDS = re.compile(r"(?:\.\d{3}|\d{1,3})(?:(?: |\{,\})\d{3})+")
_MIXED = re.compile(
  r"""
  # An exponent or a factor before the fraction is no whole part, nor is the end of 1,001.
  (?<![\w.^_/)}\]])(?<!\d,)(\d{1,9})
  # 1 1/2
  (?:[ ](\d{1,9})[ ]?/[ ]?(\d{1,9})(?![\w./])
  # 1\frac{1}{2}, 1\frac12
  |[ ]?\\frac(?:\{(\d{1,9})\}|(\d))[ ]?(?:\{(\d{1,9})\}|(\d)))
  """,
  re.VERBOSE,
)
# A text at the end, such as the unit of 5\text{ cm}.
_LAST_TEXT = re.compile(r"\\text\{\s([^{}]*)\}[\s.]*$")
_CONTROL_WORD = re.compile(r"\\[a-zA-Z]+")
_LETTER = re.compile(r"[^\W\d_]")
# More than a unit: digits, but for the exponent of cm^2, relations and signs.
_BEYOND_UNIT = re.compile(r"(?<!\^)(?<!\^-)\d|[<>=+≤≥≠±]|^(?:squared|cubed)\b")
_WORD = re.compile(r"[a-z]+")
# Words behind a number that change its value, say something of it or add an alternative.
_NOT_IN_UNITS = frozenset(
  """
  zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty
  sixty seventy eighty ninety hundred hundreds thousand thousands million millions billion billions
  trillion trillions quadrillion dozen dozens half halves third thirds fourth fourths fifth fifths
  sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths
  thousandth thousandths millionth millionths negative positive minus plus factorial
  or and to through but not nor if when where for except excluding is are was equals with without
  mod modulo remainder base than most least odd even prime none infinity
  am pm bc ad bce ce north south east west
  """.split()
)
_WRAPPED = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}")
_SHORT_ROOT = re.compile(r"\\sqrt(\w)")
_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")
# The name before a value, as in x=5.
_NAME = re.compile(r"^\s*[a-zA-Z]\s*=")
# A whole answer with commas between its thousands, such as 1,000.
_COMMA_GROUPS = re.compile(r"[+-]? ?\d{1,3}(,\d{3})+(\.\d+)?")
# All spaces but those between two numbers.
_LOOSE_SPACE = re.compile(r"(?<![\d.]) | (?![\d.])")
_PLAIN_FRACTION = re.compile(r"(-?)\((-?\w+)\)/\((-?\w+)\)")
# The point of .5, which has no digit before it.
_BARE_POINT = re.compile(r"(?<![\d.])\.(?=\d)")
# Leading zeros are stripped afterwards: "0*" before "\d+" would take quadratic time.
_WHOLE = re.compile(r"([+-]?)(\d+)(\.0*)?")


def reward(problem: Mapping[str, str], text: str) -> float:
  r"""1.0 where the last \boxed{} of the text matches the answer after normalisation, else 0.0.

  An answer of which normalisation leaves nothing matches nothing.
  """
  boxed = last_boxed(text)
  if boxed is None:
    return 0.0
  answer = _normalised(problem["answer"])
  # "100,200" is a number, and also how a list is written without a space.
  readings = (_normalised(boxed), _normalised(boxed.replace(",", ", ")))
  return float(answer != "" and answer in readings)


def answer(text: str) -> str | None:
  r"""The last \boxed{} of a text in one spelling, or None where no box closes or it is empty."""
  boxed = last_boxed(text)
  if boxed is None:
    return None
  return _normalised(boxed) or None


def verified(problem: Mapping[str, str], text: str) -> float:
  r"""1.0 where math_verify finds the last \boxed{} equal to the answer, else 0.0.

  It runs in a process with limits: a text that exceeds them gets 0.0, with a warning.
  """
  return _verifier()(problem, text)


@functools.cache
def _verifier() -> worker.Worker:
  """The process that runs math_verify, started by the first call and ended with this one."""
  verifier = worker.Worker("s2d_jax.rewards.verify:check", seconds=60.0, cpu_seconds=5,
                           memory_bytes=4 << 30)
  atexit.register(verifier.close)
  return verifier


def last_boxed(text: str) -> str | None:
  r"""The text inside the last \boxed{...} or \fbox{...}, or None where no box closes."""
  start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
  if start < 0:
    return None
  start = text.index("{", start) + 1
  depth = 1
  for i in range(start, len(text)):
    depth += {"{": 1, "}": -1}.get(text[i], 0)
    if depth == 0:
      return text[start:i]
  # The braces never close: the response was cut.
  return None


def _normalised(answer: str) -> str:
  r"""One spelling for answers that mean the same: " \dfrac12 " and "1/2", "1,000" and "1000".

  Digits close up only in groups of three: "1 000" is 1000, but "4 2" and "32, 349" are two numbers
  each. A mixed number becomes a fraction: "1 1/2" is "3/2".
  """
  for old, new in _RESPELLED:
    answer = answer.replace(old, new)
  answer = _DOLLAR.sub("", answer)
  answer = _NEGATIVE_SPACE.sub("{,}", answer)
  answer = " ".join(_SPACING.sub(" ", answer).split())
  answer = _DIGIT_GROUPS.sub(_closed, answer)
  answer = _MIXED.sub(_improper, answer)
  # TeX's braces around a comma only remove the space behind it.
  answer = answer.replace("{,}", ",")
  answer = _without_unit(answer)
  answer = _WRAPPED.sub(r"\1", answer)
  answer = _SHORT_ROOT.sub(r"\\sqrt{\1}", answer)
  answer = _FRACTION.sub(_over, answer)
  answer = _NAME.sub("", answer).rstrip(" .").lstrip()
  # Before its spaces go, so that "3, 125" stays a list.
  if _COMMA_GROUPS.fullmatch(answer):
    answer = answer.replace(",", "")
  answer = _LOOSE_SPACE.sub("", answer)
  plain = _PLAIN_FRACTION.fullmatch(answer)
  if plain:
    answer = f"{plain[1]}{plain[2]}/{plain[3]}"
  answer = _BARE_POINT.sub("0.", answer)
  number = _WHOLE.fullmatch(answer)
  # By its text: int() refuses the thousands of digits that a model may write.
  if number:
    digits = number[2].lstrip("0") or "0"
    return "-" + digits if number[1] == "-" and digits != "0" else digits
  return answer


def _without_unit(answer: str) -> str:
  r"""The answer without a unit at its end: 5\text{ cm} is 5, but n\text{ is odd} stays whole."""
  last = _LAST_TEXT.search(answer)
  if last is None:
    return answer
  # "x=5\text{ cm}" has its number behind the "=".
  value = answer[: last.start()].rpartition("=")[2]
  if "\\pi" not in value and not any(c.isdigit() for c in value):
    return answer
  # Letters beyond control words such as \frac make it an expression, of which a text may say more.
  if _LETTER.search(_CONTROL_WORD.sub("", value)) or _BEYOND_UNIT.search(last[1]):
    return answer
  # Without points, "p.m." is one word.
  words = _WORD.findall(last[1].lower().replace(".", ""))
  if not _NOT_IN_UNITS.isdisjoint(words):
    return answer
  return answer[: last.start()]


def _closed(groups: re.Match) -> str:
  """The digits without their separators, where every group but the first has exactly three."""
  if _THOUSANDS.fullmatch(groups[0]):
    return groups[0].replace(" ", "").replace("{,}", "")
  return groups[0]


def _improper(mixed: re.Match) -> str:
  r"""A whole number and a proper fraction as one fraction: 1 1/2 is \frac{3}{2}."""
  # _MIXED has three spellings of a fraction, of which one matched.
  whole = mixed[1]
  top = mixed[2] or mixed[4] or mixed[5]
  bottom = mixed[3] or mixed[6] or mixed[7]
  if not 0 < int(top) < int(bottom):
    return mixed[0]
  return f"\\frac{{{int(whole) * int(bottom) + int(top)}}}{{{bottom}}}"


def _over(match: re.Match) -> str:
  top = match[1] or match[2]
  bottom = match[3] or match[4]
  return f"({top})/({bottom})"
