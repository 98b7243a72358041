"""Bytes of the device's memory that an operation reads and writes, at least.

Of an array that is only sliced the slices are counted, of an update in place the update. Arrays
that a fusion passes through, a library's scratch memory and on-chip arrays are not counted.
"""

import re
from collections.abc import Sequence

from s2d_jax.preflight import collectives
from s2d_jax.preflight.operations import (
  Computations,
  Operation,
  arrays,
  attribute,
  called,
  memory_bytes,
  outside_memory,
  type_bytes,
)

_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # the operand that is written
# A fusion computes these only for the elements that are read.
_ELEMENTS = {"abs", "add", "bitcast", "convert", "copy", "cosine", "divide", "exponential", "log",
             "logistic", "maximum", "minimum", "multiply", "negate", "power", "reduce", "reshape",
             "rsqrt", "select", "sine", "sqrt", "subtract", "tanh", "transpose"}
# Start and end of a TPU's collective, and memory that is reserved and not written.
_NO_TRAFFIC = {"AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone"}


class Traffic:
  """The bytes of fusions of a program."""

  def __init__(self, computations: Computations) -> None:
    self.computations = computations
    self.by_name = {name: {operation.name: operation for operation in operations}
                    for name, operations in computations.items()}
    self.users: dict[str, dict[str, list[Operation]]] = {}
    for name, operations in computations.items():
      users = self.users[name] = {}
      for operation in operations:
        for operand in set(operation.operands):
          users.setdefault(operand, []).append(operation)
    self._shares: dict[tuple[str, str], float] = {}

  def fusion(self, computation: str) -> float:
    """Bytes that a fused computation reads and writes, but for those of collectives in it."""
    read = sum(memory_bytes(parameter.type) * self._share(computation, parameter)
               for parameter in self.computations[computation]
               if parameter.opcode == "parameter")
    return read + self._written(computation)

  def _share(self, computation: str, array: Operation) -> float:
    """The share of an array that the operations of a computation read."""
    key = (computation, array.name)
    if key not in self._shares:
      self._shares[key] = self._new_share(computation, array)
    return self._shares[key]

  def _new_share(self, computation: str, array: Operation) -> float:
    if array.is_root:
      return float(array.opcode != "parameter")
    whole = type_bytes(array.type)
    if whole == 0:
      return 0.0
    users = self.users[computation].get(array.name, ())
    return min(sum(self._share_of_user(computation, array, user, whole) for user in users), 1.0)

  def _share_of_user(self, computation: str, array: Operation, user: Operation,
                     whole: float) -> float:
    first = user.operands[0] == array.name and array.name not in user.operands[1:]
    if user.opcode in _SLICES and first:
      return type_bytes(user.type) / whole
    if user.opcode in _UPDATES and first and self._in_place(computation, user):
      return 0.0
    if user.opcode in _ELEMENTS:
      return self._share(computation, user)
    if user.opcode == "fusion":
      (target, *_) = called(user)
      parameters = [o for o in self.computations[target] if o.opcode == "parameter"
                    and user.operands[int(attribute(o, r"^(\d+)\)"))] == array.name]
      return sum(self._share(target, parameter) for parameter in parameters)
    if user.opcode == "tuple" and user.is_root:
      return float(array.opcode != "parameter")
    return float(not _without_traffic(user))

  def _in_place(self, computation: str, update: Operation) -> bool:
    """Whether an update writes into an array that the fusion was called with."""
    source = update
    while source.opcode in _UPDATES or source.opcode == "bitcast":
      source = self.by_name[computation][source.operands[0]]
    return source.opcode == "parameter" and self._is_result(computation, update)

  def _is_result(self, computation: str, operation: Operation) -> bool:
    """Whether an operation is a result, or only becomes one by further updates."""
    if operation.is_root:
      return True
    users = self.users[computation].get(operation.name, [])
    return bool(users) and all(
        user.opcode in (*_UPDATES, "bitcast", "tuple") and self._is_result(computation, user)
        for user in users)

  def _written(self, computation: str) -> float:
    """Bytes that the results of a fused computation are written with."""
    found = 0.0
    for root in self.computations[computation]:
      if root.is_root:
        names = [root.name]
        if root.opcode == "tuple":
          names = root.operands
        found += sum(self._written_by(computation, self.by_name[computation][name])
                     for name in dict.fromkeys(names))
    return found

  def _written_by(self, computation: str, result: Operation) -> float:
    if result.opcode == "parameter" or _without_traffic(result):
      return 0.0
    if result.opcode == "custom-call":
      return sum(_results(result))
    size = memory_bytes(result.type)
    if result.opcode == "bitcast":
      source = self.by_name[computation][result.operands[0]]
      return min(size, self._written_by(computation, source)) if size else 0.0
    if result.opcode == "fusion":
      return min(size, self._written(called(result)[0]))
    if result.opcode in _UPDATES and self._in_place(computation, result):
      update = self.by_name[computation][result.operands[_UPDATES[result.opcode]]]
      source = self.by_name[computation][result.operands[0]]
      earlier = self._written_by(computation, source) if source.opcode in _UPDATES else 0.0
      return min(size, type_bytes(update.type) + earlier)
    return size


def of(operation: Operation, operands: Sequence[str]) -> float:
  """Bytes that an operation outside of fusions moves; `operands`: the types of its operands."""
  opcode = operation.opcode.removesuffix("-start")
  if operation.opcode == "custom-call":
    return _custom_call(operation, operands)
  if opcode in _SLICES and operands:
    # An asynchronous start's result holds its operands first.
    before = len(operands) if operation.opcode != opcode else 0
    size, layout = arrays(operation.type)[before]
    return min(size, memory_bytes(operands[0])) + (0.0 if outside_memory(layout) else size)
  if opcode in _UPDATES:
    return 2 * memory_bytes(operands[_UPDATES[opcode]])
  if operation.opcode.endswith("-start"):
    return memory_bytes(operation.type)
  names = dict(zip(operation.operands, operands, strict=False))
  return memory_bytes(operation.type) + sum(map(memory_bytes, names.values()))


def of_collective(operation: Operation, operands: Sequence[str]) -> float:
  """Bytes that a collective in a fusion moves: its operands, and what it gathers."""
  read = sum(map(memory_bytes, operands))
  return read + (memory_bytes(operation.type) if operation.opcode == "all-gather" else 0.0)


def _custom_call(operation: Operation, operands: Sequence[str]) -> float:
  """Bytes of a library's kernel: operands and results, without its scratch memory."""
  if _without_traffic(operation):
    return 0.0
  results = _results(operation)
  names = dict(zip(operation.operands, operands, strict=False))
  # A kernel that writes into its operand need not touch all of it; a product adds to all of it.
  if "__cublas" not in operation.attributes:
    for output, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", operation.attributes):
      results[int(output or 0)] = 0.0
      names.pop(operation.operands[int(operand)], None)
  return sum(results) + sum(map(memory_bytes, names.values()))


def _results(operation: Operation) -> list[float]:
  """Bytes of each result of a library's kernel."""
  if not operation.type.startswith("("):
    return [memory_bytes(operation.type)]
  found = [0.0 if outside_memory(layout) else size for size, layout in arrays(operation.type)]
  # The scratch memory of cuBLAS and cuDNN is the last result, of bytes.
  library = re.search(r'custom_call_target="__cu(blas|dnn)', operation.attributes)
  scratch = operation.type.rpartition(" ")[2].startswith(("s8[", "u8["))
  return found[:-1] if library and scratch else found


def _without_traffic(operation: Operation) -> bool:
  """Whether bytes are counted elsewhere, or there are none."""
  return (operation.opcode.startswith(collectives.OPCODES)
          or attribute(operation, r'custom_call_target="([^"]*)"') in _NO_TRAFFIC)
