"""A sampler whose dispatches are timed one by one, and one of which can be traced."""

import statistics
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import numpy as np

from benchmarks import measure, sampler
from benchmarks.accelerator import traces
from benchmarks.measure import Json
from s2d_jax.models import Model
from s2d_jax.rollouts import Prompt
from s2d_jax.sampler import Compiler, Sampler, SamplerConfig, Sampling
from s2d_jax.sharding import Params

Compile = Callable[[jax.stages.Lowered], Any]


class Once:
  """Compiles each program once, however many threads ask for it at a time."""

  def __init__(self, pool: futures.Executor) -> None:
    self.pool = pool
    self.lock = threading.Lock()
    self.programs: dict[jax.stages.Lowered, futures.Future] = {}

  def __call__(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled program, when the pool has compiled it."""
    with self.lock:
      if lowered not in self.programs:
        self.programs[lowered] = self.pool.submit(lowered.compile)
    return self.programs[lowered].result()


class Dispatches:
  """A decoding program that notes when each of its dispatches begins, and traces one of them."""

  def __init__(self, program: Callable[..., Any], traced: int) -> None:
    self.program = program
    self.traced = traced  # the dispatch that is traced; -1: none
    self.starts: list[float] = []
    self.trace: Json | None = None

  def __call__(self, *args: Any) -> Any:
    """Runs the program."""
    self.starts.append(time.perf_counter())
    if len(self.starts) - 1 != self.traced:
      return self.program(*args)
    jax.block_until_ready(args)  # the dispatch before may still run
    results = []
    def run_once() -> Any:
      results.append(self.program(*args))
      return results[0]
    self.trace = traces.of(run_once)
    return results[0]


class Decoder:
  """A sampler with one program that decodes `rows` samples of one prompt."""

  def __init__(self, model: Model, weights: Params, rows: int, sizes: Namespace,
               compile: Compile = jax.stages.Lowered.compile) -> None:
    self.rows = rows
    self.config = model.config
    width = sizes.prompt_tokens
    self.prompts = [Prompt(0, tuple(range(1, width + 1)))]
    token_bytes = sampler.cache_bytes(model.config)
    # Twice the rows' own bytes: the number of slots is bounded by the rows, not by the memory.
    need = 2 * ((rows + 1) * (width + sizes.max_tokens) * token_bytes
                + width * (token_bytes + 4 * model.config.heads * width))
    config = SamplerConfig(cache_gib=need / 2**30, tokens=sizes.dispatch)
    sampling = Sampling(sizes.max_tokens, (), samples_per_prompt=rows)
    self.sampler = Sampler(model, sampling, 1, width, config, params=weights,
                           compiler=Compiler(compile, largest_only=True))
    self.program = self.sampler.decode_program
    self.slots = self.sampler.programs.shapes.batches[0]

  def dispatches(self, weights: Any, seed: int, traced: int = -1) -> tuple[Dispatches, float]:
    """(the dispatches of a call, its seconds); `weights` as `Sampler.lay_out` makes them."""
    noted = Dispatches(self.program, traced)
    programs = self.sampler.programs
    self.sampler.programs = programs._replace(
        decode={size: noted for size in programs.decode})
    _, seconds = measure.stopwatch(lambda: self.sampler(weights, self.prompts, (seed,)))
    self.sampler.programs = programs
    return noted, seconds


def decoding(decoder: Decoder, weights: Any, sizes: Namespace) -> Json:
  """Seconds of a decoding step, from one dispatch's results to the next one's."""
  steps = []
  calls = []
  for seed in range(sizes.repeats + 1):
    noted, seconds = decoder.dispatches(weights, seed)
    # No row waits, so the second dispatch is launched at once behind the first, and every other one
    # when the last but one has been read. The last one finds no row alive.
    taken = np.diff(noted.starts[1:]) / sizes.dispatch
    if seed:  # the first call warms up
      steps += taken.tolist()
      calls.append(seconds)
    if sum(calls) > sizes.seconds:
      break
  workload = sampler.Workload([decoder.prompts[0].tokens], decoder.rows, sizes.max_tokens, 1.0, (),
                              decoder.rows)
  lengths = [len(taken) * sizes.dispatch] * decoder.rows
  flops_S, bytes_S = sampler.step_costs(decoder.config, workload, lengths)
  seconds = statistics.median(steps)
  rates = sizes.rates
  return {"seconds_per_step": seconds, "steps": steps, "calls": calls,
          "tokens_per_second": decoder.rows / seconds,
          "tokens_per_second_with_prefill":
              decoder.rows * sizes.max_tokens / statistics.median(calls),
          "bytes_per_step": float(bytes_S.mean()),
          "share_of_bandwidth": float(bytes_S.mean()) / seconds / rates["bytes_per_second"],
          "share_of_bound": sampler.bound(
              flops_S, bytes_S, rates["flops_per_second"], rates["bytes_per_second"])
              / len(bytes_S) / seconds}
