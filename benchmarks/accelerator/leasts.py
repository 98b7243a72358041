"""The least times of the programs that the parts have run, read from their texts afterwards.

A program's text takes a second or more to read and needs no device, so the parts only keep it.
Preflight is imported where it reads: it brings TFDS, which no part's start should wait for.
"""

import json
import multiprocessing
import os
import pathlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax

from benchmarks.accelerator import store
from benchmarks.accelerator.store import Json
from s2d_jax import chips
from s2d_jax.chips import Chip


def keep(program: jax.stages.Compiled, part: str, result: str, trips: int, steps: int = 1) -> None:
  """Keeps a program's text for `measure_all`; `trips` and `steps` as in `least`."""
  # Whole or not at all: half a file of a part that is stopped would fail all least times.
  store.write(pathlib.Path(os.environ["TEXTS"]) / f"{part}, {result}.json", {
      "part": part, "result": result, "trips": trips, "steps": steps, "text": program.as_text()})


def least(text: str, trips: int, steps: int, chip: Chip) -> Json:
  """The least seconds of a step's kernels; `trips` as in `hlo.kernels`.

  Args:
    steps: that the program does in one run, which share what it does once.
  """
  from s2d_jax.preflight import costs, hlo
  kernels = hlo.kernels(text, trips)
  total = hlo.total(kernels)
  found = costs.least(kernels, chip)
  by_bound = {name: seconds / steps for name, seconds in found._asdict().items()}
  return {"least_seconds": found.seconds / steps, "bound": found.bound, "by_bound": by_bound,
          "kernels": round(total.count / steps), "kernel_flops": total.flops / steps,
          "kernel_bytes": total.bytes / steps}


def read(path: pathlib.Path, chip: Chip) -> tuple[str, str, Json]:
  """(part, result, least time) of a kept program."""
  stored = json.loads(path.read_text(encoding="utf-8"))
  return (stored["part"], stored["result"],
          least(stored["text"], stored["trips"], stored["steps"], chip))


def measure_all(sizes: Namespace, save: Callable[[str, Json], None]) -> None:
  """Adds the least times to the results of the programs, at the rates that were measured."""
  device = store.read(sizes.into)["machine"]["device"]
  # On an unknown device a kernel has no least time, as on a TPU, whose program is one launch.
  kind = chips.of_kind(device) or chips.CHIPS["v5e"]
  chip = kind._replace(flops=sizes.rates["flops_per_second"],
                       bandwidth=sizes.rates["bytes_per_second"])
  paths = sorted(pathlib.Path(os.environ["TEXTS"]).glob("*.json"))
  for part, result, values in read_all(paths, chip, sizes.processes):
    before = store.read(sizes.into)["parts"][part]["results"][result]
    store.add(sizes.into, part, result, before | values)
  save("programs", {"count": len(paths)})


def read_all(paths: Sequence[pathlib.Path], chip: Chip,
             processes: int) -> Iterator[tuple[str, str, Json]]:
  """Yields the result of `read` for each path, of this process or of `processes` further ones."""
  if not processes:
    yield from map(read, paths, [chip] * len(paths))
    return
  # Reading is Python's own work, so threads would not share it.
  with futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
    yield from pool.map(read, paths, [chip] * len(paths))
