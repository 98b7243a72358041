"""Accelerators by name: memory and rates of each chip, as its maker's data sheet states them."""

import os
from typing import NamedTuple

# The environment's variable of the GiB of a host's memory that JAX pins at most for GPUs, and JAX's
# own default.
HOST_POOL = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
HOST_POOL_DEFAULT = 64
# JAX takes this share of a GPU's memory at its start: `command.call` asks for it. JAX's own default
# is 0.75. The CUDA context, cuDNN, cuBLAS and NCCL have what is left.
GPU_SHARE = 0.92


class Chip(NamedTuple):
  """One chip. No program exceeds its rates."""
  platform: str     # "gpu" or "tpu"
  memory: int       # bytes; of a TPU, those that its compiler has for a program
  flops: float      # products of bfloat16 a second, in floating-point operations
  bandwidth: float  # bytes of memory that are read or written a second
  network: float    # bytes a second that a chip sends to the others of its host or slice
  launch: float     # seconds that one kernel takes at least
  kinds: tuple[str, ...]  # JAX's names of it; those of smaller memory have the same rate of FLOPs
  host: float | None = None  # bytes a second to or from the host's memory; None: not published

  @property
  def usable(self) -> int:
    """Bytes that JAX takes of its memory."""
    return int(self.memory * GPU_SHARE) if self.platform == "gpu" else self.memory


_GIB = 2**30
# Sources: NVIDIA's data sheets of the SXM cards (products without sparsity; NVLink and PCIe in one
# direction), Google's pages of each TPU (cloud.google.com/tpu/docs). The memory of a v5e, v5p and
# v6e is what its compiler (jax 0.10.2) has for a program, as it says where one is too large. A
# kernel of 2 microseconds is what CUDA graphs reach. A TPU's program is one launch.
CHIPS = {
    "a100": Chip("gpu", 85_100_068_864, 312e12, 2.039e12, 300e9, 2e-6,
                 ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"), 32e9),
    "h100": Chip("gpu", 84_942_979_072, 989e12, 3.35e12, 450e9, 2e-6, ("NVIDIA H100 80GB HBM3",),
                 64e9),
    "h200": Chip("gpu", 151_397_597_184, 989e12, 4.8e12, 450e9, 2e-6, ("NVIDIA H200",), 64e9),
    "v4": Chip("tpu", 32 * _GIB, 275e12, 1.228e12, 300e9, 0.0, ("TPU v4",)),
    "v5e": Chip("tpu", int(15.75 * _GIB), 197e12, 0.819e12, 200e9, 0.0, ("TPU v5 lite",)),
    "v5p": Chip("tpu", int(95.74 * _GIB), 459e12, 2.765e12, 600e9, 0.0, ("TPU v5", "TPU v5p")),
    "v6e": Chip("tpu", int(31.25 * _GIB), 918e12, 1.638e12, 400e9, 0.0, ("TPU v6 lite",)),
}


def host_memory() -> int:
  """Bytes of this host's memory."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def of_kind(kind: str) -> Chip | None:
  """The chip that JAX calls `kind`; None where it is not in the table, as a CPU."""
  return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
