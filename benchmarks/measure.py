"""Shared by the benchmarks: medians of repeats, compiled memory, the machine, the result file."""

import argparse
import json
import math
import os
import pathlib
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax import manifest, models, sharding
from s2d_jax.models import Model
from s2d_jax.sharding import Params

Json = dict[str, Any]  # a result or a part of one, as json.dumps takes it
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


class Options(NamedTuple):
  """A benchmark's command line, parsed."""
  sizes: argparse.Namespace
  arguments: Sequence[str]
  results: pathlib.Path
  load_average: float  # of the last minute, before anything is measured


def parser(doc: str, full: Json, smoke: Json) -> Callable[[Sequence[str] | None], Options]:
  """Returns the function that parses a benchmark's command line.

  Each setting is a flag. Its default is the value in `full`, or in `smoke` with --smoke.
  """
  flags = argparse.ArgumentParser(description=doc.splitlines()[0],
                                  argument_default=argparse.SUPPRESS)
  for name, value in full.items():
    flags.add_argument(f"--{name}", type=type(value), help=f"{value}, or {smoke[name]} in a smoke")
  flags.add_argument("--smoke", action="store_true", help="tiny sizes: a test that the script runs")
  flags.add_argument("--results", default=RESULTS, type=pathlib.Path, help="where the JSON goes")

  def parse(argv: Sequence[str] | None) -> Options:
    values = vars(flags.parse_args(argv))
    results = values.pop("results")
    sizes = smoke if values.pop("smoke", False) else full
    arguments = sys.argv[1:] if argv is None else argv
    return Options(argparse.Namespace(**sizes | values), arguments, results, os.getloadavg()[0])

  return parse


class Peer:
  """A rival in a process of its own, which answers each line with JSON.

  Its first answer, before any line, is the dictionary `versions`.
  """

  def __init__(self, argv: Sequence[str], seconds: float = math.inf) -> None:
    """Starts the process; `seconds` are those that one answer may take, the first one included."""
    self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.seconds = seconds
    self.versions = self._answer()

  def ask(self, line: str | int) -> Json:
    """Sends a line and returns the answer.

    Raises:
      TimeoutError: the rival took too long, and its process was ended.
      RuntimeError: its process has ended.
    """
    try:
      self.process.stdin.write(f"{line}\n")
      self.process.stdin.flush()
    except BrokenPipeError:  # it has ended, as the missing answer says
      pass
    return self._answer()

  def _answer(self) -> Json:
    # A rival writes one line for each of ours, so nothing waits in Python's own buffer.
    limit = None if self.seconds == math.inf else self.seconds
    if not select.select([self.process.stdout], [], [], limit)[0]:
      self.process.kill()
      raise TimeoutError(f"not finished after {self.seconds:g} s")
    line = self.process.stdout.readline()
    if not line:
      # Results keep this sentence, so it names no folder of the host.
      module = " ".join(self.process.args[1:3])
      raise RuntimeError(f"python {module} has ended: its error is above.")
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    try:
      self.process.stdin.close()
    except BrokenPipeError:  # it was ended
      pass
    self.process.wait()
    self.process.stdout.close()


Side = Callable[[int], Json]  # takes the number of the repeat; the answer has its seconds


def alternate(sides: Mapping[str, Side], repeats: int, seconds: float = math.inf,
            save: Callable[[dict[str, list[Json]]], None] | None = None,
            ) -> dict[str, list[Json]]:
  """The answers of each side to 0, 1, ..., repeats.

  On a CPU the sides answer in turn, so that a change of the machine's load affects all. An
  accelerator that waits for another side lowers its clock. There each side's repeats run back to
  back, and the answer after the first one warms up and is left out.

  Args:
    seconds: after which a side begins no further repeat; it has two answers at least.
    save: called with all answers so far when a side has finished.

  Returns:
    The answers. A side that raised TimeoutError is left out, and standard error says so.
  """
  answers: dict[str, list[Json]] = {name: [] for name in sides}
  blocks = [[name] for name in sides] if on_accelerator() else [list(sides)]
  warm_ups = int(on_accelerator())
  for block in blocks:
    for number in range(repeats + 1 + warm_ups):
      for name in block:
        if name not in answers:
          continue
        used = sum(answer["seconds"] for answer in answers[name][1 + warm_ups:])
        if used >= seconds:
          continue
        try:
          answers[name].append(sides[name](number))
        except TimeoutError as error:
          print(f"{name}: {error}", file=sys.stderr, flush=True)
          del answers[name]
    for name in block:
      if name in answers:
        del answers[name][1:1 + warm_ups]
    if save is not None:
      save({name: found for name, found in answers.items() if found})
  return answers


def model(shape: str, dtype: str = "float32", remat: str = "none", attention: str = "auto",
          seed: int = 0) -> tuple[Model, Params]:
  """Returns (Model, random float32 parameters on the first device).

  `shape` is a name in SHAPES or of a published model; `dtype` is that of the activations.
  """
  built = models.get(SHAPES.get(shape, shape), dtype=dtype, remat=remat, attention=attention)
  return built, jax.jit(built.init)(jax.random.key(seed))


def weights(model: Model, shapes_of: Callable[[models.Config], Params],
            seed: int = 0) -> Params:
  """Random weights in the types of `shapes_of(config)`, on the current mesh."""
  where = models.laid_out(model.config, sharding.current_mesh(), shapes_of)
  # Cast where they are made: the weights of a large model in float32 would not fit beside them.
  def init(seed: jax.Array) -> Params:
    return jax.tree.map(lambda x, shape: x.astype(shape.dtype), model.init(jax.random.key(seed)),
                        where)
  return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, where))(np.uint32(seed))


def on_accelerator() -> bool:
  """Whether programs run on a TPU or a GPU, which repeats must not leave idle."""
  return jax.default_backend() != "cpu"


def timed(run: Callable[[], Any], repeats: int, seconds: float = math.inf) -> Json:
  """Seconds of `run()` until its arrays are computed: the first run, and the median of the others.

  `run` is called `repeats` + 1 times, back to back; on an accelerator once more after the first, to
  warm up. It must leave arrays on the device: an idle card lowers its clock.

  Args:
    seconds: after which no further repeat begins.
  """
  def once() -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
  first = once()
  if on_accelerator():
    once()
  taken = [once()]
  while len(taken) < repeats and sum(taken) < seconds:
    taken.append(once())
  return {"seconds": statistics.median(taken), "repeats": taken, "first": first}


def stopwatch(run: Callable[[], Any]) -> tuple[Any, float]:
  """Returns (run(), its seconds), for work that is done once, such as compiling."""
  start = time.perf_counter()
  result = run()
  return result, time.perf_counter() - start


def memory(program: jax.stages.Compiled) -> dict[str, int]:
  """Bytes that a compiled program needs on a device, by the compiler's account.

  The peak is arguments + temporaries + outputs − aliases. Aliases are outputs that reuse donated
  arguments.
  """
  needs = program.memory_analysis()
  return {"argument_bytes": needs.argument_size_in_bytes,
          "temporary_bytes": needs.temp_size_in_bytes,
          "output_bytes": needs.output_size_in_bytes, "alias_bytes": needs.alias_size_in_bytes}


def calls() -> int:
  """How often a repeat that measures a rate runs its program.

  An accelerator computes such a program in one or two milliseconds. The host needs up to half a
  millisecond to notice its end. Programs that are queued together have no such gaps between them.
  """
  return 20 if on_accelerator() else 1


def several(run: Callable[[], Any]) -> Callable[[], Any]:
  """A function that calls `run` `calls()` times without waiting, and returns the last result."""
  def repeated() -> Any:
    for _ in range(calls() - 1):
      run()
    return run()
  return repeated


def matmul_peak(size: int, repeats: int, dtype: str = "float32") -> Json:
  """FLOP/s of the product of two square matrices: an upper bound for this machine at this time."""
  key_a, key_b = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in (key_a, key_b))
  product = jax.jit(jnp.dot)
  taken = timed(several(lambda: product(a, b)), repeats)
  return {"size": size, "dtype": dtype, "calls": calls(),
          "flops_per_second": calls() * 2 * size**3 / taken["seconds"], **taken}


def bandwidth(mebibytes: int, repeats: int, dtype: str = "float32") -> Json:
  """Bytes/s of reading a large array: an upper bound for this machine at this time.

  The faster of two programs counts: the array's sum, and its product with a vector.
  """
  dtype = jnp.dtype(dtype)
  matrix = jnp.ones((mebibytes * 2**20 // dtype.itemsize // 256, 256), dtype)
  vector = jnp.ones(256, dtype)
  ways = {"sum": jax.jit(jnp.sum), "product": jax.jit(lambda matrix: matrix @ vector)}
  found = {name: timed(several(lambda read=read: read(matrix)), repeats)
           for name, read in ways.items()}
  fastest = min(way["seconds"] for way in found.values())
  return {"mebibytes": mebibytes, "dtype": str(dtype), **found, "calls": calls(),
          "bytes_per_second": calls() * matrix.nbytes / fastest}


def machine() -> Json:
  """The processor, the number of cores and devices, and versions; nothing that names the host."""
  return {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count(),
          "python": platform.python_version(), "jax": jax.__version__,
          "platform": jax.default_backend(), "device": jax.devices()[0].device_kind,
          "devices": jax.device_count()}


def _processor() -> str:
  """The processor's name on Linux; elsewhere the architecture."""
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else ()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()


def write(script: str, options: Options, found: Mapping[str, Any],
          kind: str = "") -> pathlib.Path:
  """`save`s a whole result and prints it."""
  path = save(script, options, found, kind)
  print(path.read_text(), end="")
  return path


def save(script: str, options: Options, found: Mapping[str, Any], kind: str = "") -> pathlib.Path:
  """Writes <results>/<script>-<kind>-<device>.json, whole or as far as it came; returns its path.

  `kind` names the results of a script that measures several things; "" is left out.
  """
  command = " ".join(["python -m", f"benchmarks.{script}", *options.arguments])
  result = {"benchmark": script, "command": command, "revision": manifest.revision(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(),
            "load_average": options.load_average, "sizes": vars(options.sizes), **found}
  device = result["machine"]["device"].lower().replace(" ", "-")
  options.results.mkdir(parents=True, exist_ok=True)
  name = "-".join(part for part in (script, kind, device) if part)
  path = options.results / f"{name}.json"
  # A run that is stopped while it writes leaves the last file whole.
  scratch = path.with_suffix(".tmp")
  scratch.write_text(json.dumps(result, indent=1) + "\n")
  os.replace(scratch, path)
  return path
