"""Seconds that checksums cost: of saves, of the end of a stage, of reading back and of `hf.load`.

  python -m benchmarks.checksums [--megabytes=1000] [--shape=qwen3-29m] [--repeats=3]

With and without checksums in turn. A loop makes three steps and saves after each, as a stage does.
A step lasts `step_seconds`: in `idle` the host waits, as for an accelerator, and in `busy` it
computes products on all cores. `waited_seconds` is the time of a save in which the loop waits for
the checksums of the save before, and `share_of_save` that time over the save's without checksums.
`added_seconds` is the difference of both loops, a save's part of it. `share_of_work` in `read` is
the time of hashing a checkpoint over that of a save: work that is done beside the steps, and takes
their cores. `final` is the end of a stage, its final weights and its export, where hashing runs
beside the export; `added_seconds` and `share_of_save` are the time that the stage takes longer.
Files were just written, so they are read from the page cache.
"""

import contextlib
import pathlib
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from benchmarks import measure
from s2d_jax import checkpoint, checksums, sharding
from s2d_jax.models import hf
from s2d_jax.sharding import Params

FULL = {"megabytes": 1000, "step_seconds": 2.0, "shape": "qwen3-29m", "repeats": 3}
SMOKE = {"megabytes": 1, "step_seconds": 0.01, "shape": "qwen3-smoke", "repeats": 1}
parse = measure.parser(__doc__, FULL, SMOKE)
SAVES = 3
_ROWS = 1000  # of the arrays of a state, of 4 MB each


class Unchecked(checkpoint.Checkpoints):
  """Checkpoints without checksums."""

  def _write_checksums(self, step: int) -> None:
    pass


class Checked(checkpoint.Checkpoints):
  """Checkpoints with checksums, and a clock of the time for which a save waits for them."""

  waited = 0.0

  def _wait(self) -> None:
    _, seconds = measure.stopwatch(super()._wait)
    self.waited += seconds


def state_of(megabytes: int, mesh: jax.sharding.Mesh) -> Params:
  """Random float32 arrays of this size in all, which no compression makes much smaller."""
  rng = np.random.default_rng(0)
  arrays = max(1, megabytes // 4)
  return {str(i): sharding.put(rng.normal(size=(_ROWS, _ROWS)).astype(np.float32),
                               sharding.replicated(mesh)) for i in range(arrays)}


def busy(seconds: float) -> Callable[[], None]:
  """A step that computes products on all cores, as many as take `seconds` on a free machine."""
  product = jax.jit(lambda x: x @ x)
  x = jax.numpy.ones((1024, 1024))
  jax.block_until_ready(product(x))
  _, once = measure.stopwatch(lambda: jax.block_until_ready([product(x) for _ in range(10)]))
  count = max(1, round(10 * seconds / once))
  return lambda: jax.block_until_ready([product(x) for _ in range(count)])


def saving(kind: type, state: Params, step: Callable[[], None]) -> measure.Json:
  """Seconds of a loop of steps and saves to its close, and those within the saves."""
  saves = []
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = kind(folder)
    start = time.perf_counter()
    for number in range(1, SAVES + 1):
      step()
      _, seconds = measure.stopwatch(lambda number=number: checkpoints.save(number, state))
      saves.append(seconds)
    step()
    checkpoints.close()
    return {"seconds": time.perf_counter() - start, "saves": sum(saves),
            "waited": getattr(checkpoints, "waited", 0.0)}


def of_saves(state: Params, size: int, step: Callable[[], None], repeats: int) -> measure.Json:
  """The seconds that checksums add to a loop that saves."""
  answers = measure.alternate({"without": lambda _: saving(Unchecked, state, step),
                               "with": lambda _: saving(Checked, state, step)}, repeats)
  # The first one of each side warms up.
  loops = {side: [answer["seconds"] for answer in found[1:]] for side, found in answers.items()}
  saves = statistics.median(answer["saves"] for answer in answers["without"][1:])
  added = statistics.median(a - b for a, b in zip(loops["with"], loops["without"], strict=True))
  waited = statistics.median(answer["waited"] for answer in answers["with"][1:])
  return {"with": loops["with"], "without": loops["without"], "added_seconds": added / SAVES,
          "save_seconds": saves / SAVES, "save_seconds_per_GB": saves / SAVES / size * 1e9,
          "waited_seconds": waited / SAVES, "share_of_save": waited / saves}


def of_final(shape: str, repeats: int) -> measure.Json:
  """Seconds of the end of a stage, with and without the checksums of its final weights."""
  model, params = measure.model(shape)
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)

    def end(checked: bool) -> measure.Json:
      _, save = measure.stopwatch(lambda: checkpoint.save_final(folder, params))
      hashing = checkpoint.recording_final(folder) if checked else contextlib.nullcontext()

      def export() -> None:
        with hashing:
          hf.save(folder / "hf", model, params)

      _, seconds = measure.stopwatch(export)
      return {"seconds": save + seconds, "save_seconds": save}

    sides = measure.alternate({"without": lambda _: end(False), "with": lambda _: end(True)},
                              repeats)
    final = folder / "checkpoints" / "final"
    _, alone = measure.stopwatch(lambda: checksums.record(final, checksums.listed(final)))
  ends = {side: [answer["seconds"] for answer in found[1:]] for side, found in sides.items()}
  added = statistics.median(a - b for a, b in zip(ends["with"], ends["without"], strict=True))
  save = statistics.median(answer["save_seconds"] for answer in sides["without"][1:])
  return {**ends, "save_seconds": save, "hash_seconds": alone, "added_seconds": added,
          "share_of_save": added / save, "share_of_work": alone / save}


@contextlib.contextmanager
def without(folder: pathlib.Path) -> Iterator[None]:
  """Takes a model's checksums away for a while."""
  sums = (folder / "SHA256SUMS").rename(folder.parent / "sums")
  try:
    yield
  finally:
    sums.rename(folder / "SHA256SUMS")


def of_reads(state: Params, size: int, shape: str, repeats: int) -> measure.Json:
  """Seconds of hashing a checkpoint, of loading it, and of `hf.load` with and without checksums."""
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    checkpoints = checkpoint.Checkpoints(folder / "stage")
    _, save = measure.stopwatch(lambda: checkpoints.save(1, state))
    checkpoints.close()
    saved = folder / "stage" / "checkpoints" / "1"
    recorded = checksums.record(saved, checksums.listed(saved))
    opened = checkpoint.Checkpoints(folder / "stage")
    like = sharding.abstract(state)
    load = measure.timed(lambda: opened.load(like), repeats)
    opened.close()
    compare = measure.timed(lambda: checksums.damage(saved, recorded), repeats)
    model, params = measure.model(shape)
    hf.save(folder / "model", model, params)
    model_size = (folder / "model" / "model.safetensors").stat().st_size

    def load_model() -> Params:
      return hf.load(folder / "model")[1]

    def unchecked(_: int) -> measure.Json:
      with without(folder / "model"):
        return {"seconds": measure.stopwatch(lambda: jax.block_until_ready(load_model()))[1]}

    answers = measure.alternate({
        "without": unchecked,
        "with": lambda _: {"seconds": measure.stopwatch(
            lambda: jax.block_until_ready(load_model()))[1]}}, repeats)
    models = {side: statistics.median(answer["seconds"] for answer in found[1:])
              for side, found in answers.items()}
  return {"checkpoint": {"load": load, "compare": compare,
                         "load_seconds_per_GB": load["seconds"] / size * 1e9,
                         "compare_seconds_per_GB": compare["seconds"] / size * 1e9,
                         "share_of_work": compare["seconds"] / save},
          "hf_load": {"bytes": model_size, **models}}


def run(sizes: Namespace) -> measure.Json:
  """All measurements."""
  mesh = sharding.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    state = state_of(sizes.megabytes, mesh)
    size = sum(x.nbytes for x in state.values())
    return {"bytes": size,
            "idle": of_saves(state, size, lambda: time.sleep(sizes.step_seconds), sizes.repeats),
            "busy": of_saves(state, size, busy(sizes.step_seconds), sizes.repeats),
            "final": of_final(sizes.shape, sizes.repeats),
            "read": of_reads(state, size, sizes.shape, sizes.repeats)}


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Measures, writes the JSON and returns its path."""
  options = parse(argv)
  return measure.write("checksums", options, run(options.sizes))


if __name__ == "__main__":
  main()
