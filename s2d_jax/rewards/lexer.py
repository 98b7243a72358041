r"""The tokens of an answer in TeX, each in one spelling: \dfrac is \frac, and \, is a space."""

import itertools
import re

MAX_TOKENS = 2000  # a longer text is not an answer, and reading it would hold up the training
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\.(?: ?\.){2,}|[0-9]+|[A-Za-zµμ]+|\s+|.", re.DOTALL)
# A text inside JSON inside a text has its backslashes doubled. In a matrix "\\" ends a row.
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")
# "\\[4pt]" ends a row and adds space.
_ROW_SPACE = re.compile(r"\\\\ ?\[-?[0-9.]{1,6} ?(?:pt|ex|em|mm|cm|in)\]")
_UNICODE = str.maketrans({
  "−": "-", "–": "-", "⁻": "^-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/",
  "°": "^{\\circ}", "π": "\\pi ", "θ": "\\theta ", "∞": "\\infty ", "√": "\\sqrt ", "≤": "\\le ",
  "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ",
  "∈": "\\in ", "²": "^{2}", "³": "^{3}", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
  "¾": "\\frac{3}{4}", "“": "", "”": "", "’": "'", "％": "\\%", "，": ", ", "（": "(", "）": ")",
  "…": "\\dots ",
  # A space without width is not seen, and full-width digits are digits.
  "\u200b": "", "\u2060": "", "\ufeff": "",
  **{chr(0xff10 + digit): str(digit) for digit in range(10)},
})
_SPACES = {"\\ ", "\\,", "\\:", "\\;", "~", "\\quad", "\\qquad", "\\enspace", "\\thinspace",
           "\\medspace", "\\thickspace", "$", "\\(", "\\)", "\\[", "\\]", "\\displaystyle",
           "\\textstyle", "\\rm", "\\bf", "\\it", "\\boldmath", "\\limits", "\\hfill", "\\null",
           "\\tiny", "\\small", "\\normalsize", "\\large", "\\Large", "\\LARGE", "\\huge", "\\Huge",
           "\\tt", "\\bfseries", "\\nonumber", "\\notag"}
_RESPELLED = {
  "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\dbinom": "\\binom",
  "\\tbinom": "\\binom", "\\leq": "\\le", "\\leqslant": "\\le", "\\geq": "\\ge",
  "\\geqslant": "\\ge", "\\neq": "\\ne", "\\lt": "<", "\\gt": ">", "\\varnothing": "\\emptyset",
  "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\mid": "|",
  "\\vert": "|", "\\lvert": "|", "\\rvert": "|", "%": "\\%", "\\ldots": "\\dots",
  "\\cdots": "\\dots", "\\degree": "^{\\circ}", "\\negthinspace": "\\!", "\\rightarrow": "\\to",
  "\\textup": "\\text", "\\mbox": "\\text", "\\hbox": "\\text", "\\mathrm": "\\text",
  "\\textrm": "\\text", "\\textbf": "\\text", "\\mathbf": "\\text", "\\textit": "\\text",
  "\\mathit": "\\text", "\\textsf": "\\text", "\\mathsf": "\\text", "\\operatorname": "\\text",
  "\\textnormal": "\\text", "\\boldsymbol": "\\text", "\\bm": "\\text", "\\emph": "\\text",
  "\\texttt": "\\text", "\\underline": "\\text", "\\colon": ":", "\\cr": "\\\\",
  "\\bigcup": "\\cup", "\\bigcap": "\\cap",
}
_SIZES = {"\\left", "\\right", "\\big", "\\Big", "\\bigg", "\\Bigg", "\\bigl", "\\bigr", "\\Bigl",
          "\\Bigr", "\\biggl", "\\biggr", "\\middle"}


class Malformed(Exception):
  """A text that TeX would refuse, or of more nesting than any answer has."""


def tokens(text: str) -> list[str]:
  """The tokens of TeX in one spelling: control words, runs of digits and of letters, spaces.

  Every spacing and every dollar becomes one " ", because it separates the digits around it.

  Raises:
    Malformed: there are more than an answer has.
  """
  text = text.translate(_UNICODE)
  if "\\begin" in text:
    text = _ROW_SPACE.sub(r"\\\\", text)
  else:
    text = _DOUBLED.sub(r"\\", text)
  if len(text) > 4 and text.startswith("**") and text.endswith("**"):
    # Markdown for bold letters.
    text = text[2:-2]
  found: list[str] = []
  size = None  # "\left" and the like, whose delimiter comes next
  for count, match in enumerate(_TOKEN.finditer(text)):
    if count >= MAX_TOKENS:
      raise Malformed("too long")
    token = _RESPELLED.get(match[0], match[0])
    if token.startswith(".") and len(token) > 1:
      token = "\\dots"
    if token in _SIZES:
      size = token
      continue
    if token.isspace() or token in _SPACES:
      # Spaces between \left and its delimiter mean nothing.
      if size is None and found[-1:] != [" "]:
        found.append(" ")
      continue
    if size in ("\\left", "\\right") and token == ".":
      token = f"{size}."
    size = None
    if token == "=" and found[-1:] == ["\\not"]:
      found[-1] = "\\ne"
    elif token == "^{\\circ}":
      found += ["^", "{", "\\circ", "}"]
    else:
      found.append(token)
  return found


def words(text: str) -> set[str]:
  r"""The words of two letters or more in each \text{...} of an answer."""
  found: set[str] = set()
  inside = 0  # open braces since \text
  for before, token in itertools.pairwise(["", *tokens(text)]):
    if token == "{" and (inside or before == "\\text"):
      inside += 1
    elif token == "}" and inside:
      inside -= 1
    elif inside and len(token) > 1 and token.isalpha():
      found.add(token)
  return found
