"""Seconds of one whole GRPO step, beside TRL's in turn: sample, reward, one update.

  python -m benchmarks.grpo [--prompts=8] [--samples=8] [--max_tokens=128] [--trl=PYTHON]
  python -m benchmarks.grpo --guide=qwen3-8b --shape=qwen3-1.7b --dtype=bfloat16 --remat=block

The programs are those that a stage of the recipe compiles. The reward is the number of even ids in
an answer, and every answer has `max_tokens` tokens. With `--guide` the step is one of on-policy
distillation: reverse KL to that model, which has random weights too, and no reward.

`--trl` names the Python of an environment that has TRL (`peers/README.md`). Its GRPOTrainer takes
the same step from the same weights, once with the whole batch at a time and once with as many
microbatches as we use. All must have the same entropy at the first step, before a weight has
changed.
"""

import json
import pathlib
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks import measure
from configs import common
from s2d_jax import (
  compiling,
  hosts,
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
from s2d_jax.compiling import Samplers
from s2d_jax.losses import grpo
from s2d_jax.models import hf
from s2d_jax.roles import Role, StageModels, resident

FULL = {"shape": "qwen3-29m", "prompts": 8, "samples": 8, "prompt_tokens": 64, "max_tokens": 128,
        "microbatches": 16, "block": 512, "dtype": "float32", "remat": "none", "attention": "auto",
        "lr": 1e-5, "repeats": 5, "seconds": 3600.0, "peak": 4096, "guide": "", "trl": ""}
SMOKE = FULL | {"shape": "qwen3-smoke", "prompts": 2, "samples": 2, "prompt_tokens": 4,
                "max_tokens": 8, "microbatches": 2, "block": 8, "repeats": 1, "peak": 16}
parse = measure.parser(__doc__, FULL, SMOKE)


class Ours:
  """Our stage's programs, compiled; `ask` takes a step."""

  def __init__(self, sizes: Namespace) -> None:
    mesh = sharding.current_mesh()
    self.mesh = mesh
    self.model, params = measure.model(sizes.shape, sizes.dtype, sizes.remat, sizes.attention)
    # A rival in another process starts from these; they would double a large model's memory.
    self.start = jax.device_get(params) if sizes.trl else None
    axes = models.axes(self.model.config)
    params = jax.device_put(params, sharding.weight_shardings(
        mesh, axes, models.shapes(self.model.config)))
    hp = ml_collections.ConfigDict(common.stage(
        steps=1000, prompts=sizes.prompts, optim=common.adamw(lr=sizes.lr),
        sampling=common.sampling(samples_per_prompt=sizes.samples,
                                 max_tokens=sizes.max_tokens),
        microbatches=sizes.microbatches, block=sizes.block)
        | (common.reverse_kl() if sizes.guide else common.grpo()))
    optimizer = optim.make(hp.optim, loop.update_count(hp), axes)
    self.state = training.init(optimizer, mesh, params)
    ids = np.random.default_rng(0).integers(
        0, self.model.config.vocab_size, (sizes.prompts, sizes.prompt_tokens)).tolist()
    self.prompts = [rollouts.Prompt(i, tuple(row)) for i, row in enumerate(ids)]
    learner = Role(self.model, params)
    actor = Role(self.model, sharding.abstract(params))
    guide = None
    if sizes.guide:
      model = models.get(measure.SHAPES.get(sizes.guide, sizes.guide), dtype=sizes.dtype,
                         attention=sizes.attention)
      guide = Role(model, measure.weights(model, models.frozen_shapes, seed=1))
    self.guide = guide
    stage_models = StageModels(learner, None, actor, on_policy=True, guide=guide)
    # As a stage has it: the cache gets what the device has left.
    held = sum(resident(stage_models, optimizer).values())
    samplers = Samplers(sampler.SamplerConfig(), sizes.prompt_tokens, stop_ids=(), decode=None,
                        memory=hosts.device_memory(), held=held)
    self.programs, self.compile_seconds = measure.stopwatch(
        lambda: compiling.compile_programs(
            stage_models, hp, objectives.REVERSE_KL if guide else objectives.GRPO,
            objectives.logp, optimizer, samplers))

  def ask(self, seed: int) -> measure.Json:
    """Takes a step: its seconds, the seconds of its parts, tokens and entropy."""
    programs = self.programs
    seconds = {}
    (rollout, _), seconds["draw"] = measure.stopwatch(
        lambda: programs.sampler(self.state.params, self.prompts, (seed,)))
    def rewarded_batch() -> rollouts.Batch:
      if self.guide:
        return rollouts.batch(rollout)
      even_B = [float(np.sum(rollout.response(b) % 2 == 0))
                for b in range(len(rollout.response_BT))]
      advantage_PG = grpo.group_advantages(np.reshape(even_B, (len(self.prompts), -1)))
      advantage_B = advantage_PG.reshape(-1).astype(np.float32)
      return rollouts.batch(rollout, advantage_B=advantage_B)
    batch, seconds["reward"] = measure.stopwatch(rewarded_batch)
    def update() -> dict[str, float]:
      placed = sharding.put_batch(batch, self.mesh)
      self.state, metrics = programs.update(
          self.state, self.guide and self.guide.params, placed, None)
      return {name: float(x) for name, x in jax.device_get(metrics).items()}
    metrics, seconds["update"] = measure.stopwatch(update)
    return {"seconds": sum(seconds.values()), "parts": seconds,
            "tokens": int(rollout.response_length_B.sum()), "loss": metrics["loss"],
            **{name: metrics[name] for name in ("logp_gap_max", "entropy") if name in metrics}}


def summary(runs: Sequence[measure.Json]) -> measure.Json:
  """Medians of the steps after the first."""
  seconds = [run["seconds"] for run in runs[1:]]
  parts = {part: statistics.median(run["parts"][part] for run in runs[1:])
           for part in runs[0].get("parts", {})}
  found = {"seconds": statistics.median(seconds), "repeats": seconds, "first": runs[0]["seconds"],
           "tokens": runs[0]["tokens"], **parts}
  # A step with a guide has no entropy.
  if "entropy" in runs[0]:
    found["entropy"] = runs[0]["entropy"]
  if "logp_gap_max" in runs[0]:
    found["logp_gap_max"] = max(run["logp_gap_max"] for run in runs)
  return found


def check_equal(found: Mapping[str, measure.Json]) -> None:
  """Raises ValueError if a rival's tokens or first entropy differ from ours."""
  mine = found["ours"]
  for name, other in found.items():
    if (other["tokens"] != mine["tokens"]
        or abs(other["entropy"] - mine["entropy"]) > 1e-2 * mine["entropy"]):
      raise ValueError(f"{name} has {other['tokens']} tokens of entropy {other['entropy']} and we "
                       f"{mine['tokens']} of {mine['entropy']}: time only equal steps.")


def peers(sizes: Namespace, ours: Ours, scratch: str) -> dict[str, measure.Peer]:
  """{name: Peer} on our weights and prompts; empty without --trl."""
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
        [sizes.trl, "benchmarks/peers/trl_grpo.py", f"{scratch}/model", path], sizes.seconds)
  return found


def flops(ours: Ours, sizes: Namespace) -> float:
  """FLOPs of our step: prompts read once, tokens sampled, and three forward passes of the update.

  A guide adds one forward pass of its own. Only tokens of an answer are unembedded.
  """
  config = ours.model.config
  read = ledger.forward_flops(config, [sizes.prompt_tokens], [0])
  whole = ledger.forward_flops(
      config, [sizes.prompt_tokens + sizes.max_tokens], [sizes.max_tokens])
  guided = 0.0
  if ours.guide:
    guided = ledger.forward_flops(ours.guide.model.config,
                                  [sizes.prompt_tokens + sizes.max_tokens], [sizes.max_tokens])
  return sizes.prompts * (read + sizes.samples * (whole - read + 3 * whole + guided))


def run(sizes: Namespace, save: Callable[[measure.Json], Any]) -> measure.Json:
  """Seconds and memory of a step, ours and TRL's; `save` gets the result as far as it has come."""
  ours = Ours(sizes)
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  step_flops = flops(ours, sizes)
  found = {"flops": step_flops, "compile_seconds": ours.compile_seconds,
           "memory": {name: measure.memory(program) for name, program in (
               ("draw", ours.programs.sampler.decode_program), ("update", ours.programs.update))},
           "matmul_peak": peak}
  def add(runs: dict[str, list[measure.Json]]) -> None:
    found["step"] = {name: summary(answers) for name, answers in runs.items()}
    check_equal(found["step"])
    for row in found["step"].values():
      row["share_of_peak"] = step_flops / row["seconds"] / peak["flops_per_second"]
    save(found)
  with tempfile.TemporaryDirectory() as scratch:
    others = peers(sizes, ours, scratch)
    found["peers"] = {name: other.versions for name, other in others.items()}
    sides = {"ours": ours.ask} | {name: other.ask for name, other in others.items()}
    try:
      measure.alternate(sides, sizes.repeats, sizes.seconds, add)
    finally:
      for other in others.values():
        other.close()
  return found


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Measures, writes the JSON and returns its path."""
  options = parse(argv)
  with jax.set_mesh(sharding.make_mesh()):
    kind = "guided" if options.sizes.guide else ""
    found = run(options.sizes, lambda found: measure.save("grpo", options, found, kind))
    return measure.write("grpo", options, found, kind)


if __name__ == "__main__":
  main()
