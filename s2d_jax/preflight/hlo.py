"""Reads a compiled program: FLOPs, bytes and messages of each kernel, with loops multiplied in.

The text is that of an optimized program for a CPU, GPU or TPU, of one device:

  found = hlo.kernels(compiled.as_text())
  hlo.total(found).flops

FLOPs are those of products: of `dot`, of the convolution that a TPU makes of it, and, by formula,
of library calls and of attention kernels. Slices and updates in place count the bytes they touch.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2,
          "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
# Operations that neither compute nor copy.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all",
         "opt-barrier", "partition-id", "replica-id", "add-dependency", "iota"}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
                "ragged-all-to-all")
_SLICES = {"dynamic-slice", "slice", "gather"}


class Operation(NamedTuple):
  """One line of a program."""
  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str  # the line from its operands on
  is_root: bool


class Kernel(NamedTuple):
  """One operation, or the sum of several; all but `opcode` and `source` include `count`."""
  opcode: str              # or the target of a custom call
  source: str              # where the traced program asked for it
  count: int               # times that it runs
  flops: float             # of products
  bytes: float             # of the device's memory, read and written
  collective_bytes: float  # that the device sends to others


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


def type_bytes(type_: str) -> float:
  """Bytes of an array's type, or of all arrays of a tuple's."""
  return sum(_BYTES.get(kind, 0) * math.prod(_integers(dims))
             for kind, dims in re.findall(r"([a-z]\w*)\[([0-9,]*)\]", type_))


def _integers(text: str) -> list[int]:
  return [int(x) for x in text.split(",") if x]


def _dims(type_: str) -> list[int]:
  """The sizes of the first array of a type."""
  return _integers(re.search(r"\[([0-9,]*)\]", type_)[1])


def _attribute(operation: Operation, pattern: str) -> str | None:
  found = re.search(pattern, operation.attributes)
  return found[1] if found else None


def kernels(text: str, unknown_trips: int = 1) -> list[Kernel]:
  """The kernels that a program runs, in order, those of loops multiplied by their trips.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: of a loop whose trips the compiler does not know. 1 shows a single step of a
      loop that decodes.
  """
  computations, entry = parse(text)
  return list(_Program(computations, unknown_trips).walk(entry, 1))


def total(found: Iterable[Kernel]) -> Kernel:
  """The sum of kernels."""
  numbers = [kernel[2:] for kernel in found]
  return Kernel("total", "", *(sum(column) for column in zip(*numbers, strict=True)) if numbers
                else (0, 0.0, 0.0, 0.0))


class _Program:
  """Walks the computations of a program."""

  def __init__(self, computations: Computations, unknown_trips: int) -> None:
    self.computations = computations
    self.unknown_trips = unknown_trips
    self.types = {(name, operation.name): operation.type
                  for name, operations in computations.items() for operation in operations}

  def walk(self, computation: str, times: int) -> Iterator[Kernel]:
    """Yields the kernels of a computation that runs `times` times."""
    for operation in self.computations[computation]:
      if operation.opcode in _FREE or operation.opcode.endswith(("-done", "-update")):
        continue
      called = self.called(operation)
      if operation.opcode == "while":
        body = _attribute(operation, r"body=%?([\w.\-]+)")
        yield from self.walk(body, times * self.trips(operation))
      elif operation.opcode in ("call", "async-start"):
        yield from self.walk(called[0], times)
      elif operation.opcode == "conditional":
        # One branch runs; the one with most to do is counted.
        branches = [list(self.walk(name, times)) for name in called]
        yield from max(branches, key=lambda branch: total(branch)[3:5])
      else:
        yield self.kernel(computation, operation, called, times)

  def called(self, operation: Operation) -> list[str]:
    """The computations that an operation names."""
    branches = _attribute(operation, r"branch_computations=\{([^}]*)\}")
    if branches is not None:
      return re.findall(r"%?([\w.\-]+)", branches)
    return re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)",
                      operation.attributes)

  def trips(self, loop: Operation) -> int:
    """Trips of a `while`: known, or the one constant that its condition compares with."""
    count = _attribute(loop, r'known_trip_count":\{"n":"(\d+)"')
    if count is not None:
      return int(count)
    # The compiler of a TPU leaves the count out and keeps a loop that counts up from 0.
    condition = self.computations[_attribute(loop, r"condition=%?([\w.\-]+)")]
    below = [o for o in condition if o.opcode == "compare" and "direction=LT" in o.attributes]
    others = [o for o in condition if o.opcode not in _FREE | {"compare"}]
    limits = [o for o in condition if o.opcode == "constant" and below
              and o.name in below[0].operands]
    if len(below) == 1 and len(limits) == 1 and not others:
      return int(re.match(r"(\d+)", limits[0].attributes)[1])
    return self.unknown_trips

  def kernel(self, computation: str, operation: Operation, called: list[str],
             times: int) -> Kernel:
    """The Kernel of one operation that is neither a loop nor a call."""
    opcode = operation.opcode
    operands = [self.types.get((computation, name), "") for name in operation.operands]
    flops = 0.0
    sent = 0.0
    if opcode.startswith("fusion") and called:
      flops = sum(self.products(name) for name in called)
      moved = self.fusion_bytes(called[0])
    else:
      moved = _moved(opcode, operation.type, operands)
    if opcode in ("dot", "convolution"):
      flops = self.product(computation, operation)
    elif opcode == "custom-call":
      opcode = _attribute(operation, r'custom_call_target="([^"]*)"')
      flops = _library_flops(opcode, operation, operands)
    elif opcode.startswith(_COLLECTIVES):
      sent = _sent(opcode.removesuffix("-start"), operation, operands)
    source = _attribute(operation, r'op_name="([^"]*)"') or ""
    return Kernel(opcode, source, times, flops * times, moved * times, sent * times)

  def products(self, computation: str) -> float:
    """FLOPs of the products of a fused computation."""
    found = 0.0
    for operation in self.computations[computation]:
      if operation.opcode in ("dot", "convolution"):
        found += self.product(computation, operation)
      elif operation.opcode == "fusion":
        found += sum(map(self.products, self.called(operation)))
    return found

  def product(self, computation: str, operation: Operation) -> float:
    """FLOPs of a `dot` or a `convolution`."""
    lhs, rhs = (_dims(self.types[computation, name]) for name in operation.operands[:2])
    if operation.opcode == "convolution":
      return _convolution_flops(operation, lhs, rhs)
    over = _integers(_attribute(operation, r"lhs_contracting_dims=\{([0-9,]*)\}") or "")
    return 2.0 * math.prod(_dims(operation.type)) * math.prod(lhs[i] for i in over)

  def fusion_bytes(self, computation: str) -> float:
    """Bytes that a fused computation reads and writes."""
    operations = self.computations[computation]
    by_name = {operation.name: operation for operation in operations}
    read = 0.0
    for parameter in operations:
      if parameter.opcode == "parameter":
        users = [o for o in operations if parameter.name in o.operands]
        read += self.read_bytes(computation, parameter, users)
    roots = [operation for operation in operations if operation.is_root]
    if roots and roots[0].opcode == "tuple":
      roots = [by_name[name] for name in roots[0].operands]
    return read + sum(self.written_bytes(computation, root, by_name) for root in roots)

  def read_bytes(self, computation: str, parameter: Operation,
                 users: Sequence[Operation]) -> float:
    """Bytes of a fusion's parameter that its users read."""
    # A parameter that is only sliced is not read whole; one that is updated is not read at all.
    first = all(user.operands[0] == parameter.name for user in users)
    opcodes = {user.opcode for user in users}
    if first and opcodes and opcodes <= _SLICES:
      return sum(type_bytes(user.type) for user in users)
    if first and opcodes and opcodes <= {"dynamic-update-slice", "scatter"}:
      return 0.0
    return type_bytes(parameter.type)

  def written_bytes(self, computation: str, root: Operation,
                    by_name: dict[str, Operation]) -> float:
    """Bytes that a fusion's result is written with: of an update in place the updated part."""
    while root.opcode == "bitcast" and root.operands[0] in by_name:
      root = by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
      return type_bytes(self.types[computation, root.operands[1]])
    if root.opcode == "scatter":
      return type_bytes(self.types[computation, root.operands[-1]])
    return type_bytes(root.type)


def _moved(opcode: str, type_: str, operands: Sequence[str]) -> float:
  """Bytes that an operation outside of fusions reads and writes."""
  if opcode in _SLICES:
    return 2 * type_bytes(type_)
  if opcode in ("dynamic-update-slice", "scatter"):
    return 2 * type_bytes(operands[1 if opcode == "dynamic-update-slice" else -1])
  # The result of an asynchronous start holds its operands.
  if opcode.endswith("-start"):
    return type_bytes(type_)
  return type_bytes(type_) + sum(map(type_bytes, operands))


def _group_size(operation: Operation) -> int:
  """Devices that take part in a collective together."""
  # Three spellings: {{0,1},{2,3}}; [2,2]<=[4], two groups of two; mesh['a'=2,'b'=2] {'b'}, where
  # the order of the devices may stand before the axes.
  listed = _attribute(operation, r"replica_groups=\{\{([0-9,]*)\}")
  if listed is not None:
    return len(_integers(listed))
  sizes = _attribute(operation, r"replica_groups=\[([0-9,]*)\]")
  if sizes is not None:
    return _integers(sizes)[-1]
  named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}",
                    operation.attributes)
  if named is None:
    raise ValueError(f"the devices of a collective are not understood: {operation.attributes}")
  axes = dict(re.findall(r"('[^']*')=(\d+)", named[1]))
  # A part of an axis is written 'a':(1)2: two devices of it.
  return math.prod(int(part or axes[axis])
                   for axis, part in re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", named[2]))


def _sent(opcode: str, operation: Operation, operands: Sequence[str]) -> float:
  """Bytes that a device sends in a collective, by the ring algorithm."""
  size = sum(map(type_bytes, operands))
  if opcode == "collective-permute":
    return size
  n = _group_size(operation)
  if opcode == "all-gather":  # each device passes on every part but one
    return size * (n - 1)
  if opcode == "all-reduce":  # a reduce-scatter and an all-gather
    return 2 * size * (n - 1) / n
  return size * (n - 1) / n


def _library_flops(target: str, operation: Operation, operands: Sequence[str]) -> float:
  """FLOPs of a custom call whose target is a product or an attention kernel; else 0."""
  if not operands:
    return 0.0
  first = _dims(operands[0])
  if "cublas" in target or "matmul" in target:
    over = _attribute(operation, r'lhs_contracting_dimensions":\["(\d+)"')
    return 2.0 * math.prod(_dims(operation.type)) * first[int(over) if over else -1]
  if "fmha" in target:  # queries and keys are [B, T, heads, H] or [B, heads, T, H]
    # Forward q·k and p·v; backward these are formed again in part: five products.
    products = 5 if "Backward" in target else 2
    causal = 0.5 if "CAUSAL" in operation.attributes else 1.0
    return 2.0 * products * causal * math.prod(first) * max(_dims(operands[1])[1:3])
  if target == "tpu_custom_call":
    return _splash_flops(operation, operands)
  return 0.0


# Products of each of splash's kernels: q·k and p·v forward; q·k, do·v, ds·k for the queries'
# gradient; q·k, p·do, do·v, ds·q for that of keys and values (and ds·k where it is in one kernel).
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def _splash_flops(operation: Operation, operands: Sequence[str]) -> float:
  """FLOPs of JAX's causal attention kernel on a TPU."""
  for name, products in _SPLASH.items():
    if name in operation.attributes:
      # Queries are the largest array of [..., heads, T, H]; half of the scores are in the past.
      queries = max((_dims(type_) for type_ in operands if len(_dims(type_)) >= 3),
                    key=math.prod)
      return 2.0 * products * 0.5 * math.prod(queries) * queries[-2]
  return 0.0


def _convolution_flops(operation: Operation, lhs: list[int], rhs: list[int]) -> float:
  """FLOPs of a convolution: products of positions that exist, as a padded window has others."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.attributes)
  output = _dims(operation.type)
  found = 2.0 * output[labels[3].index("b")] * output[labels[3].index("f")]
  found *= rhs[labels[2].index("i")]
  window = _attribute(operation, r"window=\{([^}]*)\}") or ""

  def sizes(key: str, default: str) -> list[str]:
    text = re.search(rf"(?<!\w){key}=(\S+)", window)
    return text[1].split("x") if text else [default] * len(labels[1])

  for i, (stride, pad, spread, kernel_spread) in enumerate(zip(
      sizes("stride", "1"), sizes("pad", "0_0"), sizes("lhs_dilate", "1"),
      sizes("rhs_dilate", "1"), strict=False)):
    if str(i) in labels[1]:
      found *= _valid_positions(
          lhs[labels[1].index(str(i))], rhs[labels[2].index(str(i))],
          output[labels[3].index(str(i))], int(stride), int(pad.split("_")[0]), int(spread),
          int(kernel_spread))
  groups = _attribute(operation, r"batch_group_count=(\d+)")
  return found / int(groups or 1)


@functools.cache
def _valid_positions(size: int, window: int, outputs: int, stride: int, pad: int, spread: int,
                     kernel_spread: int) -> int:
  """(output, window) pairs of one spatial axis that read an input and not padding."""
  at = (np.arange(outputs)[:, None] * stride - pad + np.arange(window)[None] * kernel_spread)
  return int(np.sum((at % spread == 0) & (at >= 0) & (at // spread < size)))
