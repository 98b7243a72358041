"""Trips of a program's loops: those that the compiler states, or from counter, limit and step."""

from typing import NamedTuple

from s2d_jax.preflight.operations import Computations, Operation, attribute, called


class _Carried(NamedTuple):
  """One value that a loop carries."""
  body: str
  index: int


class _Affine(NamedTuple):
  """A scalar of the form `carried value + offset`, or a constant (no slot)."""
  slot: _Carried | None
  offset: int


class Loops:
  """The loops of a program."""

  def __init__(self, computations: Computations) -> None:
    self.by_name = {name: {operation.name: operation for operation in operations}
                    for name, operations in computations.items()}
    # Where a computation is called: constants are passed into loops and fusions.
    self.callers: dict[str, tuple[str, Operation]] = {}
    for name, operations in computations.items():
      for operation in operations:
        targets = called(operation) if operation.opcode == "fusion" else []
        if operation.opcode == "while":
          targets = _parts(operation)
        self.callers.update({target: (name, operation) for target in targets})

  def trips(self, computation: str, loop: Operation) -> int | None:
    """Trips of a `while` in a computation, or None where they are not known before it runs."""
    count = attribute(loop, r'known_trip_count":\{"n":"(\d+)"')
    if count is not None:
      return int(count)
    # The compiler of a TPU leaves the count out.
    condition, body = _parts(loop)
    compare = self._root(condition)
    direction = attribute(compare, r"direction=(\w+)")
    if compare.opcode != "compare" or direction is None:
      return None
    first, second = (self._affine(condition, name) for name in compare.operands)
    if first is None or second is None:
      return None
    if first.slot is None:
      first, second = second, first
      direction = direction.translate(str.maketrans("LG", "GL"))
    if first.slot is None or second.slot is not None:
      return None
    root = self._root(body)
    if root.opcode != "tuple":
      return None
    start = self._start(computation, loop, first.slot.index)
    following = self._affine(body, root.operands[first.slot.index])
    if start is None or following is None or following.slot != first.slot:
      return None
    return _count(start, following.offset, second.offset - first.offset, direction)

  def _root(self, computation: str) -> Operation:
    return next(o for o in self.by_name[computation].values() if o.is_root)

  def _start(self, computation: str, loop: Operation, index: int) -> int | None:
    """A carried value before the first trip."""
    carried = self.by_name[computation].get(loop.operands[0])
    if carried is None or carried.opcode != "tuple":
      return None
    found = self._affine(computation, carried.operands[index])
    return found.offset if found is not None and found.slot is None else None

  def _affine(self, computation: str, name: str) -> _Affine | None:
    """A scalar integer of a computation, or None where it is anything else."""
    operation = self.by_name[computation].get(name)
    if operation is None:
      return None
    opcode = operation.opcode
    if opcode == "constant":
      number = attribute(operation, r"^(-?\d+)\)")
      return None if number is None else _Affine(None, int(number))
    if opcode in ("copy", "bitcast", "convert"):
      return self._affine(computation, operation.operands[0])
    if opcode == "fusion":
      target = called(operation)[0]
      return self._affine(target, self._root(target).name)
    if opcode == "parameter" and computation in self.callers:
      # A fusion's: the operand of the same number.
      caller, user = self.callers[computation]
      number = attribute(operation, r"^(\d+)\)")
      if user.opcode == "fusion" and number is not None:
        return self._affine(caller, user.operands[int(number)])
    if opcode == "get-tuple-element":
      return self._element(computation, operation)
    if opcode in ("add", "subtract") and len(operation.operands) == 2:
      first, second = (self._affine(computation, operand) for operand in operation.operands)
      return _sum(first, second, -1 if opcode == "subtract" else 1)
    return None

  def _element(self, computation: str, operation: Operation) -> _Affine | None:
    """A scalar that a tuple holds: that of a loop, or the result of a fusion."""
    index = int(attribute(operation, r"index=(\d+)"))
    source = self.by_name[computation].get(operation.operands[0])
    if source is None:
      return None
    if source.opcode == "fusion":
      target = called(source)[0]
      root = self._root(target)
      return self._affine(target, root.operands[index]) if root.opcode == "tuple" else None
    if source.opcode != "parameter" or computation not in self.callers:
      return None
    caller, loop = self.callers[computation]
    if loop.opcode != "while":
      return None
    body = _parts(loop)[1]
    if not self._unchanged(body, index):
      return _Affine(_Carried(body, index), 0)
    carried = self.by_name[caller].get(loop.operands[0])
    if carried is None or carried.opcode != "tuple":
      return None
    return self._affine(caller, carried.operands[index])

  def _unchanged(self, body: str, index: int) -> bool:
    """Whether a loop hands a value on as it is."""
    root = self._root(body)
    if root.opcode != "tuple":
      return False
    operations = self.by_name[body]
    value = operations.get(root.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast"):
      value = operations.get(value.operands[0])
    return (value is not None and value.opcode == "get-tuple-element"
            and operations[value.operands[0]].opcode == "parameter"
            and attribute(value, r"index=(\d+)") == str(index))


def _parts(loop: Operation) -> tuple[str, str]:
  """The names of a loop's condition and of its body."""
  return (attribute(loop, r"condition=%?([\w.\-]+)"), attribute(loop, r"body=%?([\w.\-]+)"))


def _sum(first: _Affine | None, second: _Affine | None, sign: int) -> _Affine | None:
  """The sum or difference of two scalars, where at most one of them changes."""
  if first is None or second is None or (second.slot is not None and (first.slot or sign < 0)):
    return None
  return _Affine(first.slot or second.slot, first.offset + sign * second.offset)


def _count(start: int, step: int, limit: int, direction: str) -> int | None:
  """Trips of a loop that goes on while its counter is before the limit."""
  # Counting down is counting up with the other sign.
  if direction.startswith("G"):
    start, step, limit = -start, -step, -limit
  if step == 0 or (step < 0 and direction != "NE"):
    return None
  if direction in ("LE", "GE"):
    return max((limit - start) // step + 1, 0)
  if direction in ("LT", "GT"):
    return max(-(-(limit - start) // step), 0)
  if direction == "NE" and (limit - start) % step == 0:
    return max((limit - start) // step, 0)
  return None
