r"""The published comparison of answers of the MATH dataset, `is_equiv`.

From Hendrycks et al. 2021 (https://arxiv.org/abs/2103.03874), `modeling/math_equivalence.py` of
https://github.com/hendrycks/math (MIT licence). Its steps and their order are kept, with its flaws.
"""


def _fractions(text):
  r"""\frac12 as \frac{1}{2}."""
  first, *others = text.split("\\frac")
  fixed = first
  for other in others:
    fixed += "\\frac"
    if other[0] == "{":
      fixed += other
      continue
    if len(other) < 2:
      return text
    top, bottom, behind = other[0], other[1], other[2:]
    fixed += f"{{{top}}}{bottom}{behind}" if bottom == "{" else f"{{{top}}}{{{bottom}}}{behind}"
  return fixed


def _slash(text):
  r"""1/2 as \frac{1}{2}, where both are whole numbers."""
  if text.count("/") != 1:
    return text
  try:
    top, bottom = (int(part) for part in text.split("/"))
  except ValueError:
    return text
  return f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text


def _roots(text):
  r"""\sqrt3 as \sqrt{3}."""
  first, *others = text.split("\\sqrt")
  return first + "".join("\\sqrt" + (other if other[0] == "{" else f"{{{other[0]}}}{other[1:]}")
                         for other in others)


def stripped(text):
  """An answer in the spelling that the published function compares."""
  for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
                   ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""),
                   ("\\$", "")):
    text = text.replace(old, new)
  if "\\text{ " in text:
    # A text that begins with a space is a unit.
    text, _ = text.split("\\text{ ")
  for old, new in (("\\%", ""), (" .", " 0."), ("{.", "{0.")):
    text = text.replace(old, new)
  if not text:
    return text
  if text[0] == ".":
    text = "0" + text
  if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
    text = text.split("=")[1]
  text = _fractions(_roots(text).replace(" ", ""))
  return _slash("\\frac{1}{2}" if text == "0.5" else text)


def is_equiv(first, second):
  """Whether two answers are one by the published rules."""
  try:
    return stripped(first) == stripped(second)
  except (IndexError, ValueError):
    return first == second
