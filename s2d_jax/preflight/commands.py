"""The command `s2d-jax preflight`: a line for each program, verdicts, and the search."""

import math
import sys
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from s2d_jax import command, hosts, keys, placement, program_cache, recipe, sharding, sweep
from s2d_jax.errors import InputError
from s2d_jax.models import hf
from s2d_jax.preflight import runs, search, topologies, verdicts
from s2d_jax.preflight.costs import Cost
from s2d_jax.preflight.pool import Progress
from s2d_jax.preflight.programs import Target, costs_of, least_bytes

_EXAMPLE = "s2d-jax preflight --config=configs/arithmetic.py:tiny --topology=v5e:1x1"


def main(argv: Sequence[str]) -> None:
  """`s2d-jax preflight`: prints the table of a config's largest programs of each kind.

  Exits with 1 if one does not fit.

  Raises:
    InputError: the request is wrong; the message is one sentence.
  """
  parser = command.config_parser(
      "preflight", "Compiles the largest program of each kind and says whether it fits.", _EXAMPLE)
  parser.add_argument("--topology", metavar="h100:8",
                      help="chips to compile for that are not here: h100, h200:8, v5e:4x4, ...")
  parser.add_argument("--fast", action="store_true",
                      help="the stages alone, with a sampler's two largest programs")
  parser.add_argument("--search", action="store_true",
                      help="try meshes, microbatches, remat, offload; print the cheapest that "
                           "fits")
  parser.add_argument("--price", metavar="2.5", help="of one chip an hour")
  config, args = command.parse_config(parser, argv)
  price = search.check_price(args.price)
  if args.price is not None and not args.topology:
    raise InputError("--price needs --topology: name the chips that it is for.")
  if args.search and not args.topology:
    raise InputError("--search needs --topology: name the chips that it is for.")
  if args.search:
    fits = search_and_show(config, args.topology, price)
  else:
    fits = show(config, args.topology, args.fast, price)
  if not fits:
    sys.exit(command.FAILED)


def show(config: ConfigDict, topology: str | None = None, fast: bool = False,
         price: float | None = None) -> bool:
  """Prints a line per program and a verdict per stage; returns False if something does not fit.

  Args:
    topology: chips to compile for; None: this machine's devices.
    price: of one chip an hour.
  """
  # A wrong name is refused before folders are read.
  chip = topologies.chip(topology) if topology else None
  configs = sweep.expand(config)
  plans = [recipe.plan_without_problems(one) for one in configs]
  # A run opens the folder of its first config.
  program_cache.check(configs[0].compilation_cache)
  devices = topologies.devices(topology) if topology else None
  if devices is None:  # every chip of a topology has the memory
    placement.check_devices(configs[0], jax.local_devices())
  mesh = _mesh(configs[0].mesh, devices)
  limit = chip.usable if chip is not None else hosts.device_memory()
  progress = Progress()
  found: list[list[Cost]] = []
  printed: dict[Cost, None] = {}
  # Within an open run, stages trace a program that they share once.
  with program_cache.opened(""), jax.set_mesh(mesh):
    print(verdicts.HEADER, flush=True)
    for one in configs:
      found.append([])
      for cost in costs_of(one, Target(chip, fast), progress):
        found[-1].append(cost)
        if cost not in printed:  # runs of a sweep share programs
          printed[cost] = None
          # Flushed line by line, because a large program takes minutes to compile.
          print(verdicts.line(cost), flush=True)
  print(verdicts.summary(found, limit))
  if fast:
    print(verdicts.FAST)
  if chip is not None:
    print(verdicts.memory(chip))
    print(search.price_sentence(mesh.size, runs.total(plans, found), price))
  return verdicts.fits(printed, limit)


def search_and_show(config: ConfigDict, topology: str, price: float | None) -> bool:
  """Prints a line per candidate and the cheapest that fits; returns False if none does.

  Raises:
    InputError: the config is wrong, or it is a sweep.
  """
  if "sweep" in config:
    raise InputError("--search takes one run: name a config without a sweep.")
  chip = topologies.chip(topology)
  # First, because a candidate's InputError below means that its mesh or memory is too small.
  plan = recipe.plan_without_problems(config)
  program_cache.check(config.compilation_cache)
  devices = topologies.devices(topology)
  progress = Progress()

  def compiled(changed: ConfigDict) -> list[Cost]:
    with jax.set_mesh(_mesh(changed.mesh, devices)):
      return list(costs_of(changed, Target(chip, fast=True), progress))

  def held(changed: ConfigDict) -> int:
    with jax.set_mesh(_mesh(changed.mesh, devices)):
      return least_bytes(changed)

  heads = [hf.read_config(config[role]).kv_heads for role in ("teacher", "student")]
  print(verdicts.memory(chip), flush=True)
  def total(found: Sequence[Cost]) -> runs.Total:
    return runs.total([plan], [found])

  for group in search.placements(config):
    tried = [candidate for offload in group for candidate in
             search.candidates(config, len(devices), math.gcd(*heads), offload)]
    best = search.cheapest(config, tried, chip.usable, compiled, held,
                           lambda found: total(found).hours, lambda line: print(line, flush=True))
    if best is not None:
      break
  if best is None:
    print(f"no candidate fits {topology}")
    return False
  candidate, costs = best
  print(f"the cheapest that fits: {candidate}: "
        f"{search.price_sentence(len(devices), total(costs), price)}")
  print(f"as flags: {candidate.flags(config)}", flush=True)
  # The candidates were compared without evaluations and the sampler's smaller programs.
  with jax.set_mesh(_mesh(candidate.mesh, devices)):
    found = list(costs_of(candidate.apply(config), Target(chip), progress))
  print(f"with all of its programs: {verdicts.verdict(found, chip.usable)}")
  return verdicts.fits(found, chip.usable)


def _mesh(shape: tuple[int, ...], devices: list[jax.Device] | None) -> Mesh:
  """The mesh of a config; of described devices it uses all."""
  with keys.prefixed("config."):
    mesh = sharding.make_mesh(shape, devices)
    if devices is not None and mesh.size != len(devices):
      raise InputError(f"mesh is {tuple(shape)}, which leaves {len(devices) - mesh.size} of the "
                       f"{len(devices)} devices idle: choose sizes that use all.")
  return mesh

