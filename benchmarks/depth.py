"""Seconds and size of a sampler's programs for models of 4, 16 and 36 layers.

  python -m benchmarks.depth --topology=h100   (or v5e:2x2; "" is this machine)

Layers of Qwen3-1.7B in bfloat16, 64 rows of 128 + 64 tokens on one device. A program's seconds are
those of its compilation alone, one program after the other.
"""

import dataclasses
import pathlib
import threading
import time
from collections.abc import Sequence

import jax

from benchmarks import measure
from benchmarks.measure import Json
from s2d_jax import models, program_cache, sharding
from s2d_jax.preflight import costs, hlo, topologies
from s2d_jax.sampler import Compiler, Sampler, Sampling

FULL = {"topology": "", "model": "qwen3-1.7b", "rows": 64, "prompt_tokens": 128, "max_tokens": 64,
        "layers": "4,16,36"}
SMOKE = FULL | {"model": "qwen3-smoke", "rows": 4, "prompt_tokens": 8, "max_tokens": 8,
                "layers": "1,2"}


class Recorder:
  """Compiles one program at a time, and keeps what each took by its name."""

  def __init__(self) -> None:
    self.found: dict[str, Json] = {}
    self._one_at_a_time = threading.Lock()

  def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program, whose seconds, size and kernels are kept in `found`."""
    name = lowered.compiler_ir().operation.attributes["sym_name"].value.removeprefix("jit_")
    with self._one_at_a_time:
      start = time.monotonic()
      processor_start = time.process_time()
      compiled = lowered.compile()
      taken = {"seconds": time.monotonic() - start,
               "processor_seconds": time.process_time() - processor_start}
      text = compiled.as_text()
      # A GPU's compiler says nothing of its code's size, so the program's text stands for it.
      taken |= {"code_bytes": costs.account(compiled).code, "text_bytes": len(text),
                "kernels": sum(1 for _ in hlo.kernels(text, unknown_trips=1))}
      # Of several programs of one name, such as those of each batch, the slowest.
      if name not in self.found or taken["seconds"] > self.found[name]["seconds"]:
        self.found[name] = taken
    return compiled


def compiled(name: str, layers: int, rows: int, prompt_tokens: int, max_tokens: int,
             device: jax.Device) -> dict[str, Json]:
  """Seconds, size and kernels of a sampler's programs by name, for a number of layers."""
  model = models.get(measure.SHAPES.get(name, name), dtype="bfloat16")
  model = models.build(dataclasses.replace(model.config, layers=layers))
  recorder = Recorder()
  with jax.set_mesh(sharding.make_mesh((1, 1, 1), [device])):
    Sampler(model, Sampling(max_tokens, (1,)), rows, prompt_tokens,
            compiler=Compiler(recorder.compile, largest_only=True))
  return recorder.found


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Prints a line per program and number of layers, writes the JSON and returns its path."""
  options = measure.parser(__doc__, FULL, SMOKE)(argv)
  sizes = options.sizes
  device = (topologies.devices(sizes.topology) if sizes.topology else jax.devices())[0]
  found = {}
  for layers in sizes.layers.split(","):
    # Without JAX's persistent cache, from which a program would take no time.
    with program_cache.opened(""):
      found[layers] = compiled(sizes.model, int(layers), sizes.rows, sizes.prompt_tokens,
                               sizes.max_tokens, device)
    for name, taken in found[layers].items():
      print(f"{layers:>3} layers  {name:<16} {taken['seconds']:7.1f} s, of processors "
            f"{taken['processor_seconds']:7.1f} s  {taken['text_bytes']:>12,} bytes of text  "
            f"{taken['kernels']:>5,} kernels", flush=True)
  return measure.write("depth", options, {"programs": found}, sizes.topology.replace(":", "-"))


if __name__ == "__main__":
  main()
