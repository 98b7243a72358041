r"""Check of a mathematical answer in the last \boxed{}: a string match, or math_verify.

The string match follows Hendrycks et al. 2021 (https://arxiv.org/abs/2103.03874): both answers
are brought to one spelling and compared. It never evaluates the text. Every pattern here takes
time linear in the text, because a policy may write any text during training.
"""

import re
from collections.abc import Mapping

FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")
SPACES_AND_SIGNS = ("\\!", "\\,", "\\;", "\\ ", "\\left", "\\right", "\\$", "$", "\\%", "%")
DEGREES = ("^{\\circ}", "^\\circ")
RESPELLED = (
  ("\\tfrac", "\\frac"),
  ("\\dfrac", "\\frac"),
  ("\\cfrac", "\\frac"),
  ("{,}", ","),
  ("\n", ""),
)
UNIT = re.compile(r"\\text\{\s[^{}]*\}\s*$")  # 5\text{ cm}
WRAPPED = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}")
SHORT_ROOT = re.compile(r"\\sqrt(\w)")
SPACES = re.compile(r"\s+")
PLAIN_FRACTION = re.compile(r"(-?)\((-?\w+)\)/\((-?\w+)\)")
NAME = re.compile(r"^[a-zA-Z]=")  # x=5
BARE_POINT = re.compile(r"(?<![\d.])\.(?=\d)")  # .5
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")  # 1,000
WHOLE = re.compile(r"([+-]?)(\d+)(\.0*)?")  # without "0*" before the digits, which is quadratic


def reward(problem: Mapping[str, str], text: str) -> float:
  r"""1.0 where the last \boxed{} of the text matches the answer after normalisation, else 0.0."""
  boxed = last_boxed(text)
  return float(boxed is not None and normalised(boxed) == normalised(problem["answer"]))


def verified(problem: Mapping[str, str], text: str) -> float:
  r"""1.0 where math_verify finds the last \boxed{} equal to the answer, else 0.0.

  It parses and simplifies the text, which may take unbounded time and memory. Call it only
  through `rewards.pool`, whose workers have limits and can be killed.
  """
  import math_verify  # here, so that no process but a worker ever loads sympy

  boxed = last_boxed(text)
  if boxed is None:
    return 0.0
  gold, answer = (
    math_verify.parse(f"\\boxed{{{x}}}", parsing_timeout=None) for x in (problem["answer"], boxed)
  )
  return float(math_verify.verify(gold, answer, timeout_seconds=None))


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
  return None  # the braces never close: the response was cut


def normalised(answer: str) -> str:
  r"""One spelling for answers that mean the same: " \dfrac12 " and "1/2", "1,000" and "1000"."""
  for old, new in RESPELLED:
    answer = answer.replace(old, new)
  for old in SPACES_AND_SIGNS + DEGREES:
    answer = answer.replace(old, "")
  answer = UNIT.sub("", answer)
  answer = WRAPPED.sub(r"\1", answer)
  answer = SHORT_ROOT.sub(r"\\sqrt{\1}", answer)
  answer = FRACTION.sub(_over, answer)
  answer = SPACES.sub("", answer)
  plain = PLAIN_FRACTION.fullmatch(answer)
  if plain:
    answer = f"{plain[1]}{plain[2]}/{plain[3]}"
  answer = NAME.sub("", answer).rstrip(".")
  answer = BARE_POINT.sub("0.", answer)
  if GROUPED.fullmatch(answer):
    answer = answer.replace(",", "")
  number = WHOLE.fullmatch(answer)
  if number:  # by its text: int() refuses the thousands of digits a model may write
    digits = number[2].lstrip("0") or "0"
    return "-" + digits if number[1] == "-" and digits != "0" else digits
  return answer


def _over(match: re.Match) -> str:
  top = match[1] or match[2]
  bottom = match[3] or match[4]
  return f"({top})/({bottom})"
