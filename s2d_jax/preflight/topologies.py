"""Devices that are not here: chips by name, their memory and rates, and what compiles for them.

A program compiled for such devices can be read and cannot run.

  h100  h200  a100             one card; h100:8 is a host of eight, h100:64 eight such hosts
  v4  v5e  v5p  v6e            a TPU and its slice: v5e:4x4, v5p:2x2x4
"""

import importlib.metadata
import importlib.resources
import os
import re
from typing import NamedTuple

import jax

CARDS_PER_HOST = 8


class Chip(NamedTuple):
  """One chip. The rates are those of its maker's data sheet, which no program exceeds."""
  platform: str     # "gpu" or "tpu"
  memory: int       # bytes
  flops: float      # products of bfloat16 a second, in floating-point operations
  bandwidth: float  # bytes of memory that are read or written a second
  network: float    # bytes a second that a chip sends to the others of its host or slice
  launch: float     # seconds that one kernel takes at least


_GIB = 2**30
# Sources: NVIDIA's data sheets of the SXM cards (products without sparsity; NVLink in one
# direction), Google's pages of each TPU (cloud.google.com/tpu/docs). A kernel of 2 microseconds is
# what CUDA graphs reach. A TPU's program is one launch.
CHIPS = {
    "a100": Chip("gpu", 85_100_068_864, 312e12, 2.039e12, 300e9, 2e-6),
    "h100": Chip("gpu", 84_942_979_072, 989e12, 3.35e12, 450e9, 2e-6),
    "h200": Chip("gpu", 151_397_597_184, 989e12, 4.8e12, 450e9, 2e-6),
    "v4": Chip("tpu", 32 * _GIB, 275e12, 1.228e12, 300e9, 0.0),
    "v5e": Chip("tpu", 16 * _GIB, 197e12, 0.819e12, 200e9, 0.0),
    "v5p": Chip("tpu", 95 * _GIB, 459e12, 2.765e12, 600e9, 0.0),
    "v6e": Chip("tpu", 32 * _GIB, 918e12, 1.638e12, 400e9, 0.0),
}
# A network card of 400 Gbit/s for each GPU, which hosts of cards usually have.
NETWORK_BETWEEN_HOSTS = 50e9

# XLA asks for these when it compiles for a GPU: the plugin, its compiler, ptxas and cuDNN.
_GPU_PACKAGES = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12",
                 "nvidia-cudnn-cu12")


def chip(topology: str) -> Chip:
  """The chip of a topology's name.

  Raises:
    ValueError: the name is unknown.
  """
  name, shape = _parse(topology)
  found = CHIPS[name]
  # Between hosts the slowest link decides.
  if found.platform == "gpu" and shape > CARDS_PER_HOST:
    return found._replace(network=NETWORK_BETWEEN_HOSTS)
  return found


def devices(topology: str) -> list[jax.Device]:
  """The described devices of a topology, for a mesh that programs are compiled for.

  Call it before anything uses a device: this process then has CPU devices alone.

  Raises:
    ValueError: the name is unknown, or a package that compiles for it is not installed.
  """
  name, count = _parse(topology)
  is_gpu = CHIPS[name].platform == "gpu"
  if is_gpu:
    _require(topology, _GPU_PACKAGES, "gpu-compile")
  else:
    _require(topology, ("libtpu",), "tpu")
  # Nothing runs here, and an installed plugin would look for a driver.
  jax.config.update("jax_platforms", "cpu")
  # A cached program cannot be read back without a chip: it would be a warning each.
  jax.config.update("jax_enable_compilation_cache", False)
  return _gpus(name, count) if is_gpu else _tpus(topology)


def _parse(topology: str) -> tuple[str, int]:
  """(chip, number of chips) of a topology's name."""
  name, _, shape = topology.partition(":")
  gpus = [chip for chip, of in CHIPS.items() if of.platform == "gpu"]
  if name in gpus and (topology == name or re.fullmatch(r"[1-9]\d*", shape)):
    count = int(shape or 1)
    if count <= CARDS_PER_HOST or count % CARDS_PER_HOST == 0:
      return name, count
  if name in CHIPS and name not in gpus and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    count = 1
    for size in shape.split("x"):
      count *= int(size)
    return name, count
  tpus = [chip for chip in CHIPS if chip not in gpus]
  raise ValueError(
      f"the topology {topology!r} is unknown: name a card ({', '.join(gpus)}), several of them as "
      f"h100:8 (up to {CARDS_PER_HOST}, or a multiple of that), or a slice of {', '.join(tpus)} as "
      "v5e:4x4 or v5p:2x2x4.")


def _require(topology: str, packages: tuple[str, ...], extra: str) -> None:
  """Raises ValueError unless the packages are installed, which `extra` brings."""
  for package in packages:
    try:
      importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      raise ValueError(
          f"the topology {topology} needs the package {package}, which is not installed: in an "
          f"environment of its own, pip install 's2d_jax[{extra}]'.") from None


def _tpus(topology: str) -> list[jax.Device]:
  from jax.experimental import topologies
  # Without these libtpu asks the cloud which machine this is, and refuses a second process.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"libtpu has no slice {topology} ({str(error).splitlines()[0]}): choose the "
                     "sizes of a slice that exists, such as v5e:4x4 or v5p:2x2x4.") from error


def _gpus(name: str, count: int) -> list[jax.Device]:
  from jax.experimental import topologies
  _let_gpu_mean_cuda()
  target = importlib.resources.files("s2d_jax").joinpath(f"assets/chips/{name}.txtpb")
  hosts = max(count // CARDS_PER_HOST, 1)
  return topologies.get_topology_desc(
      platform="cuda", target_config=target.read_text(encoding="utf-8"),
      topology=f"1x{hosts}x{count // hosts}").devices


def _let_gpu_mean_cuda() -> None:
  """Makes JAX lower for CUDA where devices of the platform "gpu" are described."""
  from jax._src import xla_bridge  # no public function says this
  canonicalize_running = xla_bridge.canonicalize_platform

  # JAX looks for the running backend that "gpu" stands for, and here none runs.
  def canonicalize(platform: str) -> str:
    try:
      return canonicalize_running(platform)
    except RuntimeError:
      if platform == "gpu":
        return "cuda"
      raise

  xla_bridge.canonicalize_platform = canonicalize
