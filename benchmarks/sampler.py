"""Output tokens a second of the sampler, of transformers' and Tunix's in turn, and the bound.

  python -m benchmarks.sampler [--works=ragged,refill,uniform] [--tunix=PYTHON] [--rivals=]
  python -m benchmarks.sampler --decode=1,16,64,256 --shape=qwen3-1.7b --dtype=bfloat16
  python -m benchmarks.sampler --alone=float32,bfloat16

*ragged*: `prompts` × `samples` rows at temperature 1, of which each token is the last with
probability `stops` / vocabulary; *refill*: `refill` times as many rows in the same memory;
*uniform*: every row to `max_tokens`. `--decode` has such rows, one of each of so many prompts, and
also what decoding alone takes: a draw of `max_tokens` less one of a single token. Each repeat has a
seed of its own. Everyone must draw our greedy tokens before anything is timed. `--alone` times
nothing: it draws *ragged* in a crowd and through one slot, row after row, and counts the rows that
are not the same.
"""

import json
import statistics
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from s2d_jax import ledger, sampler, sharding
from s2d_jax.models import hf
from s2d_jax.rollouts import Prompt
from s2d_jax.sampler import programs

FULL = {"works": "ragged,refill,uniform", "decode": "", "alone": "", "shape": "qwen3-29m",
        "dtype": "float32", "prompts": 8, "samples": 8, "refill": 8, "prompt_tokens": 64,
        "max_tokens": 256, "stops": 533, "page": 0,
        "rivals": "transformers,transformers_continuous", "tunix": "", "repeats": 5,
        "refill_repeats": 3, "peak": 4096, "stream": 512}
SMOKE = FULL | {"shape": "qwen3-smoke", "prompts": 2, "samples": 2, "refill": 3, "prompt_tokens": 4,
                "max_tokens": 8, "stops": 8, "rivals": "", "repeats": 1, "refill_repeats": 1,
                "peak": 16, "stream": 1}
GREEDY = 8  # tokens that everyone must draw alike
parse = measure.parser(__doc__, FULL, SMOKE)


class Work(NamedTuple):
  """What is drawn: each prompt's samples, in the memory of so many rows."""
  prompts: list
  samples: int
  max_tokens: int
  temperature: float
  stop_ids: tuple
  slots: int


def works(sizes, vocab_size):
  """{name: Work}: the greedy one, and those that are timed."""
  rng = np.random.default_rng(0)
  batches = [int(n) for n in sizes.decode.split(",") if n]
  count = max([sizes.prompts * sizes.refill, *batches])
  prompts = rng.integers(0, vocab_size, (count, sizes.prompt_tokens)).tolist()
  stops = tuple(rng.choice(vocab_size, sizes.stops, replace=False).tolist())
  few, rows = prompts[: sizes.prompts], sizes.prompts * sizes.samples
  def work(prompts, stop_ids, slots, samples=sizes.samples):
    return Work(prompts, samples, sizes.max_tokens, 1.0, stop_ids, slots)
  named = {"ragged": work(few, stops, rows), "uniform": work(few, (), rows),
           "refill": work(prompts[: sizes.prompts * sizes.refill], stops, rows)}
  timed = ({f"decode_{n}": work(prompts[:n], (), n, 1) for n in batches} if batches
           else {name: named[name] for name in sizes.works.split(",")})
  return {"greedy": Work(few, 1, GREEDY, 0.0, (), len(few)), **timed}


class Ours:
  """Our sampler, compiled for a Work and pages of so many tokens; `ask` is what a Peer answers."""

  def __init__(self, model, params, work, page):
    self.params, width = params, len(work.prompts[0])
    self.prompts = [Prompt(i, tuple(ids)) for i, ids in enumerate(work.prompts)]
    how = sampler.Sampling(work.samples, work.temperature, top_p=1.0, top_k=0, min_p=0.0,
                           max_tokens=work.max_tokens, min_tokens=0, stop_ids=work.stop_ids)
    size = min(len(work.prompts), -(-work.slots // work.samples))
    row = (width + work.max_tokens) * cache_bytes(model.config)
    read = width * cache_bytes(model.config) + 4 * model.config.heads * width**2  # and its scores
    need = (work.slots + 0.5) * row + min(size, programs.PROMPTS) * read
    room = sampler.Room(cache_gib=need / 2**30, page=page)
    self.draw, seconds = measure.stopwatch(
        lambda: sampler.make(model, params, how, size, width, room))
    self.account = {"compile_seconds": seconds, "memory": measure.memory(self.draw.compiled),
                    "slots": self.draw.programs.shapes.batches[0]}

  def ask(self, seed):
    """Draws every row: seconds, lengths, tokens, and what the sampler counted."""
    self.draw.seen = {}
    rows, seconds = measure.stopwatch(lambda: self.draw(self.params, self.prompts, (seed,)))
    return {"seconds": seconds, "lengths": rows.response_length_B.tolist(), "seen": self.draw.seen,
            "tokens": [rows.response(b).tolist() for b in range(len(rows.response_BT))]}


def cache_bytes(config):
  """Keys and values of a token."""
  return 2 * config.layers * config.kv_heads * config.head_width * jnp.dtype(config.dtype).itemsize


def needs(config, work, lengths):
  """(FLOPs, bytes read) of each decode step, were every slot free for the next row at once.

  A step reads the weights once, and the keys and values of each row alive; what has been read of a
  prompt before its last token is not counted, nor that samples could share it.
  """
  pair = 4 * config.layers * config.heads * config.head_width
  weights = (ledger.forward_flops(config, [1]) - pair) / 2
  waiting, ages, ends, found = list(lengths), np.zeros(0, int), np.zeros(0, int), []
  while waiting or len(ages):
    new, waiting = waiting[: work.slots - len(ages)], waiting[work.slots - len(ages):]
    ages, ends = np.append(ages, np.zeros(len(new), int)), np.append(ends, new)
    attended = np.sum(len(work.prompts[0]) + ages)
    found.append((2 * weights * len(ages) + pair * attended,
                  weights * jnp.dtype(config.dtype).itemsize + cache_bytes(config) * attended))
    ages, ends = ages[ages + 1 < ends] + 1, ends[ages + 1 < ends]
  return np.array(found).T


def bound(flops_S, bytes_S, flops_per_second, bytes_per_second):
  """The least seconds: at each step, arithmetic or memory, whichever takes longer."""
  return float(np.maximum(flops_S / flops_per_second, bytes_S / bytes_per_second).sum())


def told(config, work, runs, rates):
  """Medians of the runs after the first, whose lengths differ: each beside its own bound."""
  seconds = [run["seconds"] for run in runs[1:]]
  tokens = [sum(run["lengths"]) for run in runs[1:]]
  least = [bound(*needs(config, work, run["lengths"]), *rates) for run in runs[1:]]
  def middle(over, under):
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
  return {"tokens_per_second": middle(tokens, seconds), "tokens": tokens,
          "seconds": statistics.median(seconds), "repeats": seconds, "first": runs[0]["seconds"],
          "bound_tokens_per_second": middle(tokens, least),
          "share_of_bound": middle(least, seconds)}


def decoding(model, params, work, sizes, seconds, rates):
  """What decoding takes without prefill: `seconds` of a whole draw less a draw of one token."""
  one = Ours(model, params, work._replace(max_tokens=1), sizes.page)
  short = [one.ask(seed)["seconds"] for seed in range(sizes.repeats + 1)][1:]
  rest = seconds - statistics.median(short)
  flops_S, bytes_S = needs(model.config, work, [work.max_tokens] * work.slots)[:, 1:]
  return {"seconds_per_step": rest / len(bytes_S), "bytes_per_step": float(bytes_S.mean()),
          "share_of_bandwidth": float(bytes_S.sum()) / rest / rates[1],
          "share_of_bound": bound(flops_S, bytes_S, *rates) / rest}


def peers(sizes, folder, path):
  """{name: Peer} on the weights in `folder` and the works in `path`."""
  module = [sys.executable, "-m", "benchmarks.peers.transformers_sampler", folder, path,
            sizes.dtype]
  found = {name: measure.Peer([*module, name]) for name in sizes.rivals.split(",") if name}
  if sizes.tunix:
    found["tunix"] = measure.Peer([sizes.tunix, "benchmarks/peers/tunix_sampler.py", folder, path,
                                   sizes.dtype])
  return found


def same(greedy):
  """Refuses to time what draws other tokens than we do where nothing is left to chance."""
  for name, answer in greedy.items():
    if answer["tokens"] != greedy["ours"]["tokens"]:
      raise ValueError(f"{name} continues greedily with {answer['tokens'][0]} and we with "
                       f"{greedy['ours']['tokens'][0]}: do not time what is not the same.")


def alone(sizes, dtype):
  """{"rows": how many, "differ": the share that is not the same in a crowd and alone}."""
  model, params = measure.model(sizes.shape, dtype)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  crowd = works(sizes, model.config.vocab_size)["ragged"]
  crowded, single = (Ours(model, params, work, sizes.page)
                     for work in (crowd, crowd._replace(slots=1)))
  if single.account["slots"] != 1:
    raise ValueError(f"a row is not alone in {single.account['slots']} slots: leave --page out.")
  crowded, single = (sampled.ask(1)["tokens"] for sampled in (crowded, single))
  differ = [a != b for a, b in zip(crowded, single, strict=True)]
  return {"rows": len(differ), "differ": statistics.mean(differ)}


def run(sizes):
  """{work: {who: tokens a second beside the bound}}, and the machine's two rates."""
  model, params = measure.model(sizes.shape, sizes.dtype)
  params = jax.tree.map(lambda x: x.astype(sizes.dtype), params)
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  stream = measure.bandwidth(sizes.stream, sizes.repeats)
  rates = peak["flops_per_second"], stream["bytes_per_second"]
  todo, found = works(sizes, model.config.vocab_size), {}
  with tempfile.TemporaryDirectory() as scratch:
    folder, path = f"{scratch}/model", f"{scratch}/works.json"
    if sizes.rivals or sizes.tunix:
      hf.save(folder, model, params)
    with open(path, "w", encoding="utf-8") as file:
      json.dump({name: work._asdict() for name, work in todo.items()}, file)
    others = peers(sizes, folder, path)
    try:
      for name, work in todo.items():
        ours = Ours(model, params, work, sizes.page)
        runs = {who: [] for who in ("ours", *others)}
        repeats = {"greedy": 0, "refill": sizes.refill_repeats}.get(name, sizes.repeats)
        for seed in range(repeats + 1):
          for who, seen in runs.items():
            seen.append(ours.ask(seed) if who == "ours" else
                        others[who].ask(json.dumps({"work": name, "seed": seed})))
        if name == "greedy":
          same({who: seen[0] for who, seen in runs.items()})
          continue
        own = {"ours": ours.account["slots"]}  # in pages, more rows fit the same memory
        row = found[name] = {
            who: told(model.config, work._replace(slots=own.get(who, work.slots)), seen, rates)
            for who, seen in runs.items()}
        row["ours"] |= ours.account | {"seen": runs["ours"][-1]["seen"]}
        if sizes.decode:
          row["ours"]["decoding"] = decoding(model, params, work, sizes, row["ours"]["seconds"],
                                             rates)
    finally:
      for other in others.values():
        other.close()
  return {"works": found, "peers": {name: other.versions for name, other in others.items()},
          "matmul_peak": peak, "bandwidth": stream}


def main(argv=None):
  """Measures, writes the JSON and returns its path."""
  asked = parse(argv)
  kind = "decode" if asked.sizes.decode else ""
  with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
    if asked.sizes.alone:
      return measure.write("sampler", asked, {"alone": {
          dtype: alone(asked.sizes, dtype) for dtype in asked.sizes.alone.split(",")}}, "alone")
    return measure.write("sampler", asked, run(asked.sizes), kind)


if __name__ == "__main__":
  main()
