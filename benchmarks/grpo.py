"""Seconds of one whole GRPO step, beside TRL's in turn: sample, reward, one update.

  python -m benchmarks.grpo [--prompts=8] [--samples=8] [--max_tokens=128] [--trl=PYTHON]

The programs are those that a stage of the recipe compiles, the reward is the number of even ids in
an answer, every answer has `max_tokens` tokens, and no guide takes part. `--trl` names the Python
of an environment that has TRL (`peers/README.md`): its GRPOTrainer takes the same step from the
same weights, in one piece and in as many as we do. All must have the same entropy at the first
step, when no weight has moved.
"""

import json
import statistics
import tempfile

import jax
import ml_collections
import numpy as np

from benchmarks import measure
from configs import common
from s2d_jax import (
  compiling,
  ledger,
  loop,
  models,
  objectives,
  optim,
  rollouts,
  sampler,
  sharding,
  training,
)
from s2d_jax.compiling import Role, Samplers, StageModels
from s2d_jax.losses import grpo
from s2d_jax.models import hf

FULL = {"shape": "qwen3-29m", "prompts": 8, "samples": 8, "prompt_tokens": 64, "max_tokens": 128,
        "microbatches": 16, "block": 512, "dtype": "float32", "remat": "none", "attention": "auto",
        "lr": 1e-5, "repeats": 5, "peak": 4096, "trl": ""}
SMOKE = FULL | {"shape": "qwen3-smoke", "prompts": 2, "samples": 2, "prompt_tokens": 4,
                "max_tokens": 8, "microbatches": 2, "block": 8, "repeats": 1, "peak": 16}
parse = measure.parser(__doc__, FULL, SMOKE)


class Ours:
  """Our stage's programs, compiled; `ask` takes a step."""

  def __init__(self, sizes):
    mesh = self.mesh = sharding.current_mesh()
    self.model, params = measure.model(sizes.shape, sizes.dtype, sizes.remat, sizes.attention)
    self.start, axes = jax.device_get(params), models.axes(self.model.config)
    params = jax.device_put(params, sharding.weight_shardings(
        mesh, axes, models.shapes(self.model.config)))
    hp = ml_collections.ConfigDict(common.stage(
        steps=1000, prompts=sizes.prompts, optim=common.adamw(lr=sizes.lr),
        sampling=common.sampling(samples_per_prompt=sizes.samples,
                                 max_tokens=sizes.max_tokens),
        microbatches=sizes.microbatches, block=sizes.block) | common.grpo())
    optimizer = optim.make(hp.optim, loop.update_count(hp), axes)
    self.state = training.init(optimizer, mesh, params)
    ids = np.random.default_rng(0).integers(
        0, self.model.config.vocab_size, (sizes.prompts, sizes.prompt_tokens)).tolist()
    self.prompts = [rollouts.Prompt(i, tuple(row)) for i, row in enumerate(ids)]
    learner = Role(self.model, params)
    actor = Role(self.model, sharding.abstract(params))
    stage_models = StageModels(learner, None, actor, on_policy=True, guide=None)
    samplers = Samplers(sampler.Room(), sizes.prompt_tokens, stop_ids=(), decode=None)
    self.programs, self.compile_seconds = measure.stopwatch(
        lambda: compiling.compile_programs(stage_models, hp, objectives.GRPO, objectives.logp,
                                           optimizer, samplers))

  def ask(self, seed):
    """Takes a step: seconds, those of its parts, tokens and entropy."""
    programs, seconds = self.programs, {}
    rows, seconds["draw"] = measure.stopwatch(
        lambda: programs.sampler(self.state.params, self.prompts, (seed,)))
    def rewarded():
      even_B = [float(np.sum(rows.response(b) % 2 == 0)) for b in range(len(rows.response_BT))]
      advantage_PG = grpo.group_advantages(np.reshape(even_B, (len(self.prompts), -1)))
      advantage_B = advantage_PG.reshape(-1).astype(np.float32)
      return rollouts.batch(rows, advantage_B=advantage_B)
    batch, seconds["reward"] = measure.stopwatch(rewarded)
    def updated():
      placed = sharding.put_batch(batch, self.mesh)
      self.state, metrics = programs.update(self.state, None, placed, None)
      return {name: float(x) for name, x in sharding.fetch(metrics).items()}
    metrics, seconds["update"] = measure.stopwatch(updated)
    return {"seconds": sum(seconds.values()), "parts": seconds,
            "logp_gap_max": metrics["logp_gap_max"],
            "tokens": int(rows.response_length_B.sum()), "entropy": metrics["entropy"]}


def told(runs):
  """Medians of the steps after the first."""
  seconds = [run["seconds"] for run in runs[1:]]
  parts = {part: statistics.median(run["parts"][part] for run in runs[1:])
           for part in runs[0].get("parts", {})}
  most = {key: max(run[key] for run in runs) for key in ("logp_gap_max",) if key in runs[0]}
  return {"seconds": statistics.median(seconds), "repeats": seconds, "first": runs[0]["seconds"],
          "tokens": runs[0]["tokens"], "entropy": runs[0]["entropy"], **parts, **most}


def same(found):
  """Refuses to time what is not the same step."""
  mine = found["ours"]
  for name, other in found.items():
    if (other["tokens"] != mine["tokens"]
        or abs(other["entropy"] - mine["entropy"]) > 1e-2 * mine["entropy"]):
      raise ValueError(f"{name} has {other['tokens']} tokens of entropy {other['entropy']} and we "
                       f"{mine['tokens']} of {mine['entropy']}: do not time what is not the same.")


def peers(sizes, ours, scratch):
  """{name: Peer} on our weights and prompts."""
  if not sizes.trl:
    return {}
  hf.save(f"{scratch}/model", ours.model, ours.start)
  found = {}
  for name, microbatches in {"trl": 1, "trl_accumulated": sizes.microbatches}.items():
    path = f"{scratch}/{name}.json"
    with open(path, "w", encoding="utf-8") as file:
      json.dump(vars(sizes) | {"microbatches": microbatches,
                               "prompts": [list(p.tokens) for p in ours.prompts]}, file)
    found[name] = measure.Peer(
        [sizes.trl, "benchmarks/peers/trl_grpo.py", f"{scratch}/model", path])
  return found


def flops(config, sizes):
  """FLOPs of our step: each prompt read once, every token drawn, and three forwards in the update.

  Only tokens of an answer are unembedded.
  """
  read = ledger.forward_flops(config, [sizes.prompt_tokens], [0])
  whole = ledger.forward_flops(
      config, [sizes.prompt_tokens + sizes.max_tokens], [sizes.max_tokens])
  return sizes.prompts * (read + sizes.samples * (whole - read + 3 * whole))


def run(sizes):
  """{what a step takes, ours and TRL's}."""
  ours = Ours(sizes)
  with tempfile.TemporaryDirectory() as scratch:
    others = peers(sizes, ours, scratch)
    runs = {name: [] for name in ("ours", *others)}
    try:
      for seed in range(sizes.repeats + 1):
        for name, seen in runs.items():
          seen.append(ours.ask(seed) if name == "ours" else others[name].ask(seed))
    finally:
      for other in others.values():
        other.close()
  found = {name: told(seen) for name, seen in runs.items()}
  same(found)
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  work = flops(ours.model.config, sizes)
  for row in found.values():
    row["share_of_peak"] = work / row["seconds"] / peak["flops_per_second"]
  return {"step": found, "flops": work, "compile_seconds": ours.compile_seconds,
          "memory": {name: measure.memory(program) for name, program in (
              ("draw", ours.programs.sampler.compiled), ("update", ours.programs.update))},
          "peers": {name: other.versions for name, other in others.items()}, "matmul_peak": peak}


def main(argv=None):
  """Measures, writes the JSON and returns its path."""
  asked = parse(argv)
  with jax.set_mesh(sharding.make_mesh()):
    return measure.write("grpo", asked, run(asked.sizes))


if __name__ == "__main__":
  main()
