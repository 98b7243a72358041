"""Output tokens a second of the sampler, of transformers' and Tunix's in turn, and the bound.

  python -m benchmarks.sampler [--workloads=ragged,refill,uniform] [--tunix=PYTHON] [--rivals=]
  python -m benchmarks.sampler --decode=1,16,64,256 --shape=qwen3-1.7b --dtype=bfloat16
  python -m benchmarks.sampler --alone=float32,bfloat16

Workloads: *ragged* is `prompts` × `samples` rows at temperature 1, in which each token is a stop id
with probability `stops` / vocabulary. *refill* is `refill` times as many rows in the memory of
*ragged*. In *uniform* every row has `max_tokens` tokens. `--decode=1,16` has such rows, one of each
of 1 and of 16 prompts. It also times decoding alone: the seconds of `max_tokens` tokens minus those
of one token. Each repeat has its own seed. In float32 all must sample our greedy tokens before
anything is timed; in bfloat16, where logits round to ties, the share of equal rows is recorded.
`--alone` times nothing: it samples *ragged* together and through one slot, row after row, and
counts the rows that differ.
"""

import json
import pathlib
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from s2d_jax import ledger, models, sharding
from s2d_jax.models import hf
from s2d_jax.rollouts import Prompt
from s2d_jax.sampler import Sampler, SamplerConfig, Sampling, capacity
from s2d_jax.sharding import Params

FULL = {"workloads": "ragged,refill,uniform", "decode": "", "alone": "", "shape": "qwen3-29m",
        "dtype": "float32", "prompts": 8, "samples": 8, "refill": 8, "prompt_tokens": 64,
        "max_tokens": 256, "stops": 533, "page": 0,
        "rivals": "transformers,transformers_continuous", "tunix": "", "repeats": 5,
        "refill_repeats": 3, "seconds": 3600.0, "peak": 4096, "stream": 512}
SMOKE = FULL | {"shape": "qwen3-smoke", "prompts": 2, "samples": 2, "refill": 3, "prompt_tokens": 4,
                "max_tokens": 8, "stops": 8, "rivals": "", "repeats": 1, "refill_repeats": 1,
                "peak": 16, "stream": 1}
GREEDY = 8  # tokens in which all samplers must agree
parse = measure.parser(__doc__, FULL, SMOKE)


class Workload(NamedTuple):
  """Prompts to sample from, in the memory of `slots` rows."""
  prompts: Sequence[Sequence[int]]
  samples: int  # of each prompt
  max_tokens: int
  temperature: float
  stop_ids: Sequence[int]
  slots: int


def workloads(sizes: Namespace, vocab_size: int) -> dict[str, Workload]:
  """{name: Workload}: "greedy", which all must agree on, and those that are timed."""
  rng = np.random.default_rng(0)
  batches = [int(n) for n in sizes.decode.split(",") if n]
  count = max([sizes.prompts * sizes.refill, *batches])
  prompts = rng.integers(0, vocab_size, (count, sizes.prompt_tokens)).tolist()
  stops = tuple(rng.choice(vocab_size, sizes.stops, replace=False).tolist())
  few = prompts[: sizes.prompts]
  rows = sizes.prompts * sizes.samples
  def workload(prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], slots: int,
               samples: int = sizes.samples) -> Workload:
    return Workload(prompts, samples, sizes.max_tokens, 1.0, stop_ids, slots)
  named = {"ragged": workload(few, stops, rows), "uniform": workload(few, (), rows),
           "refill": workload(prompts[: sizes.prompts * sizes.refill], stops, rows)}
  if batches:
    timed = {f"decode_{n}": workload(prompts[:n], (), n, 1) for n in batches}
  else:
    timed = {name: named[name] for name in sizes.workloads.split(",")}
  return {"greedy": Workload(few, 1, GREEDY, 0.0, (), len(few)), **timed}


class Ours:
  """Our sampler, compiled for a Workload; `ask` returns what a rival's Peer returns.

  `page` is the number of tokens of a cache page, 0 for a cache without pages.
  """

  def __init__(self, model: models.Model, params: Params, workload: Workload, page: int) -> None:
    self.params = params
    width = len(workload.prompts[0])
    self.prompts = [Prompt(i, tuple(ids)) for i, ids in enumerate(workload.prompts)]
    sampling = Sampling(workload.max_tokens, workload.stop_ids, samples_per_prompt=workload.samples,
                        temperature=workload.temperature)
    size = min(len(workload.prompts), -(-workload.slots // workload.samples))
    row = (width + workload.max_tokens) * cache_bytes(model.config)
    read = width * cache_bytes(model.config) + 4 * model.config.heads * width**2  # and its scores
    need = (workload.slots + 0.5) * row + min(size, capacity.MAX_PROMPTS) * read
    config = SamplerConfig(cache_gib=need / 2**30, page=page)
    self.sampler, seconds = measure.stopwatch(
        lambda: Sampler(model, sampling, size, width, config, params=params))
    self.account = {"compile_seconds": seconds,
                    "memory": measure.memory(self.sampler.decode_program),
                    "slots": self.sampler.programs.shapes.batches[0]}

  def ask(self, seed: int) -> measure.Json:
    """Samples every row: seconds, lengths, tokens, and the sampler's counts."""
    (rows, stats), seconds = measure.stopwatch(
        lambda: self.sampler(self.params, self.prompts, (seed,)))
    return {"seconds": seconds, "lengths": rows.response_length_B.tolist(),
            "stats": stats._asdict(),
            "tokens": [rows.response(b).tolist() for b in range(len(rows.response_BT))]}


def cache_bytes(config: models.Config) -> int:
  """Bytes of a token's keys and values."""
  return 2 * config.layers * config.kv_heads * config.head_width * jnp.dtype(config.dtype).itemsize


def step_costs(config: models.Config, workload: Workload,
               lengths: Sequence[int]) -> np.ndarray:
  """[2, steps]: FLOPs and bytes read by each decode step, if free slots took rows at once.

  A step reads the weights once, and the keys and values of each live row. Reading a prompt is not
  counted. Keys and values of a prompt count for every sample of it.
  """
  pair = 4 * config.layers * config.heads * config.head_width
  weights = (ledger.forward_flops(config, [1]) - pair) / 2
  waiting = list(lengths)
  done_B = np.zeros(0, int)  # tokens sampled of each live row
  length_B = np.zeros(0, int)
  found = []
  while waiting or len(done_B):
    free = workload.slots - len(done_B)
    admitted = waiting[:free]
    waiting = waiting[free:]
    done_B = np.append(done_B, np.zeros(len(admitted), int))
    length_B = np.append(length_B, admitted)
    attended = np.sum(len(workload.prompts[0]) + done_B)
    found.append((2 * weights * len(done_B) + pair * attended,
                  weights * jnp.dtype(config.dtype).itemsize + cache_bytes(config) * attended))
    alive_B = done_B + 1 < length_B
    done_B = done_B[alive_B] + 1
    length_B = length_B[alive_B]
  return np.array(found).T


def bound(flops_S: np.ndarray, bytes_S: np.ndarray, flops_per_second: float,
          bytes_per_second: float) -> float:
  """The least seconds: for each step, the longer of its arithmetic and its memory traffic."""
  return float(np.maximum(flops_S / flops_per_second, bytes_S / bytes_per_second).sum())


def summary(config: models.Config, workload: Workload, runs: Sequence[measure.Json],
            rates: tuple[float, float]) -> measure.Json:
  """Medians of the runs after the first, each compared with the bound for its own lengths.

  `rates` are the machine's FLOP/s and bytes/s.
  """
  seconds = [run["seconds"] for run in runs[1:]]
  tokens = [sum(run["lengths"]) for run in runs[1:]]
  least = [bound(*step_costs(config, workload, run["lengths"]), *rates) for run in runs[1:]]
  def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
  return {"tokens_per_second": median_ratio(tokens, seconds), "tokens": tokens,
          "seconds": statistics.median(seconds), "repeats": seconds, "first": runs[0]["seconds"],
          "bound_tokens_per_second": median_ratio(tokens, least),
          "share_of_bound": median_ratio(least, seconds)}


def decoding(model: models.Model, params: Params, workload: Workload, sizes: Namespace,
             seconds: float, rates: tuple[float, float]) -> measure.Json:
  """Costs of decoding without prefill: `seconds` of all tokens minus the seconds of one token."""
  one = Ours(model, params, workload._replace(max_tokens=1), sizes.page)
  short = [one.ask(seed)["seconds"] for seed in range(sizes.repeats + 1)][1:]
  decode_seconds = seconds - statistics.median(short)
  lengths = [workload.max_tokens] * workload.slots
  flops_S, bytes_S = step_costs(model.config, workload, lengths)[:, 1:]
  return {"seconds_per_step": decode_seconds / len(bytes_S),
          "bytes_per_step": float(bytes_S.mean()),
          "share_of_bandwidth": float(bytes_S.sum()) / decode_seconds / rates[1],
          "share_of_bound": bound(flops_S, bytes_S, *rates) / decode_seconds}


def peers(sizes: Namespace, folder: str, path: str) -> dict[str, measure.Peer]:
  """{name: Peer} on the weights in `folder` and the workloads in the file `path`."""
  module = [sys.executable, "-m", "benchmarks.peers.transformers_sampler", folder, path,
            sizes.dtype]
  found = {name: measure.Peer([*module, name], sizes.seconds)
           for name in sizes.rivals.split(",") if name}
  if sizes.tunix:
    found["tunix"] = measure.Peer([sizes.tunix, "benchmarks/peers/tunix_sampler.py", folder, path,
                                   sizes.dtype], sizes.seconds)
  return found


def equal_rows(greedy: Mapping[str, measure.Json]) -> dict[str, float]:
  """The share of rows in which a rival continues greedily with our first token."""
  ours = greedy["ours"]["tokens"]
  return {name: statistics.mean(a[0] == b[0] for a, b in zip(answer["tokens"], ours, strict=True))
          for name, answer in greedy.items() if name != "ours"}


def check_equal(greedy: Mapping[str, measure.Json]) -> None:
  """Raises ValueError if a rival's greedy tokens differ from ours."""
  for name, answer in greedy.items():
    if answer["tokens"] != greedy["ours"]["tokens"]:
      raise ValueError(f"{name} continues greedily with {answer['tokens'][0]} and we with "
                       f"{greedy['ours']['tokens'][0]}: time only equal samplers.")


def alone(sizes: Namespace, dtype: str) -> dict[str, Any]:
  """{"rows": their number, "differ": the share sampled differently alone and in a batch}."""
  model, params = measure.model(sizes.shape, dtype)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  ragged = workloads(sizes, model.config.vocab_size)["ragged"]
  together = Ours(model, params, ragged, sizes.page)
  single = Ours(model, params, ragged._replace(slots=1), sizes.page)
  if single.account["slots"] != 1:
    raise ValueError(f"a row is not alone in {single.account['slots']} slots: leave --page out.")
  pairs = zip(together.ask(1)["tokens"], single.ask(1)["tokens"], strict=True)
  differ = [a != b for a, b in pairs]
  return {"rows": len(differ), "differ": statistics.mean(differ)}


def run(sizes: Namespace, save: Callable[[measure.Json], Any]) -> measure.Json:
  """{workload: {sampler: tokens a second and the bound}}, and the machine's two rates.

  `save` gets the result as far as it has come.
  """
  model, params = measure.model(sizes.shape, sizes.dtype)
  params = jax.tree.map(lambda x: x.astype(sizes.dtype), params)
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  stream = measure.bandwidth(sizes.stream, sizes.repeats)
  rates = (peak["flops_per_second"], stream["bytes_per_second"])
  todo = workloads(sizes, model.config.vocab_size)
  found = {"workloads": {}, "matmul_peak": peak, "bandwidth": stream}
  with tempfile.TemporaryDirectory() as scratch:
    folder, path = f"{scratch}/model", f"{scratch}/workloads.json"
    if sizes.rivals or sizes.tunix:
      hf.save(folder, model, params)
    with open(path, "w", encoding="utf-8") as file:
      json.dump({name: workload._asdict() for name, workload in todo.items()}, file)
    others = peers(sizes, folder, path)
    found["peers"] = {name: other.versions for name, other in others.items()}
    try:
      for name, workload in todo.items():
        ours = Ours(model, params, workload, sizes.page)
        # In pages, more of our rows fit the same memory.
        slots = {side: workload.slots for side in others} | {"ours": ours.account["slots"]}
        def add(runs: dict[str, list[measure.Json]], name: str = name,
                workload: Workload = workload, ours: Ours = ours,
                slots: dict[str, int] = slots) -> None:
          row = {side: summary(model.config, workload._replace(slots=slots[side]), answers, rates)
                 for side, answers in runs.items()}
          row["ours"] |= ours.account | {"stats": runs["ours"][-1]["stats"]}
          found["workloads"][name] = row
          save(found)
        sides = {"ours": ours.ask} | {
            side: lambda seed, other=other, name=name: other.ask(
                json.dumps({"workload": name, "seed": seed}))
            for side, other in others.items()}
        if name == "greedy":
          _compare({side: ask(0) for side, ask in sides.items()}, sizes, found)
          continue
        repeats = sizes.refill_repeats if name == "refill" else sizes.repeats
        measure.alternate(sides, repeats, sizes.seconds, add)
        if sizes.decode:
          row = found["workloads"][name]["ours"]
          row["decoding"] = decoding(model, params, workload, sizes, row["seconds"], rates)
    finally:
      for other in others.values():
        other.close()
  return found


def _compare(greedy: Mapping[str, measure.Json], sizes: Namespace, found: measure.Json) -> None:
  """Checks the greedy tokens, or records how many rows are equal where logits are rounded."""
  if sizes.dtype == "float32":
    check_equal(greedy)
  else:
    for side, share in equal_rows(greedy).items():
      found["peers"][side] = found["peers"][side] | {"equal_first_tokens": share}


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Measures, writes the JSON and returns its path."""
  options = parse(argv)
  sizes = options.sizes
  with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
    if sizes.alone:
      shares = {dtype: alone(sizes, dtype) for dtype in sizes.alone.split(",")}
      return measure.write("sampler", options, {"alone": shares}, kind="alone")
    kind = "decode" if sizes.decode else ""
    found = run(sizes, lambda found: measure.save("sampler", options, found, kind))
    return measure.write("sampler", options, found, kind)


if __name__ == "__main__":
  main()
