"""The loops of a program that is compiled for a TPU, and the cycles that its compiler expects."""

import re
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
_KIND = re.compile(r"(?:ROOT )?%?[\w.\-]+ = (?:\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(")


class Loop(NamedTuple):
  """A `while` of a program."""
  depth: int   # loops around it
  source: str  # the operation that it was made from


class Program(NamedTuple):
  """Facts from a program's text; a loop's body is counted once."""
  cycles: int  # expected outside of what runs asynchronously
  loops: list[Loop]


def read(text: str) -> Program:
  """The Program of `compiled.as_text()`."""
  computations: dict[str, list[str]] = {}
  lines: list[str] = []
  entry = ""
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      lines = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    else:
      lines.append(line.strip())
  loops: list[Loop] = []
  return Program(_add(entry, computations, 0, loops), loops)


def _add(name: str, computations: dict[str, list[str]], depth: int, loops: list[Loop]) -> int:
  """The cycles of one computation and of all that it runs; its loops are added to `loops`."""
  total = 0
  for line in computations[name]:
    kind = _KIND.match(line)
    if kind and kind[1] == "while":
      source = re.search(r'op_name="([^"]*)"', line)
      loops.append(Loop(depth, source[1] if source else ""))
      total += _add(re.search(r"body=%([\w.\-]+)", line)[1], computations, depth + 1, loops)
    elif kind and kind[1] == "call":
      total += _add(re.search(r"to_apply=%([\w.\-]+)", line)[1], computations, depth, loops)
    elif kind and not kind[1].endswith(("-start", "-done")):
      cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
      total += int(cycles[1]) if cycles else 0
  return total
