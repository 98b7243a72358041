r"""An answer in TeX as tokens, and the one spelling in which equal answers are compared.

A text is cut into control words, digits, letters, braces and spaces once, and every rule works on
these tokens. No text is evaluated. All steps take time linear in the text, because a policy may
write any text during training: nesting is limited, and no token is read more than a few times.

The rules start from Hendrycks et al. 2021 (https://arxiv.org/abs/2103.03874).
"""

import functools
import re
from collections.abc import Sequence

from s2d_jax.rewards import answers, lexer, names, numerals, signs, units
from s2d_jax.rewards.lexer import Malformed

MAX_CHARACTERS = 100_000  # a longer text is not an answer
MAX_DEPTH = 64  # nested braces and brackets; no answer comes near, and it bounds recursion
_MAX_PASSES = 8  # until nothing changes; two or three are usual

_ONE_ARGUMENT = {"\\overline", "\\bar", "\\vec", "\\hat", "\\mathbb", "\\mathcal",
                 "\\widehat", "\\overrightarrow", "\\overleftrightarrow",
                 "\\pmod", "\\tilde", "\\dot", "\\mathfrak"}
# Their argument is not printed, or says nothing of the answer.
_IGNORED_ARGUMENT = {"\\color", "\\textcolor", "\\tag", "\\label", "\\phantom", "\\hphantom",
                     "\\vphantom", "\\hspace", "\\vspace"}
_TWO_ARGUMENTS = {"\\frac", "\\binom"}
_BETWEEN = {"\\over": "\\frac", "\\choose": "\\binom"}  # between their two arguments
# The signs that may close a bracket: an interval may be open at one end alone.
_CLOSERS = {"(": {")", "]"}, "[": {")", "]"}, "\\{": {"\\}", "\\right."},
            "\\left.": {")", "]", "\\}", "\\right.", "|"}}
_CLOSING = {")", "]", "\\}", "\\right."}
# A unit's sign or punctuation without a value; empty brackets are a set, and so a value.
_SIGNS_ALONE = re.compile(r"(?:\\[%$,;:! ]|\^\{\\circ\}|[^\w(){}\[\]\\])*")
# Which sign stands between two values may be what is asked.
_COMPARISONS = {"<", ">", "="}
_CAPITALISED = re.compile(
  r"[A-Z][a-z]{2,}|[A-Z][a-z]+(?: [A-Za-z]+)+|YES|NO|No|TRUE|FALSE|NONE|True|False")
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")  # but not in a control word
_DIGITS = tuple("0123456789.")
_LAYOUT = {"aligned", "align", "align*", "gathered", "split"}
_MATRIX = {"bmatrix": "pmatrix", "Bmatrix": "Bmatrix", "smallmatrix": "matrix", "array": "matrix"}


@functools.lru_cache(maxsize=256)
def readings(text: str) -> tuple[answers.Answer, ...]:
  """The readings of an answer: "100,200" is a number, or a list written without a space."""
  ways = (True, False) if "," in text else (True,)
  return tuple(dict.fromkeys(read(text, tight) for tight in ways))


def as_lists(gold: answers.Answer, found: answers.Answer, ordered: bool) \
    -> tuple[answers.Answer, answers.Answer, bool]:
  r"""(gold, found, whether order counts): where one alone is a set, the elements of it as a list.

  \{-2,1\} answers what -2,1 does, and \{5\} what 5 does. A set has no order, so it does not answer
  a list whose order counts.
  """
  listed = [_elements(gold), _elements(found)]
  if (listed[0] is None) == (listed[1] is None):
    return gold, found, ordered
  if listed[1] is not None and ordered and len(gold.parts) > 1:
    return gold, found, ordered
  first, second = listed[0] or gold, listed[1] or found
  # Names that only one side has would give an order to the set.
  if first.is_named != second.is_named:
    return gold, found, ordered
  return first, second, False


@functools.lru_cache(maxsize=256)
def _elements(answer: answers.Answer) -> answers.Answer | None:
  """The elements of an answer that is one set; None for all others, and for sets in another way.

  The set of the empty set and a set of all that have a property are not their elements. The braces
  around one expression with letters may mean its fractional part.
  """
  name, value, unit = answer.parts[0] if len(answer.parts) == 1 else ("", "", "")
  if unit or not (value.startswith("\\{") and value.endswith("\\}")):
    return None
  if any(sign in value for sign in ("|", ":", "\\emptyset", "\\{\\}")):
    return None
  # The inside of a union has brackets that do not match, so it has no parts.
  listed = read(value[2:-2], tight=False)
  if len(listed.parts) == 1 and _LETTER.search(listed.parts[0].value):
    return None
  parts = tuple(part._replace(name=part.name or name) for part in listed.parts)
  return answers.Answer(parts, listed.joint) if parts else None


def read(text: str, tight: bool = True) -> answers.Answer:
  """An answer in one spelling, after the rules have been applied until they change nothing.

  Args:
    tight: whether commas without a space may separate thousands.
  """
  nothing = answers.Answer((), "")
  if len(text) > MAX_CHARACTERS:
    return nothing
  try:
    for _ in range(_MAX_PASSES):
      found = _pass(text, tight)
      if found.spelled == text:
        return found
      text = found.spelled
  except Malformed:
    pass
  # A text that TeX would refuse, or that never settles, has no value.
  return nothing


def _pass(text: str, tight: bool) -> answers.Answer:
  """An answer after one pass of the rules.

  Raises:
    Malformed: braces do not match, an argument is missing, or it is nested too deeply.
  """
  joined, joint = names.conjunctions(lexer.tokens(text))
  found = numerals.grouped(joined, tight)
  # TeX reserves "#"; in answers it begins the last line of a solution with its working. A box in an
  # answer is read as the answer's box, so no response can give it.
  if not {"#", "\\boxed", "\\fbox"}.isdisjoint(found):
    raise Malformed("more than an answer")
  parser = _Parser(signs.both(found))
  parts = parser.parts(parser.sequence(frozenset()))
  parts = [part._replace(value=_unbracketed(part.value)) for part in parts]
  parts = [part for part in parts if part.value in _COMPARISONS
           or not _SIGNS_ALONE.fullmatch(part.value)]
  return answers.Answer(tuple(parts), joint if len(parts) > 1 else "")


class _Parser:
  """Reads tokens into atoms: texts of which each is one number, word, fraction, bracket or sign."""

  def __init__(self, found: list[str]) -> None:
    self.tokens = found
    self.i = 0
    self.depth = 0

  def peek(self) -> str | None:
    """The next token, or None at the end."""
    return self.tokens[self.i] if self.i < len(self.tokens) else None

  def sequence(self, stops: frozenset[str] | set[str]) -> list[str]:
    """Atoms up to one of the stops, which is not read, or to the end.

    Raises:
      Malformed: a bracket closes that none has opened, or they are nested too deeply.
    """
    self.depth += 1
    if self.depth > MAX_DEPTH:
      raise Malformed("nested too deeply")
    atoms: list[str] = []
    while (token := self.peek()) is not None and token not in stops:
      if token in ("}", "\\}", "\\right.", "\\end"):
        raise Malformed(f"{token} closes nothing")
      self.i += 1
      if token in _BETWEEN:
        # Its arguments are the parts of the group before and behind it.
        below = self.sequence(stops)
        atoms = [f"{_BETWEEN[token]}{{{_plain(atoms)}}}{{{_plain(below)}}}"]
      else:
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
    if token in _IGNORED_ARGUMENT:
      self.argument()
      return [" "]
    if token == "\\text":
      return self.text()
    if token == "\\begin":
      return [self.environment()]
    if token[0].isdigit() and token.isascii():
      return [numerals.shortest(token)]
    return [] if token == "\\!" else [token]

  def group(self) -> list[str]:
    """The atoms up to the closing brace.

    Raises:
      Malformed: there is none.
    """
    found = self.sequence({"}"})
    if self.peek() is None:
      raise Malformed("a brace is not closed")
    self.i += 1
    return found

  def argument(self, whole: bool = False) -> str:
    """The argument of a control word: a group, or one digit, letter or control word.

    Args:
      whole: take all digits. TeX prints 2^10 as 2 to the 1 and a 0, which is never meant.

    Raises:
      Malformed: it is missing, or nested too deeply.
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
      return _plain(self.group())
    self.depth += 1
    if self.depth > MAX_DEPTH:
      raise Malformed("nested too deeply")
    found = _plain(self.atoms(token))
    self.depth -= 1
    return found

  def root(self) -> str:
    """A root; the degree 2 is left out.

    Raises:
      Malformed: what is under the root is missing, or the bracket of its degree is not closed.
    """
    degree = ""
    while self.peek() == " ":
      self.i += 1
    if self.peek() == "[":
      self.i += 1
      degree = _plain(self.sequence({"]"}))
      if self.peek() is None:
        raise Malformed("a bracket is not closed")
      self.i += 1
    shown = "" if degree in ("", "2") else f"[{degree}]"
    return f"\\sqrt{shown}{{{self.argument()}}}"

  def text(self) -> list[str]:
    r"""The atoms of a \text{...}: each word is one, and digits and signs are read as elsewhere."""
    while self.peek() == " ":
      self.i += 1
    atoms = self.group() if self._take("{") else [self.argument()]
    return [f"\\text{{{atom}}}" if atom.isalpha() else atom for atom in atoms]

  def _take(self, token: str) -> bool:
    """Whether this token comes next; it is then read."""
    comes = self.peek() == token
    self.i += comes
    return comes

  def bracket(self, opener: str) -> list[str]:
    """A bracket with what it holds as one atom; a lone "(" or "[" stays a sign.

    Raises:
      Malformed: another bracket is not closed.
    """
    # "|" closes nothing but a null delimiter, as in \left. x \right|.
    content = self.sequence(_CLOSING | ({"|"} if opener == "\\left." else set()) | {"}", "&"})
    closer = self.peek()
    if closer not in _CLOSERS[opener] and not (closer == "\\right." and opener in "(["):
      if opener in "([" and closer in (None, "}", "&"):
        return [opener, *content]
      raise Malformed(f"{opener} is not closed")
    self.i += 1
    parts = [part.spelled for part in self.parts(content)]
    if opener == "\\{" and closer == "\\}":
      # A set has no order and holds an element once.
      parts = sorted(set(parts))
    inner = ",".join(parts)
    if inner.startswith("\\begin{matrix}") and opener in "([" and len(parts) == 1:
      return [inner.replace("{matrix}", "{pmatrix}")]
    return [f"{opener}{inner}{closer}"]

  def environment(self) -> str:
    """A matrix or the like: cells between & and rows between double backslashes.

    Raises:
      Malformed: it is not closed, or closed by another name.
    """
    name = self.argument()
    kind = _MATRIX.get(name, name)
    if name == "array" and self.peek() == "{":
      self.argument()
    rows: list[list[str]] = [[]]
    while True:
      rows[-1].append(_plain(self.sequence({"&", "\\\\", "\\end"})))
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
    # A layout of one row, and a table of one cell, are what they hold.
    if len(rows) == 1 and (name in _LAYOUT or name == "array" and len(rows[0]) == 1):
      return " ".join(rows[0])
    body = "\\\\".join("&".join(row) for row in rows)
    return f"\\begin{{{kind}}}{body}\\end{{{kind}}}"

  def parts(self, atoms: Sequence[str]) -> list[answers.Part]:
    """The elements between commas, in one spelling each."""
    split: list[list[str]] = [[]]
    for atom in atoms:
      if atom in (",", ";"):
        split.append([])
      else:
        split[-1].append(atom)
    return [_element(part) for part in split]


def _element(atoms: Sequence[str]) -> answers.Part:
  """One element of a list, in one spelling."""
  name, value = names.split(_trimmed(atoms))
  value, unit = units.split(_trimmed(value))
  return answers.Part(_rendered(name, keep_text=True), _plain(value), unit)


def _plain(atoms: Sequence[str]) -> str:
  """Atoms that have neither a name nor a unit, such as an argument or a cell, in one spelling."""
  return numerals.number(_rendered(numerals.mixed(_trimmed(atoms))))


def _trimmed(atoms: Sequence[str]) -> list[str]:
  """Atoms without spaces at both ends, a full stop or comma behind and a plus before."""
  start = 0
  end = len(atoms)
  while end > start and atoms[end - 1] in (" ", ".", ",", ";", ":"):
    end -= 1
  while start < end and atoms[start] in (" ", "+"):
    start += 1
  return list(atoms[start:end])


def _rendered(atoms: Sequence[str], keep_text: bool = False) -> str:
  """Atoms as one text, with spaces only between digits or words and behind control words.

  Args:
    keep_text: whether words stay a text; else they are letters like others.
  """
  found: list[str] = []
  space = False
  for atom in atoms:
    if atom == " ":
      space = True
      continue
    if atom.startswith("\\text{") and not keep_text:
      atom = atom[len("\\text{") : -1]
    last = found[-1] if found else ""
    # "4 2" must not become 42, nor "\pi x" an unknown word.
    digits = space and last[-1:] in _DIGITS and atom[0] in _DIGITS
    control = last[:1] == "\\" and last[1:].isalpha() and atom[0].isalpha()
    words = space and min(len(last), len(atom)) > 1 and last.isalpha() and atom.isalpha()
    if digits or control or words:
      found.append(" ")
    found.append(atom)
    space = False
  text = "".join(found)
  return text.lower() if _CAPITALISED.fullmatch(text) else text


def _unbracketed(part: str) -> str:
  """(C) is C, and (x+1) is x+1: brackets around a whole answer, unless they hold a list."""
  inner = part[1:-1]
  if part[:1] + part[-1:] == "()" and not any(c in inner for c in "(),[]"):
    return inner
  return part
