"""Kernels of our own on a GPU: how Pallas compiles them, with Triton."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import pallas as pl

try:
  from jax.experimental.pallas import triton
except ImportError:  # JAX 0.12 says that a later one will lack it; everything runs without
  triton = None


def available() -> bool:
  """Whether this JAX compiles such kernels."""
  return triton is not None


@contextlib.contextmanager
def without_warning() -> Iterator[None]:
  """Within, lowering a kernel does not warn that a later JAX may lack Triton."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    yield


def call(kernel: Callable[..., None], grid: tuple[int, ...], args: tuple[jax.Array, ...],
         results: tuple[Any, ...], name: str, *, warps: int = 4,
         in_place: dict[int, int] | None = None, interpret: bool = False) -> tuple[jax.Array, ...]:
  """The results of a kernel that sees whole arrays.

  Args:
    kernel: kernel(*references to the arguments, *references to the results).
    grid: numbers of its programs.
    args: arrays.
    results: arrays, or shapes, of which the results have the shape and type.
    name: in profiles.
    warps: of 32 threads each, for each program.
    in_place: argument -> the result that takes over its memory.
    interpret: for tests, on a device that is not a GPU.
  """
  return tuple(pl.pallas_call(
      kernel, grid=grid, out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
      input_output_aliases=in_place or {}, name=name, interpret=interpret,
      compiler_params=None if interpret else triton.CompilerParams(num_warps=warps))(*args))
