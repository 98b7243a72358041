r"""An answer in TeX as tokens, and the one spelling in which equal answers are compared.

A text is cut into control words, digits, letters, braces and spaces once, and every rule works on
these tokens. No text is evaluated. All steps take time linear in the text, because a policy may
write any text during training: nesting is limited, and no token is read more than a few times.

The rules start from Hendrycks et al. 2021 (https://arxiv.org/abs/2103.03874).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from s2d_jax.rewards import numerals, units

MAX_CHARACTERS = 100_000  # a longer text is not an answer
MAX_DEPTH = 64  # nested braces and brackets; no answer comes near, and it bounds recursion
_MAX_PASSES = 8  # until nothing changes; two or three are usual

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+|[A-Za-z]+|\s+|.", re.DOTALL)
# A text inside JSON inside a text has its backslashes doubled. In a matrix "\\" ends a row.
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")
_UNICODE = str.maketrans({
  "−": "-", "–": "-", "⁻": "^-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/",
  "°": "^{\\circ}", "π": "\\pi ", "θ": "\\theta ", "∞": "\\infty ", "√": "\\sqrt ", "≤": "\\le ",
  "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ",
  "∈": "\\in ", "²": "^{2}", "³": "^{3}", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
  "¾": "\\frac{3}{4}", "“": "", "”": "", "’": "'", "％": "\\%", "，": ", ", "（": "(", "）": ")",
})
_SPACES = {"\\ ", "\\,", "\\:", "\\;", "~", "\\quad", "\\qquad", "\\enspace", "\\thinspace",
           "\\medspace", "\\thickspace", "$", "\\(", "\\)", "\\[", "\\]", "\\displaystyle",
           "\\textstyle", "\\rm", "\\bf", "\\it", "\\boldmath", "\\limits", "\\hfill", "\\null"}
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
}
_SIZES = {"\\left", "\\right", "\\big", "\\Big", "\\bigg", "\\Bigg", "\\bigl", "\\bigr", "\\Bigl",
          "\\Bigr", "\\biggl", "\\biggr", "\\middle"}
_ONE_ARGUMENT = {"\\overline", "\\bar", "\\vec", "\\hat", "\\mathbb", "\\mathcal", "\\underline",
                 "\\widehat", "\\overrightarrow", "\\overleftrightarrow",
                 "\\pmod", "\\tilde", "\\dot", "\\mathfrak"}
_TWO_ARGUMENTS = {"\\frac", "\\binom"}
# The signs that may close a bracket: an interval may be open at one end alone.
_CLOSERS = {"(": {")", "]"}, "[": {")", "]"}, "\\{": {"\\}", "\\right."},
            "\\left.": {")", "]", "\\}", "\\right.", "|"}}
_CLOSING = {")", "]", "\\}", "\\right."}
# A unit's sign or punctuation without a value; empty brackets are a set, and so a value.
_SIGNS_ALONE = re.compile(r"(?:\\[%$,;:! ]|\^\{\\circ\}|[^\w(){}\[\]\\])*")
_MATRIX = {"bmatrix": "pmatrix", "Bmatrix": "Bmatrix", "smallmatrix": "matrix", "array": "matrix"}


class Malformed(Exception):
  """A text that TeX would refuse, or of more nesting than any answer has."""


def tokens(text: str) -> list[str]:
  """The tokens of TeX in one spelling: control words, runs of digits and of letters, spaces.

  Every spacing and every dollar becomes one " ", because it separates the digits around it.
  """
  text = text.translate(_UNICODE)
  if "\\begin" not in text:
    text = _DOUBLED.sub(r"\\", text)
  found: list[str] = []
  size = None  # "\left" and the like, whose delimiter comes next
  for token in _TOKEN.findall(text):
    token = _RESPELLED.get(token, token)
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
    if token == "^{\\circ}":
      found += ["^", "{", "\\circ", "}"]
    else:
      found.append(token)
  return found


class Answer(NamedTuple):
  """An answer in one spelling; equal answers have equal parts."""
  parts: tuple[str, ...]     # the elements of a list; () where nothing is left
  unit: str | None = None    # by its known names, as "meter second" of m/s

  @property
  def text(self) -> str:
    """The parts as one text."""
    return ", ".join(self.parts)


def read(answer: str, ordered: bool = False, tight: bool = True, names: bool = False) -> Answer:
  """An answer in one spelling, after the rules have been applied until they change nothing.

  Args:
    ordered: whether the order of a list counts; that of a set never does, of a tuple always.
    tight: whether commas without a space may separate thousands.
    names: whether a name before "=" stays.
  """
  found = Answer(())
  if len(answer) > MAX_CHARACTERS:
    return found
  try:
    for _ in range(_MAX_PASSES):
      parts, unit = _pass(answer, tight, names)
      parts = parts if ordered else sorted(parts)
      # Units are left out in the first pass, and the later ones see none.
      found = Answer(tuple(parts), found.unit or unit)
      if found.text == answer:
        return found
      answer = found.text
  except Malformed:
    pass
  # A text that TeX would refuse, or that never settles, has no value.
  return Answer(())


def _pass(answer: str, tight: bool, names: bool) -> tuple[list[str], str | None]:
  """(elements, unit) of an answer after one pass of the rules.

  Raises:
    Malformed: braces do not match, an argument is missing, or it is nested too deeply.
  """
  found = numerals.grouped(units.conjunctions(tokens(answer)), tight)
  # TeX reserves "#"; in answers it begins the last line of a solution with its working. A box in an
  # answer is read as the answer's box, so no response can give it.
  if not {"#", "\\boxed", "\\fbox"}.isdisjoint(found):
    raise Malformed("more than an answer")
  parser = _Parser(found, names)
  parts = parser.parts(parser.sequence(frozenset()), expand=True)
  return [_unbracketed(part) for part in parts if not _SIGNS_ALONE.fullmatch(part)], parser.unit


class _Parser:
  """Reads tokens into atoms: texts of which each is one number, word, fraction, bracket or sign."""

  def __init__(self, found: list[str], names: bool) -> None:
    self.tokens = found
    self.names = names
    self.i = 0
    self.depth = 0
    self.unit: str | None = None  # of the last element that has a known one

  def peek(self) -> str | None:
    """The next token, or None at the end."""
    return self.tokens[self.i] if self.i < len(self.tokens) else None

  def sequence(self, stops: frozenset[str] | set[str]) -> list[str]:
    """Atoms up to one of the stops, which is not read, or to the end."""
    self.depth += 1
    if self.depth > MAX_DEPTH:
      raise Malformed("nested too deeply")
    atoms: list[str] = []
    while (token := self.peek()) is not None and token not in stops:
      if token in ("}", "\\}", "\\right.", "\\end"):
        raise Malformed(f"{token} closes nothing")
      self.i += 1
      atoms += self.atoms(token)
    self.depth -= 1
    return atoms

  def atoms(self, token: str) -> list[str]:
    """The atoms that begin with a token, which has been read."""
    if token == "{":
      # Braces group what TeX reads, and are not seen.
      return self.group()
    if token in _CLOSERS:
      return self.bracket(token)
    if token in ("^", "_"):
      return [f"{token}{{{self.argument(whole=True)}}}"]
    if token in _TWO_ARGUMENTS:
      first = self.argument()
      return [f"{token}{{{first}}}{{{self.argument()}}}"]
    if token == "\\sqrt":
      return [self.root()]
    if token in _ONE_ARGUMENT:
      return [f"{token}{{{self.argument()}}}"]
    if token == "\\text":
      return [self.text()]
    if token == "\\begin":
      return [self.environment()]
    if token[0].isdigit() and token.isascii():
      return [numerals.shortest(token)]
    return [] if token == "\\!" else [token]

  def group(self) -> list[str]:
    """The atoms up to the closing brace."""
    found = self.sequence({"}"})
    if self.peek() is None:
      raise Malformed("a brace is not closed")
    self.i += 1
    return found

  def argument(self, whole: bool = False) -> str:
    """The argument of a control word: a group, or one digit, letter or control word.

    Args:
      whole: take all digits. TeX prints 2^10 as 2 to the 1 and a 0, which is never meant.
    """
    while self.peek() == " ":
      self.i += 1
    token = self.peek()
    if token is None or token in _CLOSING or token in ("}", "&", "\\\\", ",", "^", "_"):
      raise Malformed("an argument is missing")
    if token[0].isalnum() and len(token) > 1 and not (whole and token[0].isdigit()):
      # The other digits or letters stay for what comes next.
      self.tokens[self.i] = token[1:]
      return token[0]
    self.i += 1
    if whole and token == "-" and (self.peek() or " ")[0].isdigit():
      return f"-{self.argument(whole=True)}"
    if token == "{":
      return self.element(self.group())
    self.depth += 1
    if self.depth > MAX_DEPTH:
      raise Malformed("nested too deeply")
    found = self.element(self.atoms(token))
    self.depth -= 1
    return found

  def root(self) -> str:
    """A root; the degree 2 is left out."""
    degree = ""
    while self.peek() == " ":
      self.i += 1
    if self.peek() == "[":
      self.i += 1
      degree = self.element(self.sequence({"]"}))
      if self.peek() is None:
        raise Malformed("a bracket is not closed")
      self.i += 1
    shown = "" if degree in ("", "2") else f"[{degree}]"
    return f"\\sqrt{shown}{{{self.argument()}}}"

  def text(self) -> str:
    r"""A \text{...}, as one atom with single spaces."""
    while self.peek() == " ":
      self.i += 1
    if self.peek() != "{":
      return "\\text{" + self.argument() + "}"
    start = self.i + 1
    depth = 0
    while (token := self.peek()) is not None:
      depth += (token == "{") - (token == "}")
      self.i += 1
      if depth == 0:
        words = [t for t in self.tokens[start : self.i - 1] if t not in ("{", "}", "\\text")]
        return "\\text{" + " ".join("".join(words).split()) + "}"
    raise Malformed("a brace is not closed")

  def bracket(self, opener: str) -> list[str]:
    """A bracket with what it holds as one atom; a lone "(" or "[" stays a sign."""
    # "|" closes nothing but a null delimiter, as in \left. x \right|.
    content = self.sequence(_CLOSING | ({"|"} if opener == "\\left." else set()) | {"}", "&"})
    closer = self.peek()
    if closer not in _CLOSERS[opener] and not (closer == "\\right." and opener in "(["):
      if opener in "([" and closer in (None, "}", "&"):
        return [opener, *content]
      raise Malformed(f"{opener} is not closed")
    self.i += 1
    parts = self.parts(content)
    if opener == "\\{" and closer == "\\}":
      # A set has no order and holds an element once.
      parts = sorted(set(parts))
    inner = ",".join(parts)
    if inner.startswith("\\begin{matrix}") and opener in "([" and len(parts) == 1:
      return [inner.replace("{matrix}", "{pmatrix}")]
    return [f"{opener}{inner}{closer}"]

  def environment(self) -> str:
    """A matrix or the like: cells between & and rows between double backslashes."""
    name = self.argument()
    kind = _MATRIX.get(name, name)
    if name == "array" and self.peek() == "{":
      self.argument()
    rows: list[list[str]] = [[]]
    while True:
      rows[-1].append(self.element(self.sequence({"&", "\\\\", "\\end"})))
      token = self.peek()
      if token is None:
        raise Malformed("an environment is not closed")
      self.i += 1
      if token == "\\end":
        break
      if token == "\\\\":
        rows.append([])
    if self.argument() != name:
      raise Malformed("an environment ends by another name")
    # A row break behind the last row begins no row.
    if rows[-1] == [""] and len(rows) > 1:
      rows.pop()
    body = "\\\\".join("&".join(row) for row in rows)
    return f"\\begin{{{kind}}}{body}\\end{{{kind}}}"

  def parts(self, atoms: Sequence[str], expand: bool = False) -> list[str]:
    """The elements between commas, in one spelling each; with `expand` both signs of a plus-minus.
    """
    split: list[list[str]] = [[]]
    for atom in atoms:
      if atom in (",", ";"):
        split.append([])
      else:
        split[-1].append(atom)
    found: list[str] = []
    for part in split:
      if expand and part.count("\\pm") == 1:
        at = part.index("\\pm")
        found += [self.element([*part[:at], sign, *part[at + 1 :]]) for sign in "+-"]
      else:
        found.append(self.element(part))
    return found

  def element(self, atoms: Sequence[str]) -> str:
    """One answer of a list, one cell or one argument, in one spelling."""
    value, unit = units.bare(atoms, self.names)
    self.unit = unit or self.unit
    return numerals.number(units.rendered(value))


def _unbracketed(part: str) -> str:
  """(C) is C, and (x+1) is x+1: brackets around a whole answer, unless they hold a list."""
  inner = part[1:-1]
  if part[:1] + part[-1:] == "()" and not any(c in inner for c in "(),[]"):
    return inner
  return part
