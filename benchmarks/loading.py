"""Seconds and peak memory of `hf.load` on a generated bfloat16 folder, a fresh process each time.

  python -m benchmarks.loading [--shape=qwen3-29m] [--dtype=float32] [--repeats=5]

The folder was just written, so its bytes come from the page cache and not from a disk. Peak memory
is Linux's VmHWM, which counts the mapped pages of the file as well. `main` runs this file again
with `--child` for each measurement.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from s2d_jax import models, sharding
from s2d_jax.models import hf

FULL = {"shape": "qwen3-29m", "dtype": "float32", "repeats": 5}
SMOKE = {"shape": "qwen3-smoke", "dtype": "float32", "repeats": 1}
parse = measure.parser(__doc__, FULL, SMOKE)


def peak_bytes():
  """The most memory this process has had resident since it began."""
  status = pathlib.Path("/proc/self/status").read_text()
  (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
  return 1024 * int(line.split()[1])


def child(folder, dtype):
  """Loads the folder once, in this process, and prints what it took as JSON."""
  mesh = sharding.make_mesh()
  jax.block_until_ready(jax.device_put(jnp.zeros(1)))  # the backend starts before the clock
  before = peak_bytes()
  params, seconds = measure.stopwatch(
      lambda: jax.block_until_ready(hf.load(folder, mesh, dtype)[1]))
  print(json.dumps({"seconds": seconds, "peak_before_bytes": before, "peak_bytes": peak_bytes(),
                    "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(params))}))


def run(sizes):
  """{what loading takes}: medians over fresh processes."""
  # In NumPy: an accelerator that this process had touched would be missing to its children.
  model, rng = models.get(measure.SHAPES[sizes.shape]), np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(jnp.bfloat16),
                        models.shapes(model.config))
  with tempfile.TemporaryDirectory() as scratch:
    folder = hf.save(pathlib.Path(scratch) / "model", model, params)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    command = [sys.executable, "-m", "benchmarks.loading", "--child", str(folder), sizes.dtype]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(sizes.repeats)]
  middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
  return {**middle, "stored_bytes": stored, "repeats": [run["seconds"] for run in runs],
          "bytes_per_second": stored / middle["seconds"],
          "peak_above_start": middle["peak_bytes"] - middle["peak_before_bytes"]}


def main(argv=None):
  """Measures, writes the JSON and returns its path."""
  asked = parse(argv)
  return measure.write("loading", asked, run(asked.sizes))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    child(*sys.argv[2:])
  else:
    main()
