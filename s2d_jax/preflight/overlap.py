"""Which messages of a GPU's program are under way while it computes products.

The text of a compiled program lists operations in the order in which they are launched. A message
begins at its `-start`, and the device waits for it at its `-done`. A TPU's messages are parts of
fusions, and none is found here.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from s2d_jax.preflight import collectives, hlo
from s2d_jax.preflight.operations import Operation, attribute, parse


class Message(NamedTuple):
  """One collective operation."""
  opcode: str    # as "all-gather"
  source: str    # where the traced program asked for it
  bytes: float   # that a device sends, in all trips of its loop
  flops: float   # of products between its start and its end, in one trip; 0 where the device waits
  looped: bool   # whether a loop has it


def messages(text: str) -> list[Message]:
  """The messages of `compiled.as_text()`; loops whose trips are unknown count once."""
  computations, entry = parse(text)
  return list(_walk(hlo.Program(computations), entry, 1, looped=False))


def share(found: Iterable[Message]) -> float:
  """The share of the messages' bytes that has products beside it."""
  found = list(found)
  sent = sum(message.bytes for message in found)
  return sum(message.bytes for message in found if message.flops) / sent if sent else 1.0


def _walk(program: hlo.Program, computation: str, times: int, looped: bool) -> Iterator[Message]:
  """Yields the messages of a computation that runs `times` times, in the order of their ends."""
  flops = 0.0  # of all products so far
  begun: dict[str, tuple[Operation, float]] = {}
  for operation in program.computations[computation]:
    if operation.opcode == "while":
      trips = program.loops.trips(computation, operation) or 1
      body = attribute(operation, r"body=%?([\w.\-]+)")
      yield from _walk(program, body, times * trips, looped=True)
    elif not operation.opcode.startswith(collectives.OPCODES):
      if operation.opcode in ("fusion", "fusion-start", "dot", "convolution", "custom-call"):
        flops += program.kernel(computation, operation, 1, set()).flops
    elif operation.opcode.endswith("-start"):
      begun[operation.name] = operation, flops
    else:
      # One without a start is waited for at once.
      start, before = begun.pop(operation.operands[0], (operation, flops))
      sent = collectives.sent(start, program.operand_types(computation, start))
      yield Message(start.opcode.removesuffix("-start"),
                    attribute(start, r'op_name="([^"]*)"') or "", sent * times, flops - before,
                    looped)
