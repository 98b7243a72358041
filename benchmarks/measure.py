"""What every benchmark shares: medians of repeats, compiled memory, the machine, the result."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import manifest, models

RESULTS = pathlib.Path(__file__).parent / "results"
# 29 M parameters in Qwen3's architecture: small enough for a CPU, and matrix products dominate.
SHAPES = {
    "qwen3-29m": {
        "model_type": "qwen3", "hidden_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "intermediate_size": 1536, "vocab_size": 32_000, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 40_960},
    "qwen3-smoke": {
        "model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": 16, "vocab_size": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 64},
}


class Asked(NamedTuple):
  """One benchmark's command line, read."""
  sizes: argparse.Namespace
  words: list
  results: pathlib.Path
  load_average: float  # of the last minute, before anything is measured


def parser(doc, full, smoke):
  """A command line: one flag per setting with its full size; `--smoke` makes them the tiny ones."""
  flags = argparse.ArgumentParser(description=doc.splitlines()[0],
                                  argument_default=argparse.SUPPRESS)
  for name, value in full.items():
    flags.add_argument(f"--{name}", type=type(value), help=f"{value}, or {smoke[name]} in a smoke")
  flags.add_argument("--smoke", action="store_true", help="tiny sizes: that it runs, no more")
  flags.add_argument("--results", default=RESULTS, type=pathlib.Path, help="where the JSON goes")

  def parse(argv):
    given = vars(flags.parse_args(argv))
    results = given.pop("results")
    sizes = smoke if given.pop("smoke", False) else full
    words = sys.argv[1:] if argv is None else argv
    return Asked(argparse.Namespace(**sizes | given), words, results, os.getloadavg()[0])

  return parse


class Peer:
  """A rival in a process of its own, which answers each line with JSON; `versions` are its first.
  """

  def __init__(self, argv):
    self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.versions = self._answer()

  def ask(self, line):
    """What it says to a line."""
    self.process.stdin.write(f"{line}\n")
    self.process.stdin.flush()
    return self._answer()

  def _answer(self):
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f"{' '.join(self.process.args[:3])} has ended: its error is above.")
    return json.loads(line)

  def close(self):
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()
    self.process.stdout.close()


def model(shape, dtype="float32", remat="none", attention="auto", seed=0):
  """(Model, random params) of a shape here or a published name, float32, on the first device."""
  built = models.get(SHAPES.get(shape, shape), dtype=dtype, remat=remat, attention=attention)
  return built, jax.jit(built.init)(jax.random.key(seed))


def timed(run, repeats):
  """Seconds of `run()` until its arrays are there: the first, and the median of `repeats` more."""
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return {"seconds": statistics.median(seconds[1:]), "repeats": seconds[1:], "first": seconds[0]}


def stopwatch(make):
  """(make(), the seconds it took): for what happens once, such as compiling."""
  start = time.perf_counter()
  result = make()
  return result, time.perf_counter() - start


def memory(program):
  """Bytes that a compiled program needs on a device, by its own account.

  Its peak is arguments + temporaries + outputs − aliases, the outputs that reuse donated arguments.
  """
  needs = program.memory_analysis()
  return {"argument_bytes": needs.argument_size_in_bytes,
          "temporary_bytes": needs.temp_size_in_bytes,
          "output_bytes": needs.output_size_in_bytes, "alias_bytes": needs.alias_size_in_bytes}


def matmul_peak(size, repeats, dtype="float32"):
  """FLOP/s of the product of two square matrices: what this machine reaches at best, now."""
  key_a, key_b = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in (key_a, key_b))
  product = jax.jit(jnp.dot)
  taken = timed(lambda: product(a, b), repeats)
  return {"size": size, "dtype": dtype, "flops_per_second": 2 * size**3 / taken["seconds"], **taken}


def bandwidth(mebibytes, repeats, dtype="float32"):
  """Bytes/s of reading a large array, by its sum or its product with a vector: the faster of them.

  Like `matmul_peak`, what this machine reaches at best, now.
  """
  dtype = jnp.dtype(dtype)
  matrix = jnp.ones((mebibytes * 2**20 // dtype.itemsize // 256, 256), dtype)
  vector = jnp.ones(256, dtype)
  ways = {"sum": jax.jit(jnp.sum), "product": jax.jit(lambda matrix: matrix @ vector)}
  found = {name: timed(lambda read=read: read(matrix), repeats) for name, read in ways.items()}
  return {"mebibytes": mebibytes, "dtype": str(dtype), **found,
          "bytes_per_second": matrix.nbytes / min(way["seconds"] for way in found.values())}


def machine():
  """The processor, how many, and the versions; nothing that names the host."""
  return {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count(),
          "python": platform.python_version(), "jax": jax.__version__,
          "platform": jax.default_backend(), "device": jax.devices()[0].device_kind,
          "devices": jax.device_count()}


def _processor():
  """The processor's name as Linux tells it; elsewhere the architecture."""
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else ()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()


def write(script, asked, found, kind=""):
  """Writes <results>/<script>-<device>.json and prints it; returns its path.

  `kind` stands behind the script's name where a script has results of several.
  """
  command = " ".join(["python -m", f"benchmarks.{script}", *asked.words])
  result = {"benchmark": script, "command": command, "revision": manifest.revision(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(),
            "load_average": asked.load_average, "sizes": vars(asked.sizes), **found}
  device = result["machine"]["device"].lower().replace(" ", "-")
  asked.results.mkdir(parents=True, exist_ok=True)
  path = asked.results / f"{'-'.join([script, *[kind] * bool(kind), device])}.json"
  path.write_text(json.dumps(result, indent=1) + "\n")
  print(path.read_text(), end="")
  return path
