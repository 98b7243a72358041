r"""Check of a mathematical answer given in the last \boxed{}: a string match, or math_verify.

The string match follows Hendrycks et al. 2021 (https://arxiv.org/abs/2103.03874): both answers
are brought to one spelling and compared. It never evaluates the text.
"""

import re

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


def reward(problem, text):
  r"""1.0 where the last \boxed{} of the text matches the answer after normalisation, else 0.0."""
  given = last_boxed(text)
  return float(given is not None and normalised(given) == normalised(problem["answer"]))


def verified(problem, text):
  r"""1.0 where math_verify finds the last \boxed{} equal to the answer, else 0.0.

  It parses and simplifies what a model wrote, at whatever cost: call it only through
  `rewards.pool`, whose workers have limits and can be killed.
  """
  import math_verify  # here, so that no process but a worker ever loads sympy

  given = last_boxed(text)
  if given is None:
    return 0.0
  gold, answer = (
    math_verify.parse(f"\\boxed{{{x}}}", parsing_timeout=None) for x in (problem["answer"], given)
  )
  return float(math_verify.verify(gold, answer, timeout_seconds=None))


def last_boxed(text):
  r"""What stands between the braces of the last \boxed{...} or \fbox{...}, or None."""
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


def normalised(answer):
  r"""One spelling for answers that mean the same: " \dfrac12 " and "1/2", "1,000" and "1000"."""
  for old, new in RESPELLED:
    answer = answer.replace(old, new)
  for old in SPACES_AND_SIGNS + DEGREES:
    answer = answer.replace(old, "")
  answer = re.sub(r"\\text\{\s[^{}]*\}\s*$", "", answer)  # a unit: "5\text{ cm}"
  answer = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", answer)
  answer = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", answer)
  answer = FRACTION.sub(_over, answer)
  answer = re.sub(r"^(-?)\((-?\w+)\)/\((-?\w+)\)$", r"\1\2/\3", re.sub(r"\s+", "", answer))
  answer = re.sub(r"^[a-zA-Z]=", "", answer).rstrip(".")  # "x=5"
  answer = re.sub(r"(?<![\d.])\.(?=\d)", "0.", answer)  # ".5"
  if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", answer):
    answer = answer.replace(",", "")
  number = re.fullmatch(r"([+-]?)0*(\d+)(\.0*)?", answer)
  if number:  # by its text: int() refuses the thousands of digits a model may write
    sign = "-" if number[1] == "-" and number[2] != "0" else ""
    return sign + number[2]
  return answer


def _over(match):
  top, bottom = match[1] or match[2], match[3] or match[4]
  return f"({top})/({bottom})"
