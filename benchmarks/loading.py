"""Seconds and peak memory of loading a generated bfloat16 folder, ours and transformers', in turn.

  python -m benchmarks.loading [--shape=qwen3-1.7b] [--dtype=bfloat16] [--repeats=5]

Every load is a process of its own; the folder was just written, so its bytes come from the page
cache and not from a disk. `seconds` is until the weights are there, `touch_seconds` what reading
one byte of each of their pages takes then: a loader that maps the file leaves its work for later.
Peak memory is Linux's: `peak_bytes` (VmHWM) counts mapped pages of the file as well,
`peak_anonymous_bytes` (RssAnon, looked at every two milliseconds) does not. `main` runs this file
again with `--child` for each measurement; without torch, transformers is left out.
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

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from s2d_jax import models, sharding
from s2d_jax.models import hf, layout

FULL = {"shape": "qwen3-1.7b", "dtype": "bfloat16", "repeats": 5}
SMOKE = {"shape": "qwen3-smoke", "dtype": "bfloat16", "repeats": 1}
parse = measure.parser(__doc__, FULL, SMOKE)


def status(key):
  """Bytes of a line of Linux's account of this process."""
  text = pathlib.Path("/proc/self/status").read_text()
  (line,) = (line for line in text.splitlines() if line.startswith(f"{key}:"))
  return 1024 * int(line.split()[1])


class Watch(threading.Thread):
  """Samples this process's anonymous memory until stopped; `peak` is the maximum, in bytes."""

  def __init__(self):
    super().__init__(daemon=True)
    self.peak, self.over = 0, threading.Event()

  def run(self):
    while not self.over.wait(0.002):
      self.peak = max(self.peak, status("RssAnon"))


def ours(folder, dtype):
  """(seconds, the weights' bytes as arrays) of `hf.load`."""
  mesh = sharding.make_mesh()
  jax.block_until_ready(jax.device_put(jnp.zeros(1)))  # the backend starts before the clock
  def load():
    return jax.block_until_ready(hf.load(folder, mesh, dtype)[1])
  return load, lambda params: [np.asarray(x).reshape(-1).view(np.uint8)
                               for x in jax.tree.leaves(params)]


def theirs(folder, dtype):
  """The same of transformers' `from_pretrained`."""
  import torch
  import transformers
  def load():
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
  return load, lambda model: [x.detach().reshape(-1).view(torch.uint8).numpy()
                              for x in model.parameters()]


LOADERS = {"ours": ours, "transformers": theirs}


def child(loader, folder, dtype):
  """Loads the folder once, in this process, and prints what it took as JSON."""
  load, pages = LOADERS[loader](folder, dtype)
  before, watch = {"peak": status("VmHWM"), "anonymous": status("RssAnon")}, Watch()
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


def write_folder(shape, folder):
  """A folder of that shape in bfloat16, its numbers one random block again and again."""
  # In NumPy: an accelerator that this process had touched would be missing to its children.
  model = models.get(measure.SHAPES.get(shape, shape))
  block = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(jnp.bfloat16)
  params = jax.tree.map(lambda x: np.resize(block, x.shape), models.shapes(model.config))
  return hf.save(folder, model, params)


def run(sizes):
  """{loader: what it takes}: medians over fresh processes, the loaders in turn."""
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
          **{name: _middle(found, stored) for name, found in runs.items()}}


def _middle(runs, stored):
  middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
  return {**middle, "repeats": [run["seconds"] for run in runs],
          "bytes_per_second": stored / middle["seconds"],
          "peak_above_weights_bytes": middle["peak_anonymous_bytes"] - middle["parameter_bytes"]}


def main(argv=None):
  """Measures, writes the JSON and returns its path."""
  asked = parse(argv)
  return measure.write("loading", asked, run(asked.sizes))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    child(*sys.argv[2:])
  else:
    main()
