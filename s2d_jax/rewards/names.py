r"""Names before "=" in an answer, and the conjunctions between its values.

A name says what a value is of: x, \theta, f(2), P(A \cap B), \angle ABC, (x,y). Where an answer has
several names, they say which value is whose: x=1, y=2 is not x=2, y=1.
"""

import re
from collections.abc import Sequence

from s2d_jax.rewards import units, words

_SPACE = " "
# The control words that are a letter, or that name a quantity where "=" follows.
_LETTERS = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa varkappa
  lambda mu nu xi rho varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta
  Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar imath jmath gcd deg dim det max min arg""".split()
_LETTER = re.compile(rf"[A-Za-z]|\\(?:{'|'.join(_LETTERS)})"
                     r"|\\(?:vec|hat|tilde|mathcal|overrightarrow)\{[A-Za-z]\}")
_CAPITALS = re.compile(r"[A-Z]{2,3}|\\(?:overline|overrightarrow)\{[A-Z]{2}\}|\[[A-Z]{3,4}\]")
_WORD = re.compile(r"\\text\{([A-Za-z]+)\}")
_FIGURES = {"\\angle", "\\triangle"}
# Arguments of a function: variables, or a constant.
_VARIABLES = re.compile(r"\([A-Za-z](?:,[A-Za-z])*\)")
_CONSTANT = re.compile(r"\((?:[-+*/.,{}0-9]|\\(?:frac|sqrt|pi|infty|cdot|times) ?)+\)")
_OF_EVENTS = {"\\mathbb{P}", "\\mathbb{E}", "P", "E", "\\text{P}", "\\text{Pr}", "\\Pr"}
# In front of a bracket these are factors rather than functions.
_COORDINATES = {"x", "y", "z"}
_LONGEST_NAME = 12  # atoms
_MOST_NAMES = 8     # of a chain such as x=y=5
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne)(?![a-z])")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge)(?![a-z])")


def conjunctions(tokens: Sequence[str]) -> tuple[list[str], str]:
  """(tokens with "and" or "or" between two values as ";", that word or "").

  In an answer with other words, as in "Alice and Bob", they belong to the text, and so they do
  where both occur.
  """
  others = {token for token in tokens if len(token) > 2 and token.isalpha()} - {"and"}
  joining = {"and", "or"} & set(tokens)
  if len(joining) != 1 or not all(map(units.is_known, others)):
    return list(tokens), ""
  joint = joining.pop()
  return [";" if token == joint else token for token in tokens], joint


def split(atoms: Sequence[str]) -> tuple[list[str], list[str]]:
  r"""(name, value) of atoms such as those of x=5, \theta = 5, f(2)=5, (x,y)=5 and x\in 5.

  The name is [] where there is none. Of a chain such as x=y=5 it is the first.
  """
  first: list[str] = []
  start = 0
  # Where words alone follow, most words before them say something else: "no = yes".
  in_words = all(atom in ("=", _SPACE) or _WORD.fullmatch(atom) or len(atom) > 2 and atom.isalpha()
                 for atom in atoms)
  for _ in range(_MOST_NAMES):
    ahead = atoms[start : start + _LONGEST_NAME + 1]
    signs = [k for k, atom in enumerate(ahead) if atom in ("=", "\\in")]
    name = [atom for atom in ahead[: signs[0]] if atom != _SPACE] if signs else []
    if not _is_name(name) or in_words and not _announce(name):
      break
    first = first or list(ahead[: signs[0]])
    start += signs[0] + 1
  return first, list(atoms[start:])


def _is_name(atoms: list[str]) -> bool:
  """Whether atoms without spaces are a name."""
  spoken = [_WORD.fullmatch(atom) for atom in atoms]
  if atoms and all(spoken):
    return _are_words_of_a_name([found[1] for found in spoken])
  base = atoms[:1]
  if base and base[0] in _FIGURES:
    return len(atoms) == 2 and atoms[1].isalpha() and atoms[1].isupper()
  # Behind the base: an index, primes, the power -1 and the arguments of a function.
  for atom in atoms[1:]:
    if not (atom[0] == "_" or atom == "'" or atom in ("^{-1}", "^{\\prime}")
            or _are_arguments(base[0], atom)):
      return False
  if not base:
    return False
  if spoken[0]:
    return _are_words_of_a_name([spoken[0][1]])
  return base[0] in _OF_EVENTS or any(kind.fullmatch(base[0])
                                      for kind in (_LETTER, _CAPITALS, _VARIABLES))


def _are_words_of_a_name(phrase: list[str]) -> bool:
  return words.is_name(phrase) or all(map(units.is_known, phrase))


def _announce(name: list[str]) -> bool:
  """Whether each word of a name says that the answer follows."""
  return all(atom[len("\\text{") : -1].lower() in words.ANNOUNCING for atom in name)


def _are_arguments(base: str, atom: str) -> bool:
  if base in _OF_EVENTS and atom[0] == "(":
    return True
  if _CONSTANT.fullmatch(atom):
    # x(2)=10 says that 2x is 10.
    return base not in _COORDINATES
  return _VARIABLES.fullmatch(atom) is not None


def agree(first: str, second: str) -> bool:
  """Whether two names of whole answers may be of one value; "" is a name that was left out.

  A letter says little, so x=5 and n=5 agree. Coordinates are not letters of one thing: x=4 and y=4
  are two lines. Arguments say what was asked: f(2)=5 is not f(3)=5.
  """
  if first == second:
    return True
  if {first, second} <= _COORDINATES:
    return False
  return "(" not in first or "(" not in second


def relation(text: str) -> str:
  """The kind of relation in a value: "inequality", "equation" or ""."""
  if _INEQUALITY.search(text):
    return "inequality"
  return "equation" if _RELATION.search(text) else ""
