"""FLOPs of products: of library calls and of attention kernels by formula."""

import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from s2d_jax.preflight.operations import Operation, attribute, dims, integers


def of(operation: Operation, operands: Sequence[str]) -> float:
  """FLOPs of a `dot`, a `convolution` or a custom call with operands of these types; else 0."""
  if operation.opcode == "custom-call":
    target = attribute(operation, r'custom_call_target="([^"]*)"') or ""
    return _library_flops(target, operation, operands)
  if operation.opcode == "convolution":
    return _convolution_flops(operation, dims(operands[0]), dims(operands[1]))
  if operation.opcode == "dot":
    lhs = dims(operands[0])
    over = integers(attribute(operation, r"lhs_contracting_dims=\{([0-9,]*)\}") or "")
    return 2.0 * math.prod(dims(operation.type)) * math.prod(lhs[i] for i in over)
  return 0.0


def _library_flops(target: str, operation: Operation, operands: Sequence[str]) -> float:
  """FLOPs of a custom call whose target is a product or an attention kernel; else 0."""
  if not operands or not operands[0]:
    return 0.0
  first = dims(operands[0])
  if "cublas" in target or "matmul" in target:
    over = attribute(operation, r'lhs_contracting_dimensions":\["(\d+)"')
    return 2.0 * math.prod(dims(operation.type)) * first[int(over) if over else -1]
  if "fmha" in target:  # queries and keys are [B, T, heads, H] or [B, heads, T, H]
    # Forward q·k and p·v; backward these are formed again in part: five products.
    products = 5 if "Backward" in target else 2
    causal = 0.5 if "CAUSAL" in operation.attributes else 1.0
    return 2.0 * products * causal * math.prod(first) * max(dims(operands[1])[1:3])
  if target == "tpu_custom_call":
    return _splash_flops(operation, operands)
  return 0.0


# Custom calls without products: XLA's own marks, such as AllocateBuffer or TopK, by a part of their
# names those that sort or draw random bits, and the Pallas kernels of this package for decoding.
_NO_PRODUCTS = re.compile(r"[A-Z][A-Za-z0-9]*|.*(?:[Ss]ort|top_?k|threefry|rng).*|decode_\w+")


def is_unknown(target: str, flops: float) -> bool:
  """Whether a custom call may hold products that no formula here counts.

  Args:
    target: of the custom call.
    flops: that the formulas found in it.
  """
  return flops == 0 and not _NO_PRODUCTS.fullmatch(target)


# Products of each of splash's kernels: q·k and p·v forward; q·k, do·v, ds·k for the queries'
# gradient; q·k, p·do, do·v, ds·q for that of keys and values (and ds·k where it is in one kernel).
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def _splash_flops(operation: Operation, operands: Sequence[str]) -> float:
  """FLOPs of JAX's causal attention kernel on a TPU."""
  for name, products in _SPLASH.items():
    if name in operation.attributes:
      # Queries are the largest array of [..., heads, T, H]; half of the scores are in the past.
      queries = max((dims(type_) for type_ in operands if len(dims(type_)) >= 3),
                    key=math.prod)
      return 2.0 * products * 0.5 * math.prod(queries) * queries[-2]
  return 0.0


def _convolution_flops(operation: Operation, lhs: list[int], rhs: list[int]) -> float:
  """FLOPs of a convolution: products of positions that exist, as a padded window has others."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.attributes)
  output = dims(operation.type)
  found = 2.0 * output[labels[3].index("b")] * output[labels[3].index("f")]
  found *= rhs[labels[2].index("i")]
  window = attribute(operation, r"window=\{([^}]*)\}") or ""

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
  groups = attribute(operation, r"batch_group_count=(\d+)")
  return found / int(groups or 1)


@functools.cache
def _valid_positions(size: int, window: int, outputs: int, stride: int, pad: int, spread: int,
                     kernel_spread: int) -> int:
  """(output, window) pairs of one spatial axis that read an input and not padding."""
  at = (np.arange(outputs)[:, None] * stride - pad + np.arange(window)[None] * kernel_spread)
  return int(np.sum((at % spread == 0) & (at >= 0) & (at // spread < size)))
