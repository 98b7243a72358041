"""Bytes that a device sends to others in a collective operation."""

import math
import re
from collections.abc import Sequence

from s2d_jax.errors import InputError
from s2d_jax.preflight.operations import Operation, attribute, integers, type_bytes

OPCODES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
           "ragged-all-to-all")


def _group_size(operation: Operation) -> int:
  """Devices that take part in a collective together."""
  # Three spellings: {{0,1},{2,3}}; [2,2]<=[4], two groups of two; mesh['a'=2,'b'=2] {'b'}, where
  # the order of the devices may stand before the axes.
  listed = attribute(operation, r"replica_groups=\{\{([0-9,]*)\}")
  if listed is not None:
    return len(integers(listed))
  sizes = attribute(operation, r"replica_groups=\[([0-9,]*)\]")
  if sizes is not None:
    return integers(sizes)[-1]
  named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}",
                    operation.attributes)
  if named is None:
    raise InputError(f"the devices of a collective are not understood: {operation.attributes}")
  axes = dict(re.findall(r"('[^']*')=(\d+)", named[1]))
  # A part of an axis is written 'a':(1)2: two devices of it.
  return math.prod(int(part or axes[axis])
                   for axis, part in re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", named[2]))


def sent(operation: Operation, operands: Sequence[str], part: float | None = None) -> float:
  """Bytes that a device sends in a collective with operands of these types, in a ring.

  Args:
    part: bytes of an all-reduce's result that a device keeps, where it is not the whole result.
  """
  opcode = operation.opcode.removesuffix("-start")
  size = sum(map(type_bytes, operands))
  if opcode == "collective-permute":
    return size
  n = _group_size(operation)
  if opcode == "all-gather":  # each device passes on every part but one
    return size * (n - 1)
  if opcode == "all-reduce":
    # A reduce-scatter, which leaves 1 / n of the sum on each device, and an all-gather of the other
    # parts that the device needs.
    return size * (n - 1) / n + max((size if part is None else part) - size / n, 0)
  return size * (n - 1) / n
