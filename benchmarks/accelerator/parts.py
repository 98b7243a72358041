"""Measures the parts of `plan`. A part calls `save(name, values)` for each of its results."""

import gc
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import TextIO

import jax

from benchmarks import grpo, loss, measure
from benchmarks.accelerator import leasts, plan, rivals, store, table, traces
from benchmarks.accelerator.decoder import Decoder, Once, decoding
from benchmarks.accelerator.learner import Learner, compiled, network
from benchmarks.accelerator.plan import Part
from s2d_jax import ledger, manifest, models, program_cache, sharding
from s2d_jax.losses.blockwise import Head
from s2d_jax.models import Model
from s2d_jax.sharding import Params

Json = measure.Json
Save = Callable[[str, Json], None]
# Of an H200, where the part with this machine's own rates has failed.
RATES = {"flops_per_second": 684e12, "bytes_per_second": 4.5e12}


def serve(smoke: bool) -> None:
  """Measures the parts that standard input names, a line of JSON each: [name, file of results]."""
  named = {part.name: part for part in plan.PARTS}
  for first, (name, into) in _requests():
    run(named[name], pathlib.Path(into), smoke, first)
    # The next part needs the memory. A failed one frees it by the end of its process.
    jax.clear_caches()
    gc.collect()


def _requests() -> Iterator[tuple[bool, list[str]]]:
  """(whether it is the first, the request) of each line; what it led to is done at the next one."""
  # All that libraries print belongs to the messages, and standard output has the answers alone.
  answers: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  first = True
  for line in sys.stdin:
    yield first, json.loads(line)
    first = False
    print("finished", file=answers, flush=True)


def run(part: Part, into: pathlib.Path, smoke: bool, first: bool = True) -> None:
  """Measures a part and stores each result as soon as it exists.

  Args:
    first: whether this process has measured no other part before.
  """
  sizes = Namespace(**(part.full | part.smoke if smoke else part.full))
  measured = store.read(into)["parts"].get("rates", {}).get("results", {}).get("rates")
  sizes.rates = measured or RATES
  sizes.part = part.name
  sizes.first = first
  sizes.into = into
  def save(name: str, values: Json) -> None:
    store.add(into, part.name, name, values)
  if measured is None and part.function != "rates":
    save(table.ASSUMED, RATES)
  if part.function in OWN_DEVICES:
    OWN_DEVICES[part.function](sizes, save)
    return
  with (jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])),
        program_cache.opened("auto")):
    if part.function == "rates":
      store.write(into, store.read(into) | {
          "revision": manifest.revision(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
          "machine": measure.machine()})
    FUNCTIONS[part.function](sizes, save)


def since_start() -> float:
  """Seconds since this process was started, the start of Python included."""
  return time.monotonic() - float(os.environ["STARTED"])


def rates(sizes: Namespace, save: Save) -> None:
  """The product of two large matrices, and the reading of a large array."""
  dtype = "bfloat16" if measure.on_accelerator() else "float32"
  product = measure.matmul_peak(sizes.matrix, sizes.repeats, dtype)
  stream = measure.bandwidth(sizes.mebibytes, sizes.repeats, dtype)
  save("rates", {"flops_per_second": product["flops_per_second"],
                 "bytes_per_second": stream["bytes_per_second"], "product": product,
                 "bandwidth": stream})


def update(sizes: Namespace, save: Save) -> None:
  """Updates of several sizes, beside the least time of their own kernels; a trace of the first."""
  learner, seconds = measure.stopwatch(lambda: Learner(sizes.shape, sizes.lora, sizes.block))
  save("preparation", {"weights_seconds": seconds})
  batches = [learner.batch(*shape) for shape in sizes.batches]
  programs = compiled([learner.lower(batch) for batch in batches])
  config = learner.model.config
  for (rows, tokens), batch, (program, seconds) in zip(sizes.batches, batches, programs,
                                                       strict=True):
    taken = measure.timed(lambda p=program, b=batch: learner.update(p, b), sizes.repeats,
                          sizes.seconds)
    flops = learner.passes * ledger.forward_flops(config, [tokens] * rows)
    name = f"{rows} x {tokens:,}"
    save(name, taken | {
        "compile_seconds": seconds, "tokens": rows * tokens, "flops": flops,
        "loss": float(learner.metrics["loss"]), "finite": float(learner.metrics["finite"]),
        "tokens_per_second": rows * tokens / taken["seconds"],
        "share_of_peak": flops / taken["seconds"] / sizes.rates["flops_per_second"],
        "memory": measure.memory(program)})
    leasts.keep(program, sizes.part, name, rows * tokens // sizes.block)
  if sizes.trace:
    program, _ = programs[0]
    save("trace", traces.of(lambda: learner.update(program, batches[0])))


def account(sizes: Namespace, save: Save) -> None:
  """The compiler's account of an update beside the most memory that it has taken."""
  learner = Learner(sizes.shape, 0, sizes.block)
  batch = learner.batch(sizes.rows, sizes.tokens)
  program = learner.lower(batch).compile()
  needs = measure.memory(program)
  total = (needs["argument_bytes"] + needs["temporary_bytes"] + needs["output_bytes"]
           - needs["alias_bytes"])
  def allocated() -> Json:
    stats = jax.devices()[0].memory_stats() or {}
    return {"in_use_bytes": stats.get("bytes_in_use"),
            "peak_bytes": stats.get("peak_bytes_in_use")}
  before = allocated()
  for _ in range(2):
    jax.block_until_ready(learner.update(program, batch))
  after = allocated()
  found = {"account_bytes": total, **needs, "before": before, "after": after}
  if after["peak_bytes"]:
    # Anything that the process holds beside the arguments is not the program's.
    held = before["in_use_bytes"] - needs["argument_bytes"]
    found |= {"held_bytes": held, "peak_bytes": after["peak_bytes"] - held,
              "off": total / (after["peak_bytes"] - held) - 1}
  save("account", found)


def decode(sizes: Namespace, save: Save) -> None:
  """Tokens a second of decoding by number of rows, and the share of the bandwidth."""
  model = network(sizes.shape)
  params = measure.weights(model, models.frozen_shapes)
  built = decoders(model, params, sizes)
  weights = built[0][0].sampler.lay_out(params)
  for decoder, compile_seconds in built:
    name = f"{decoder.rows} rows"
    save(name, decoding(decoder, weights, sizes) | {
        "compile_seconds": compile_seconds, "slots": decoder.slots,
        "memory": measure.memory(decoder.program)})
    leasts.keep(decoder.program, sizes.part, name, sizes.dispatch, sizes.dispatch)
  for decoder, _ in built:
    if decoder.rows == sizes.trace:
      # The second dispatch: the first one follows the reading of the prompt.
      save("trace", decoder.dispatches(weights, 0, traced=1)[0].trace)


def decoders(model: Model, params: Params, sizes: Namespace) -> list[tuple[Decoder, float]]:
  """(decoder, seconds of compilation) for each number of rows, compiled side by side."""
  mesh = sharding.current_mesh()
  # Traced one by one, so that those that read the prompt are one object and compile once.
  for rows in sizes.rows:
    Decoder(model, params, rows, sizes, lambda lowered: lowered)
  with (futures.ThreadPoolExecutor(os.cpu_count()) as compiling,
        futures.ThreadPoolExecutor(len(sizes.rows)) as pool):
    once = Once(compiling)
    def build(rows: int) -> tuple[Decoder, float]:
      with jax.set_mesh(mesh):  # of this thread
        return measure.stopwatch(lambda: Decoder(model, params, rows, sizes, once))
    return list(pool.map(build, sizes.rows))


def losses(sizes: Namespace, save: Save) -> None:
  """Reverse KL with both gradients, block by block and on all logits at once."""
  dtype = "bfloat16" if measure.on_accelerator() else "float32"
  def head(key: jax.Array, width: int) -> Head:
    features_key, weight_key = jax.random.split(key)
    return Head(jax.random.normal(features_key, (1, sizes.tokens, width), dtype),
                jax.random.normal(weight_key, (sizes.vocab, width), dtype) * width**-0.5)
  @jax.jit
  def arrays(key: jax.Array) -> tuple[Head, Head, jax.Array]:
    student, guide, targets = jax.random.split(key, 3)
    return (head(student, sizes.width), head(guide, sizes.guide_width),
            jax.random.randint(targets, (1, sizes.tokens), 0, sizes.vocab))
  placed = arrays(jax.random.key(0))
  ways = loss.losses(sizes.block)["reverse_kl"]
  programs = dict(zip(ways, compiled([
      jax.jit(jax.value_and_grad(f)).lower(*placed) for f in ways.values()]), strict=True))
  # Products: the student's logits once and two for its gradients, the guide's once.
  flops = 2 * sizes.tokens * sizes.vocab * (3 * sizes.width + sizes.guide_width)
  for name, (program, seconds) in programs.items():
    taken = measure.timed(lambda p=program: p(*placed), sizes.repeats, sizes.seconds)
    save(name, taken | {
        "compile_seconds": seconds, "flops": flops, "memory": measure.memory(program),
        "share_of_peak": flops / taken["seconds"] / sizes.rates["flops_per_second"],
        "loss": float(program(*placed)[0])})
    trips = sizes.tokens // sizes.block if name == "blockwise" else 1
    leasts.keep(program, sizes.part, name, trips)


def whole_step(sizes: Namespace, save: Save) -> None:
  """Whole steps of a stage, from random weights; the first has the start's seconds."""
  ours = grpo.Ours(sizes)
  start = {"compile_seconds": ours.compile_seconds}
  # Another part before this one would be in these seconds.
  if sizes.first:
    start["seconds"] = since_start()
  save("start", start)
  runs = [ours.ask(0)]
  save("start", start | {"first_step_seconds": runs[0]["seconds"]})
  if not sizes.repeats:
    return
  runs += [ours.ask(seed) for seed in range(1, sizes.repeats + 1)]
  found = grpo.summary(runs)
  flops = grpo.flops(ours, sizes)
  found |= {"flops": flops, "tokens_per_second": found["tokens"] / found["seconds"],
            "share_of_peak": flops / found["seconds"] / sizes.rates["flops_per_second"],
            "memory": {name: measure.memory(program) for name, program in (
                ("draw", ours.programs.sampler.decode_program), ("update", ours.programs.update))}}
  save("step", found)


def world(sizes: Namespace, save: Save) -> None:
  """A whole run of the arithmetic world's tiny config, in a new process without programs."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-c", "from s2d_jax import cli; cli.main()", "run",
               "--config=configs/arithmetic.py:tiny", f"--workdir={folder}/run", *sizes.flags]
    missing = [name for name in ("tensorflow_datasets", "array_record")
               if importlib.util.find_spec(name) is None]
    if missing:
      raise RuntimeError(f"the arithmetic world's data need {' and '.join(missing)}: install them.")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
    done, seconds = measure.stopwatch(
        lambda: subprocess.run(command, env=environment, check=False))
    if done.returncode:
      raise RuntimeError(f"the run ended with exit status {done.returncode}: its error is above.")
  save("run", {"seconds": seconds})


FUNCTIONS = {"rates": rates, "update": update, "account": account, "decode": decode,
             "loss": losses, "step": whole_step, "rivals": rivals.measure_all}
# These start processes of their own, or need no device.
OWN_DEVICES = {"world": world, "least_times": leasts.measure_all}
