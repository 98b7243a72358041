"""Devices that are not here: chips by name, their memory and rates, and what compiles for them.

A program compiled for such devices can be read and cannot run.

  h100  h200  a100             one card; h100:8 is a host of eight, h100:64 eight such hosts
  v4  v5e  v5p  v6e            a TPU and its slice: v5e:4x4, v5p:2x2x4
"""

import importlib.metadata
import importlib.resources
import os
import re

import jax

from s2d_jax.chips import CHIPS, Chip
from s2d_jax.errors import InputError

CARDS_PER_HOST = 8
# A network card of 400 Gbit/s for each GPU, which hosts of cards usually have.
NETWORK_BETWEEN_HOSTS = 50e9

# XLA asks for these when it compiles for a GPU: the plugin, its compiler, ptxas and cuDNN.
_GPU_PACKAGES = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12",
                 "nvidia-cudnn-cu12")


def chip(topology: str) -> Chip:
  """The chip of a topology's name.

  Raises:
    InputError: the name is unknown.
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
    InputError: the name is unknown, or a package that compiles for it is not installed.
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
  raise InputError(
      f"the topology {topology!r} is unknown: name a card ({', '.join(gpus)}), several of them as "
      f"h100:8 (up to {CARDS_PER_HOST}, or a multiple of that), or a slice of {', '.join(tpus)} as "
      "v5e:4x4 or v5p:2x2x4.")


def _require(topology: str, packages: tuple[str, ...], extra: str) -> None:
  """Raises InputError unless the packages are installed, which `extra` brings."""
  for package in packages:
    try:
      importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      raise InputError(
          f"the topology {topology} needs the package {package}, which is not installed: in an "
          f"environment of its own, pip install -e '.[{extra}]'.") from None


def _tpus(topology: str) -> list[jax.Device]:
  from jax.experimental import topologies
  # Without these libtpu asks the cloud which machine this is, and refuses a second process.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  # libtpu takes hosts of 2 x 2 chips, which do not divide a smaller slice.
  sizes = [int(size) for size in topology.partition(":")[2].split("x")]
  host = [min(size, 2) for size in sizes[:2]]
  bounds = host + [1] * (3 - len(host))
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology,
                                        chips_per_host_bounds=bounds).devices
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f"libtpu has no slice {topology} ({str(error).splitlines()[0]}): choose the "
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
