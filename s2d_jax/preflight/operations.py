"""The text of a compiled program as operations, by computation; the sizes of their types."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2,
          "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}


class Operation(NamedTuple):
  """One line of a program."""
  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str  # the line from its operands on
  is_root: bool


Computations = dict[str, list[Operation]]


def parse(text: str) -> tuple[Computations, str]:
  """({computation: its operations}, the entry's name)."""
  found: Computations = {}
  entry = ""
  current: list[Operation] = []
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
    if head:
      current = found[head[2]] = []
      entry = head[2] if head[1] else entry
      continue
    operation = _operation(line)
    if operation is not None:
      current.append(operation)
    elif current and line not in ("", "}"):
      # A TPU's kernel has facts with line breaks in it, and its source after them.
      last = current[-1]
      current[-1] = last._replace(attributes=f"{last.attributes} {line}")
  return found, entry


def _operation(line: str) -> Operation | None:
  named = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if named is None:
    return None
  text = line[named.end():]
  # A tuple's type may hold further brackets, those of layouts among them.
  end = _closing(text) if text.startswith("(") else text.index(" ")
  opcode, _, inside = text[end:].strip().partition("(")
  close = _closing("(" + inside) - 1
  operands = tuple(re.findall(r"%([\w.\-]+)", inside[:close]))
  return Operation(named[2], text[:end], opcode, operands, inside, bool(named[1]))


def _closing(text: str) -> int:
  """The index after the bracket that closes the first one of `text`."""
  depth = 0
  for i, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return i + 1
  return len(text)


def arrays(type_: str) -> list[tuple[float, str]]:
  """(bytes, layout) of an array's type, or of all arrays of a tuple's."""
  return [(_BYTES.get(kind, 0) * math.prod(integers(dims)), layout)
          for kind, dims, layout in re.findall(r"([a-z]\w*)\[([0-9,]*)\](\{[^{}]*\})?", type_)]


def type_bytes(type_: str) -> float:
  """Bytes of an array's type, or of all arrays of a tuple's."""
  return sum(size for size, _ in arrays(type_))


def memory_bytes(type_: str) -> float:
  """Those bytes of a type that lie in the device's memory."""
  return sum(size for size, layout in arrays(type_) if not outside_memory(layout))


def outside_memory(layout: str) -> bool:
  """Whether an array lies on a TPU's chip, beside its memory, or with the host."""
  space = re.search(r"S\((\d+)\)", layout)
  if space is None:
    return False
  # A GPU's space 1 is its memory, too. Only a TPU's layouts have tiles.
  return space[1] != "1" or "T(" in layout


def integers(text: str) -> list[int]:
  """The numbers of a list with commas."""
  return [int(x) for x in text.split(",") if x]


def dims(type_: str) -> list[int]:
  """The sizes of the first array of a type."""
  return integers(re.search(r"\[([0-9,]*)\]", type_)[1])


def attribute(operation: Operation, pattern: str) -> str | None:
  """The first group of a pattern in an operation's attributes."""
  found = re.search(pattern, operation.attributes)
  return found[1] if found else None


def called(operation: Operation) -> list[str]:
  """The computations that an operation names, but for those of a `while`."""
  branches = attribute(operation, r"branch_computations=\{([^}]*)\}")
  if branches is not None:
    return re.findall(r"%?([\w.\-]+)", branches)
  return re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)",
                    operation.attributes)
