r"""Check of a mathematical answer by math-verify, which parses and simplifies with sympy.

That may take unbounded time and memory on what a model writes, so only `worker` processes import
this module; `rewards.math.verified` starts them.

Lists, tuples, intervals, sets, matrices and relations are compared part by part here, because
math-verify takes an open interval for a pair, [1,2] and (1,2) for one set, and two equations
without real solutions for one equation. Math-verify compares the expressions within. Decimals
reach it as exact fractions, since it would round 1/3 to 0.333333.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from s2d_jax.rewards import answers, chains, expressions, lexer, tex, units

_RELATION = re.compile(r"(<|>|=|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z]))")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_VARIABLE = re.compile(r"[a-zA-Z]|\\(?!pi|infty)[a-z]+")
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]+")
_TOKENS = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENERS = ("(", "[", "{", "\\{")
_CLOSERS = (")", "]", "}", "\\}")
_MOST_PARTS = 24      # of a list whose elements are compared with each other
_LOWEST, _HIGHEST = "(-\\infty", "\\infty)"
_T = TypeVar("_T")
_Relations = list[tuple[str, str, str]]  # (side, sign, side) of each sign in a chain


def check(problem: Mapping[str, object], text: str) -> float:
  """1.0 where an answer equals the problem's, else 0.0.

  Args:
    problem: "answer"; and "ordered", whether the order of a list counts.
    text: the answer, without its box.
  """
  gold = tex.read(problem["answer"])
  readings = [found for found in tex.readings(text) if found.parts]
  if not gold.parts or not readings:
    return 0.0
  ordered = bool(problem.get("ordered"))
  words = lexer.words(problem["answer"]) | lexer.words(text)
  return float(any(_answers(gold, found, ordered) for found in readings
                   if not _have_words((gold, found), words)))


def _have_words(both: Sequence[answers.Answer], words: set[str]) -> bool:
  """Whether values have words left, which math-verify would take for products of variables.

  Names, units and conjunctions have been read. The string match has compared the spellings.
  """
  values = [part.value for answer in both for part in answer.parts]
  return any(not words.isdisjoint(_LETTERS.findall(value)) for value in values)


def _answers(gold: answers.Answer, found: answers.Answer, ordered: bool) -> bool:
  """Whether two answers mean the same, with all their parts."""
  gold, found, ordered = tex.as_lists(gold, found, ordered)
  found = _end_of_chain(gold, found)
  if not gold.parts or not found.parts or max(len(gold.parts), len(found.parts)) > _MOST_PARTS:
    return False
  if "inequality" in (gold.kind, found.kind) and (gold.conjunction or found.conjunction):
    # 1<x and x<3 is the chain 1<x<3, and x<1 or x>3 is a union of intervals.
    verdict = _joined_relations(gold, found)
    if verdict is not None:
      return verdict
  if gold.conjunction != found.conjunction:
    return False
  named = gold.is_named and found.is_named

  def parts_equal(one: answers.Part, other: answers.Part) -> bool:
    if answers.names_agree(one, other, named) and _equal(one.measured, other.measured):
      return True
    return _equations(one, other)

  # Values without names are those of the names in the order in which they are written.
  return _paired(gold.parts, found.parts, parts_equal, ordered or gold.is_named != found.is_named)


def _end_of_chain(gold: answers.Answer, found: answers.Answer) -> answers.Answer:
  """The value at the end of a chain such as 3+9=12, where the problem's answer has no relation."""
  if gold.kind or len(gold.parts) != 1 or len(found.parts) != 1:
    return found
  name, value, unit = found.parts[0]
  chain = chains.read(value)
  end = units.attached(chain.end, unit) if chain else ""
  if chain and all(_equal(side, end) or not gold.parts[0].name and chains.is_quantity(side)
                   for side in chain.before) and _rounds(chain.end, chain.rounded):
    return answers.Answer((answers.Part(name, chain.end, unit),), "")
  return found


def _rounds(value: str, decimal: str) -> bool:
  """Whether a decimal is a number to as many digits as it has; "" rounds everything."""
  if not decimal:
    return True
  return expressions.rounds(value, decimal)


def _joined_relations(gold: answers.Answer, found: answers.Answer) -> bool | None:
  """The verdict where relations are joined by "and" or "or"; None where that does not decide it."""
  # An interval does not name its variable, so that of all parts has to be one.
  variables = [set().union(*(_variables(_relations_of(part)) for part in x.parts))
               for x in (gold, found)]
  measures = [{part.unit for part in x.parts if part.unit} for x in (gold, found)]
  if all(measures) and measures[0] != measures[1]:
    return False
  if variables[0] != variables[1] and (all(variables) or max(map(len, variables)) > 1):
    return False
  if all(len(x.parts) == 1 or x.conjunction == "and" for x in (gold, found)):
    chains = [[relation for part in x.parts for relation in _relations_of(part)]
              for x in (gold, found)]
    if all(chains):
      return _same_relations(*chains)
    sets = [_bounds(chain) or x.parts[0].value
            for chain, x in zip(chains, (gold, found), strict=True)]
    return _equal(*sets)
  if all(len(x.parts) == 1 or x.conjunction == "or" for x in (gold, found)):
    sets = ["\\cup ".join(_bounds(_relations_of(part)) or part.value for part in x.parts)
            for x in (gold, found)]
    return _equal(*sets)
  return None


def _equations(gold: answers.Part, found: answers.Part) -> bool:
  """Whether two parts are one equation; x=3y has the name x, and is x-3y=0."""
  # f(2) would be read as the product 2f.
  if "(" in gold.name + found.name or gold.unit != found.unit and gold.unit and found.unit:
    return False
  relations = [_relations_of(part) for part in (gold, found)]
  return all(relations) and _same_relations(*relations)


def prepare() -> None:
  """Checks a few answers, so that the parser has built its tables before processes copy it."""
  for gold, text in (("\\frac{1}{2}", "\\frac{2}{4}"), ("\\sqrt{12}", "2\\sqrt{3}"),
                     ("x^2-1", "(x-1)(x+1)"), ("(1,\\pi)", "(1,2\\pi)"), ("x+y=3", "y=3-x"),
                     ("\\sin x", "\\cos 2x"), ("e^{2i}", "\\ln 2"), ("\\log_2 8", "5!+\\binom53")):
    check({"answer": gold}, text)


def _paired(gold: Sequence[_T], found: Sequence[_T], equal: Callable[[_T, _T], bool],
            ordered: bool) -> bool:
  """Whether each element of one list is the same as one of the other, in any order or in theirs."""
  if len(gold) != len(found) or len(gold) > _MOST_PARTS:
    return False
  if ordered:
    return all(map(equal, gold, found))
  remaining = list(found)
  for part in gold:
    # An equal spelling first: it needs no parser.
    match = next((x for x in remaining if x == part), None)
    match = match or next((x for x in remaining if equal(part, x)), None)
    if match is None:
      return False
    remaining.remove(match)
  return True


def _equal(gold: str, found: str) -> bool:
  """Whether two answers in the spelling of `tex` mean the same, with their units."""
  if gold == found:
    return True
  (gold, gold_unit), (found, found_unit) = units.detached(gold), units.detached(found)
  if gold_unit != found_unit:
    return _converted((gold, gold_unit), (found, found_unit))
  for compare in (_relations, _matrices, _unions, _brackets):
    # None where neither is of that kind.
    verdict = compare(gold, found)
    if verdict is not None:
      return verdict
  return expressions.equal(gold, found)


def _converted(gold: tuple[str, str], found: tuple[str, str]) -> bool:
  """Whether two (value, unit) are equal that have different units, or only one has a unit."""
  may_differ = not found[1] or not gold[1] and units.may_add(gold[0], found[1])
  if may_differ and _equal(gold[0], found[0]):
    return True
  for (value, unit), (other, other_unit) in ((gold, found), (found, gold)):
    # Beside a number without a sign, 50% is its hundredth, 1/2.
    if (unit, other_unit) == ("percent", ""):
      return _equal(f"\\frac{{{value}}}{{100}}", other)
    if unit == "degree" and (other_unit == "radian" or not other_unit and "\\pi" in other):
      return _equal(f"\\frac{{{value}\\pi}}{{180}}", other)
  return False


def _relations(gold: str, found: str) -> bool | None:
  """The verdict where one is an equation or inequality; None where neither is."""
  first, second = _related(gold), _related(found)
  if not first and not second:
    return None
  if not (first and second):
    return bool(_interval(gold, found))
  return _same_relations(first, second)


def _same_relations(first: _Relations, second: _Relations) -> bool:
  """Whether the same relations hold in two chains."""
  return _paired(first, second, _same_relation, ordered=False)


def _related(answer: str) -> _Relations:
  """The relations (side, sign, side) of a chain: 1<x<2 has two."""
  pieces = [piece.strip() for piece in _RELATION.split(answer)]
  return [tuple(pieces[k : k + 3]) for k in range(0, len(pieces) - 2, 2)]


def _relations_of(part: answers.Part) -> _Relations:
  """The relations of a part, of which the name is a side; without its units."""
  return _related(answers.Part(part.name, units.without(part.value), "").spelled)


def _variables(relations: _Relations) -> set[str]:
  """The sides of relations that are a variable."""
  return {side for relation in relations for side in relation[::2] if _VARIABLE.fullmatch(side)}


def _same_relation(gold: tuple[str, str, str], found: tuple[str, str, str]) -> bool:
  """Whether two relations hold for the same values: one is a multiple of the other."""
  if expressions.differ_by_case("".join(gold), "".join(found)):
    return False
  ratio = expressions.ratio((gold[0], gold[2]), (found[0], found[2]))
  if ratio is None:
    return False
  if gold[1] in ("=", "\\ne"):
    return gold[1] == found[1]
  return bool(ratio.is_real) and found[1] == (gold[1] if ratio > 0 else _FLIPPED[gold[1]])


def _interval(gold: str, found: str) -> bool | None:
  """Whether one is an inequality of a variable and the other the interval of its values.

  None where neither is an inequality that gives an interval.
  """
  bounds = [_bounds(_related(x)) or x for x in (gold, found)]
  return None if bounds == [gold, found] else _equal(*bounds)


def _bounds(relations: _Relations) -> str | None:
  """The interval of x>3, 1<x<2 and the like, and the two intervals of x\\ne 3."""
  low = high = ""
  variables = set()
  for lower, sign, upper in relations:
    if _VARIABLE.fullmatch(upper):
      lower, sign, upper = upper, _FLIPPED[sign], lower
    if not _VARIABLE.fullmatch(lower) or sign == "=":
      return None
    variables.add(lower)
    if sign == "\\ne":
      return f"(-\\infty,{upper})\\cup({upper},\\infty)" if len(relations) == 1 else None
    # Which of two lower bounds holds is not decided here.
    if high if sign in ("<", "\\le") else low:
      return None
    if sign in ("<", "\\le"):
      high = upper + (")" if sign == "<" else "]")
    else:
      low = ("(" if sign == ">" else "[") + upper
  return f"{low or _LOWEST},{high or _HIGHEST}" if len(variables) == 1 else None


def _matrices(gold: str, found: str) -> bool | None:
  """The verdict where one is a matrix, by kind, shape and every cell; None where neither is."""
  cells = [re.fullmatch(r"\\begin\{(\w+)\}(.*)\\end\{\1\}", x, re.DOTALL) for x in (gold, found)]
  if cells == [None, None]:
    return None
  if None in cells or cells[0][1] != cells[1][1]:
    return False
  rows = [[row.split("&") for row in found[2].split("\\\\")] for found in cells]
  if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
    return False
  return all(map(_equal, sum(rows[0], []), sum(rows[1], [])))


def _unions(gold: str, found: str) -> bool | None:
  """The verdict where one is a union of intervals; None where neither is."""
  parts = [re.split(r"\\cup ?", x) for x in (gold, found)]
  return None if parts == [[gold], [found]] else _paired(*parts, _equal, ordered=False)


def _brackets(gold: str, found: str) -> bool | None:
  """The verdict where one is a tuple, interval or set as a whole; None where neither is."""
  first, second = _bracket(gold), _bracket(found)
  if first is None and second is None:
    return None
  if first is None or second is None or first[:2] != second[:2]:
    return False
  return _paired(first[2], second[2], _equal, ordered=first[0] != "\\{")


def _bracket(answer: str) -> tuple[str, str, list[str]] | None:
  """(opener, closer, elements) of a bracket around the whole answer that holds a list or a set."""
  depth = 0
  parts: list[str] = [""]
  tokens = _TOKENS.findall(answer)
  for k, token in enumerate(tokens):
    depth -= token in _CLOSERS
    if depth == 0 and 0 < k < len(tokens) - 1:
      return None
    if token == "," and depth == 1:
      parts.append("")
    elif 0 < k < len(tokens) - 1:
      parts[-1] += token
    depth += token in _OPENERS
  is_list = len(parts) > 1 or tokens[:1] in (["\\{"], ["["])
  if len(tokens) < 2 or depth or tokens[0] not in ("(", "[", "\\{") or not is_list:
    return None
  return tokens[0], tokens[-1], parts
