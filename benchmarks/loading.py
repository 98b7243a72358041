"""Seconds and peak memory of loading a generated bfloat16 folder, ours and transformers', in turn.

  python -m benchmarks.loading [--shape=qwen3-1.7b] [--dtype=bfloat16] [--repeats=5]

Every load is a process of its own. The folder was just written, so its bytes come from the page
cache and not from a disk. `seconds` ends when the loader returns the weights. `touch_seconds` is
the time to read one byte of each of their pages after that, because a loader that maps the file has
not read it yet. Peak memory is Linux's. `peak_bytes` (VmHWM) counts mapped pages of the file too,
and `peak_anonymous_bytes` (RssAnon, read every two milliseconds) does not. `main` runs this file
again with `--child` for each measurement. Without torch, transformers is left out.
"""

import importlib.util
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from s2d_jax import models, sharding
from s2d_jax.models import hf, layout
from s2d_jax.sharding import Params

FULL = {"shape": "qwen3-1.7b", "dtype": "bfloat16", "repeats": 5}
SMOKE = {"shape": "qwen3-smoke", "dtype": "bfloat16", "repeats": 1}
parse = measure.parser(__doc__, FULL, SMOKE)


# A loader's two functions: load() -> weights, and weights -> their bytes as NumPy arrays.
Loader = tuple[Callable[[], Any], Callable[[Any], list[np.ndarray]]]


def status(key: str) -> int:
  """Bytes in the line `key` of /proc/self/status."""
  text = pathlib.Path("/proc/self/status").read_text()
  (line,) = (line for line in text.splitlines() if line.startswith(f"{key}:"))
  return 1024 * int(line.split()[1])


class Watch(threading.Thread):
  """Samples this process's anonymous memory until stopped; `peak` is the maximum, in bytes."""

  def __init__(self) -> None:
    super().__init__(daemon=True)
    self.peak = 0
    self.over = threading.Event()

  def run(self) -> None:
    """Samples every two milliseconds until `over` is set."""
    while not self.over.wait(0.002):
      self.peak = max(self.peak, status("RssAnon"))


def ours(folder: str, dtype: str) -> Loader:
  """The Loader of `hf.load`."""
  mesh = sharding.make_mesh()
  jax.block_until_ready(jax.device_put(jnp.zeros(1)))  # the backend starts before the clock
  def load() -> Params:
    return jax.block_until_ready(hf.load(folder, mesh, dtype)[1])
  return load, lambda params: [np.asarray(x).reshape(-1).view(np.uint8)
                               for x in jax.tree.leaves(params)]


def theirs(folder: str, dtype: str) -> Loader:
  """The Loader of transformers' `from_pretrained`."""
  import torch
  import transformers
  def load() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
  return load, lambda model: [x.detach().reshape(-1).view(torch.uint8).numpy()
                              for x in model.parameters()]


LOADERS = {"ours": ours, "transformers": theirs}


def child(loader: str, folder: str, dtype: str) -> None:
  """Loads the folder once in this process, and prints seconds and memory as JSON."""
  load, pages = LOADERS[loader](folder, dtype)
  before = {"peak": status("VmHWM"), "anonymous": status("RssAnon")}
  watch = Watch()
  watch.start()
  loaded, seconds = measure.stopwatch(load)
  watch.over.set()
  peak = status("VmHWM")
  start = time.perf_counter()
  arrays = pages(loaded)
  sum(int(x[::4096].sum(dtype=np.int64)) for x in arrays)
  print(json.dumps({
      "seconds": seconds, "touch_seconds": time.perf_counter() - start,
      "peak_above_start_bytes": peak - before["peak"],
      "peak_anonymous_bytes": watch.peak - before["anonymous"],
      "parameter_bytes": sum(x.nbytes for x in arrays)}))


def write_folder(shape: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes a bfloat16 folder of a shape, filled with repeats of one random block; returns it."""
  # In NumPy, because child processes could not use an accelerator that this process holds.
  model = models.get(measure.SHAPES.get(shape, shape))
  block = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(jnp.bfloat16)
  params = jax.tree.map(lambda x: np.resize(block, x.shape), models.shapes(model.config))
  return hf.save(folder, model, params)


def run(sizes: Namespace) -> measure.Json:
  """Medians of each loader over new processes, the loaders in turn."""
  runs = {name: [] for name in LOADERS
          if name == "ours" or importlib.util.find_spec("torch") is not None}
  with tempfile.TemporaryDirectory() as scratch:
    folder = write_folder(sizes.shape, pathlib.Path(scratch) / "model")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    config = models.get(measure.SHAPES.get(sizes.shape, sizes.shape)).config
    shapes = layout.flat(models.shapes(config))
    largest = max(math.prod(shapes[path].shape[weight.stacked:])
                  for path, weight in models.weights(config).items())
    for _ in range(sizes.repeats):
      for name, found in runs.items():
        command = [sys.executable, "-m", "benchmarks.loading", "--child", name, str(folder),
                   sizes.dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
  return {"stored_bytes": stored,
          "largest_tensor_bytes": largest * jnp.dtype(sizes.dtype).itemsize,
          **{name: _medians(found, stored) for name, found in runs.items()}}


def _medians(runs: Sequence[measure.Json], stored_bytes: int) -> measure.Json:
  """The median of every value over the runs, and what follows from them."""
  median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
  return {**median, "repeats": [run["seconds"] for run in runs],
          "bytes_per_second": stored_bytes / median["seconds"],
          "peak_above_weights_bytes": median["peak_anonymous_bytes"] - median["parameter_bytes"]}


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Measures, writes the JSON and returns its path."""
  options = parse(argv)
  return measure.write("loading", options, run(options.sizes))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    child(*sys.argv[2:])
  else:
    main()
