"""Measures the parts of `plan`. A part calls `save(name, values)` for each of its results."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import jax

from benchmarks import grpo, loss, measure, sampler, step
from benchmarks.accelerator import store, traces
from benchmarks.accelerator.decoder import Decoder, decoding
from benchmarks.accelerator.plan import Part
from configs import common
from s2d_jax import (
  chips,
  ledger,
  manifest,
  models,
  objectives,
  optim,
  program_cache,
  sharding,
  training,
)
from s2d_jax.chips import Chip
from s2d_jax.losses.blockwise import Head
from s2d_jax.models import Model
from s2d_jax.preflight import costs, hlo
from s2d_jax.sharding import Params

Json = measure.Json
Save = Callable[[str, Json], None]
# Of an H200, where the part with this machine's own rates has failed.
RATES = {"flops_per_second": 684e12, "bytes_per_second": 4.5e12}


def run(part: Part, into: pathlib.Path, smoke: bool) -> None:
  """Measures a part and stores each result as soon as it exists."""
  sizes = Namespace(**(part.full | part.smoke if smoke else part.full))
  sizes.rates = store.read(into)["parts"].get("rates", {}).get("results", {}).get("rates", RATES)
  def save(name: str, values: Json) -> None:
    store.add(into, part.name, name, values)
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


def chip(rates: Mapping[str, float]) -> Chip:
  """This device, for the account of preflight, at the rates that were measured."""
  # On an unknown device a kernel has no least time, as on a TPU, whose program is one launch.
  kind = chips.of_kind(jax.devices()[0].device_kind) or chips.CHIPS["v5e"]
  return kind._replace(flops=rates["flops_per_second"], bandwidth=rates["bytes_per_second"])


def least(program: jax.stages.Compiled, trips: int, rates: Mapping[str, float],
          steps: int = 1) -> Json:
  """The least seconds of a step's kernels at these rates; `trips` as in `hlo.kernels`.

  Args:
    steps: that the program does in one run, which share what it does once.
  """
  kernels = hlo.kernels(program.as_text(), trips)
  total = hlo.total(kernels)
  found = costs.least(kernels, chip(rates))
  by_bound = {name: seconds / steps for name, seconds in found._asdict().items()}
  return {"least_seconds": found.seconds / steps, "bound": found.bound, "by_bound": by_bound,
          "kernels": round(total.count / steps), "kernel_flops": total.flops / steps,
          "kernel_bytes": total.bytes / steps}


def network(shape: str, **run_options: Any) -> Model:
  """The model of a shape; bfloat16 where an accelerator computes it."""
  dtype = "bfloat16" if measure.on_accelerator() else "float32"
  return models.get(measure.SHAPES.get(shape, shape), dtype=dtype, **run_options)


class Learner:
  """A model with AdamW that learns random tokens by negative log-likelihood."""

  def __init__(self, shape: str, lora: int, block: int) -> None:
    self.model = network(shape, remat="block")
    config = self.model.config
    self.non_trainable = None
    params = measure.weights(self.model, models.shapes)
    if lora:
      # As in a stage: the weights stand still in float32, and the adapters alone have moments.
      self.non_trainable = params
      self.model = models.build(dataclasses.replace(
          config, lora=models.Lora(lora, 32.0, ("q", "k", "v", "o", "gate", "up", "down"))))
      params = models.adapters(self.model, 0)
    # The gradient of a weight that stands still is not computed: a backward pass is one forward.
    self.passes = 2 if lora else 3
    self.block = block
    self.hp = SimpleNamespace(**common.adamw(lr=1e-6), microbatches=1, block=block, mean="token")
    self.optimizer = optim.make(self.hp, 1000, models.trained(self.model.config))
    self.mesh = sharding.current_mesh()
    self.state = training.init(self.optimizer, self.mesh, params)

  def batch(self, rows: int, tokens: int) -> Params:
    """Random tokens on the device."""
    return sharding.put_batch(step.random_batch(self.model.config.vocab_size, rows, tokens),
                              self.mesh)

  def lower(self, batch: Params) -> jax.stages.Lowered:
    """The update for batches of this shape."""
    update = training.jit_update(self.model, None, objectives.NEGATIVE_LOG_LIKELIHOOD,
                                 self.optimizer, self.hp, training.shardings(self.state))
    return update.lower(self.state, None, batch, self.non_trainable)

  def update(self, program: jax.stages.Compiled, batch: Params) -> dict[str, jax.Array]:
    """Makes an update; its metrics stay on the device."""
    self.state, self.metrics = program(self.state, None, batch, self.non_trainable)
    return self.metrics


def compiled(lowered: Sequence[jax.stages.Lowered]) -> list[tuple[jax.stages.Compiled, float]]:
  """(program, seconds) of each, compiled side by side."""
  with futures.ThreadPoolExecutor(len(lowered)) as pool:
    return list(pool.map(lambda x: measure.stopwatch(x.compile), lowered))


def update(sizes: Namespace, save: Save) -> None:
  """Updates of several sizes, beside the least time of their own kernels; a trace of the first."""
  learner, seconds = measure.stopwatch(lambda: Learner(sizes.shape, sizes.lora, sizes.block))
  save("start", {"weights_seconds": seconds, "seconds": since_start()})
  batches = [learner.batch(*shape) for shape in sizes.batches]
  programs = compiled([learner.lower(batch) for batch in batches])
  config = learner.model.config
  found = {}
  for (rows, tokens), batch, (program, seconds) in zip(sizes.batches, batches, programs,
                                                       strict=True):
    taken = measure.timed(lambda p=program, b=batch: learner.update(p, b), sizes.repeats,
                          sizes.seconds)
    flops = learner.passes * ledger.forward_flops(config, [tokens] * rows)
    found[program] = f"{rows} x {tokens:,}", rows * tokens // sizes.block, taken | {
        "compile_seconds": seconds, "tokens": rows * tokens, "flops": flops,
        "loss": float(learner.metrics["loss"]), "finite": float(learner.metrics["finite"]),
        "tokens_per_second": rows * tokens / taken["seconds"],
        "share_of_peak": flops / taken["seconds"] / sizes.rates["flops_per_second"],
        "memory": measure.memory(program)}
    name, _, values = found[program]
    save(name, values)
  if sizes.trace:
    program, _ = programs[0]
    save("trace", traces.of(lambda: learner.update(program, batches[0])))
  # Last, because a program's text takes seconds to read and might not be understood.
  for program, (name, trips, values) in found.items():
    save(name, values | least(program, trips, sizes.rates))


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
  mesh = sharding.current_mesh()
  def build(rows: int) -> tuple[Decoder, float]:
    with jax.set_mesh(mesh):  # of this thread
      return measure.stopwatch(lambda: Decoder(model, params, rows, sizes))
  with futures.ThreadPoolExecutor(len(sizes.rows)) as pool:
    built = list(pool.map(build, sizes.rows))
  weights = built[0][0].sampler.lay_out(params)
  save("start", {"seconds": since_start()})
  found = {}
  for decoder, compile_seconds in built:
    found[decoder] = decoding(decoder, weights, sizes) | {
        "compile_seconds": compile_seconds, "slots": decoder.slots,
        "memory": measure.memory(decoder.program)}
    save(f"{decoder.rows} rows", found[decoder])
    if decoder.rows == sizes.trace:
      # The second dispatch: the first one follows the reading of the prompt.
      save("trace", decoder.dispatches(weights, 0, traced=1)[0].trace)
  for decoder, values in found.items():
    step = least(decoder.program, sizes.dispatch, sizes.rates, sizes.dispatch)
    save(f"{decoder.rows} rows", values | step)


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
  found = {}
  for name, (program, seconds) in programs.items():
    taken = measure.timed(lambda p=program: p(*placed), sizes.repeats, sizes.seconds)
    found[name] = taken | {
        "compile_seconds": seconds, "flops": flops, "memory": measure.memory(program),
        "share_of_peak": flops / taken["seconds"] / sizes.rates["flops_per_second"],
        "loss": float(program(*placed)[0])}
    save(name, found[name])
  for name, values in found.items():
    trips = sizes.tokens // sizes.block if name == "blockwise" else 1
    save(name, values | least(programs[name][0], trips, sizes.rates))


def whole_step(sizes: Namespace, save: Save) -> None:
  """Whole steps of a stage, from random weights; the first has the start's seconds."""
  ours = grpo.Ours(sizes)
  start = {"seconds": since_start(), "compile_seconds": ours.compile_seconds}
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
  """A whole run of the arithmetic world's tiny config, in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-c", "from s2d_jax import cli; cli.main()", "run",
               "--config=configs/arithmetic.py:tiny", f"--workdir={folder}", *sizes.flags]
    missing = [name for name in ("tensorflow_datasets", "array_record")
               if importlib.util.find_spec(name) is None]
    if missing:
      raise RuntimeError(f"the arithmetic world's data need {' and '.join(missing)}: install them.")
    done, seconds = measure.stopwatch(lambda: subprocess.run(command, check=False))
    if done.returncode:
      raise RuntimeError(f"the run ended with exit status {done.returncode}: its error is above.")
  save("run", {"seconds": seconds})


def rival_updates(sizes: Namespace, save: Save) -> None:
  """An update here and in `transformers`, eager and compiled."""
  _script(step, sizes, save)


def rival_decoding(sizes: Namespace, save: Save) -> None:
  """Decoding here and by `generate` of `transformers`."""
  _script(sampler, sizes, save)


def _script(script: Any, sizes: Namespace, save: Save) -> None:
  """A benchmark of this folder, whose result is stored as far as it came."""
  if importlib.util.find_spec("torch") is None:
    raise RuntimeError("the rivals need torch, which is not installed.")
  with tempfile.TemporaryDirectory() as folder:
    try:
      script.main([*sizes.flags, f"--results={folder}"])
    finally:
      for path in pathlib.Path(folder).glob("*.json"):
        for name, values in store.read(path).items():
          if isinstance(values, dict) and name not in ("machine", "sizes"):
            save(name, values)


FUNCTIONS = {"rates": rates, "update": update, "account": account, "decode": decode,
             "loss": losses, "step": whole_step}
# These start processes or meshes of their own.
OWN_DEVICES = {"world": world, "rival_updates": rival_updates, "rival_decoding": rival_decoding}
