"""Reads a compiled program: FLOPs, bytes and messages of each kernel, with loops multiplied in.

The text is that of an optimized program for a CPU, GPU or TPU, of one device:

  found = hlo.kernels(compiled.as_text())
  hlo.total(found).flops

FLOPs are those of products: of `dot`, of the convolution that a TPU makes of it, and, by formula,
of library calls and of attention kernels. Slices and updates in place count the bytes they touch.
An attention kernel counts its whole cache, of which it may read only each row's own tokens.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from s2d_jax.preflight import collectives, products, traffic
from s2d_jax.preflight.loops import Loops
from s2d_jax.preflight.operations import (
  Computations,
  Operation,
  attribute,
  called,
  parse,
  type_bytes,
)

# Operations that neither compute nor copy.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all",
         "opt-barrier", "partition-id", "replica-id", "add-dependency", "iota"}


class Kernel(NamedTuple):
  """One operation, or the sum of several; all but `opcode` and `source` include `count`."""
  opcode: str              # or the target of a custom call, or the name of a Pallas kernel
  source: str              # where the traced program asked for it
  count: int               # times that it runs
  flops: float             # of products
  bytes: float             # of the device's memory, read and written
  collective_bytes: float  # that the device sends to others
  unknown: frozenset[str] = frozenset()  # targets of custom calls whose products are not counted


def kernels(text: str, unknown_trips: int = 1) -> list[Kernel]:
  """The kernels that a program runs, in order, those of loops multiplied by their trips.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: of a loop whose trips are not known before it runs, as those over tokens and over
      blocks. Inside of such a loop another one counts once.
  """
  computations, entry = parse(text)
  return list(Program(computations).walk(entry, 1, unknown_trips))


def total(found: Iterable[Kernel]) -> Kernel:
  """The sum of kernels."""
  found = list(found)
  return Kernel("total", "", sum(kernel.count for kernel in found),
                sum((kernel.flops for kernel in found), 0.0),
                sum((kernel.bytes for kernel in found), 0.0),
                sum((kernel.collective_bytes for kernel in found), 0.0),
                frozenset().union(*(kernel.unknown for kernel in found)))


class Program:
  """The computations of a program, with the trips of its loops and the bytes of its kernels."""

  def __init__(self, computations: Computations) -> None:
    self.computations = computations
    self.loops = Loops(computations)
    self.traffic = traffic.Traffic(computations)
    self.types = {(name, operation.name): operation.type
                  for name, operations in computations.items() for operation in operations}

  def walk(self, computation: str, times: int, unknown_trips: int) -> Iterator[Kernel]:
    """Yields the kernels of a computation that runs `times` times."""
    channels: set[str] = set()
    for operation in self.computations[computation]:
      if operation.opcode in _FREE or operation.opcode.endswith(("-done", "-update")):
        continue
      targets = called(operation)
      if operation.opcode == "while":
        trips = self.loops.trips(computation, operation)
        body = attribute(operation, r"body=%?([\w.\-]+)")
        if trips is None:
          yield from self.walk(body, times * unknown_trips, 1)
        else:
          yield from self.walk(body, times * trips, unknown_trips)
      elif operation.opcode in ("call", "async-start"):
        yield from self.walk(targets[0], times, unknown_trips)
      elif operation.opcode == "conditional":
        # One branch runs; the one with most to do is counted.
        branches = [list(self.walk(name, times, unknown_trips)) for name in targets]
        yield from max(branches, key=lambda branch: total(branch)[3:5])
      else:
        yield self.kernel(computation, operation, times, channels)

  def kernel(self, computation: str, operation: Operation, times: int,
             channels: set[str]) -> Kernel:
    """The Kernel of one operation that is neither a loop nor a call.

    Args:
      channels: of the collectives that fusions of this computation began; they are added here.
    """
    opcode = operation.opcode
    operands = self.operand_types(computation, operation)
    flops = 0.0
    sent = 0.0
    if opcode in ("fusion", "fusion-start"):  # a GPU may run one beside other kernels
      (target, *_) = called(operation)
      flops = self.products(target)
      moved = self.traffic.fusion(target)
      for sent_bytes, moved_bytes in self.messages(target, channels):
        sent += sent_bytes
        moved += moved_bytes
    else:
      flops = products.of(operation, operands)
      moved = traffic.of(operation, operands)
    unknown: frozenset[str] = frozenset()
    if opcode == "custom-call":
      opcode = attribute(operation, r'custom_call_target="([^"]*)"')
      if opcode == "__gpu$xla.gpu.triton":  # a Pallas kernel, which has a name
        opcode = attribute(operation, r'\bname = "(\w+)"') or opcode
      if products.is_unknown(opcode, flops):
        unknown = frozenset([opcode])
    elif opcode.startswith(collectives.OPCODES):
      sent = collectives.sent(operation, operands)
    source = attribute(operation, r'op_name="([^"]*)"') or ""
    return Kernel(opcode, source, times, flops * times, moved * times, sent * times,
                  unknown)

  def operand_types(self, computation: str, operation: Operation) -> list[str]:
    """The types of an operation's operands."""
    return [self.types.get((computation, name), "") for name in operation.operands]

  def products(self, computation: str) -> float:
    """FLOPs of the products of a fused computation."""
    found = 0.0
    for operation in self.computations[computation]:
      if operation.opcode == "fusion":
        found += sum(map(self.products, called(operation)))
      else:
        found += products.of(operation, self.operand_types(computation, operation))
    return found

  def messages(self, computation: str, channels: set[str]) -> Iterator[tuple[float, float]]:
    """Yields the bytes (sent, moved) of each collective that begins in a fused computation.

    A TPU lists a collective again in each fusion that it runs beside, on one channel. Its
    reduce-scatter is a fusion of an all-reduce with the slice that a device keeps.
    """
    for operation in self.computations[computation]:
      if operation.opcode == "fusion":
        for target in called(operation):
          yield from self.messages(target, channels)
      elif (operation.opcode.startswith(collectives.OPCODES)
            and not operation.opcode.endswith("-done")):
        channel = attribute(operation, r"channel_id=(\d+)") or f"{computation} {operation.name}"
        if channel not in channels:
          channels.add(channel)
          operands = self.operand_types(computation, operation)
          yield (collectives.sent(operation, operands, self.part(computation, operation)),
                 traffic.of_collective(operation, operands))

  def part(self, computation: str, operation: Operation) -> float | None:
    """Bytes of an operation's result that are used, where that is one slice of it."""
    uses = [other for other in self.computations[computation] if operation.name in other.operands]
    if (len(uses) == 1 and uses[0].opcode == "dynamic-slice"
        and uses[0].operands.index(operation.name) == 0):  # else it is an index of the slice
      return type_bytes(uses[0].type)
    return None
