"""Seconds and memory of a forward pass and of one optimizer update, beside PyTorch's, in turn.

  python -m benchmarks.step [--objective=reverse_kl] [--rows=8] [--tokens=512] [--microbatches=1]

Random tokens, every one of weight 1. With the default objective (negative log-likelihood) and torch
installed, transformers runs the same weights on the same tokens, eager and compiled: after each of
our repeats one of theirs, so that all see the same machine. Their loss must be ours, before the
first update and after the last. `profile` has the parts of our update, each compiled alone. Peak
memory is the compiled program's own account for us, the process's or the device's for them.
"""

import importlib.util
import pathlib
import statistics
import sys
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from configs import common
from s2d_jax import ledger, models, objectives, optim, rollouts, sharding, training
from s2d_jax.losses import blockwise
from s2d_jax.models import hf

OBJECTIVES = {
    "negative_log_likelihood": objectives.NEGATIVE_LOG_LIKELIHOOD, "grpo": objectives.GRPO,
    "forward_kl": objectives.FORWARD_KL, "reverse_kl": objectives.REVERSE_KL,
    "jsd": objectives.JSD}
FULL = {"shape": "qwen3-29m", "objective": "negative_log_likelihood", "rows": 8, "tokens": 512,
        "microbatches": 1, "block": 512, "dtype": "float32", "remat": "none",
        "attention": "auto", "repeats": 7, "peak": 4096}
SMOKE = FULL | {"shape": "qwen3-smoke", "rows": 2, "tokens": 8, "block": 8, "repeats": 1,
                "peak": 16}
PEERS = {"pytorch_eager": "eager", "pytorch_compiled": "compile"}
parse = measure.parser(__doc__, FULL, SMOKE)


def random_batch(vocab_size, rows, tokens):
  """A Batch of full rows, every token of weight 1: what a step costs without padding."""
  rng = np.random.default_rng(0)
  def ids():
    return rng.integers(0, vocab_size, (rows, tokens), dtype=np.int32)
  def normal(mean=0.0):
    return rng.normal(mean, 1.0, (rows, tokens)).astype(np.float32)
  ones = np.ones((rows, tokens), np.int32)
  return rollouts.Batch(
      inputs_BT=ids(), targets_BT=ids(), segments_BT=ones, weight_BT=ones.astype(np.float32),
      count_BT=ones.astype(np.float32),
      positions_BT=np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)), advantage_BT=normal(),
      old_logp_BT=normal(-10.0), sampler_logp_BT=normal(-10.0),
      behaviour_logp_BT=normal(-10.0),
      sequence_BT=np.tile(np.arange(rows, dtype=np.int32)[:, None], (1, tokens)))


class Ours:
  """Our model, compiled: forward() and train() give the loss."""

  def __init__(self, sizes):
    if sizes.objective not in OBJECTIVES:
      raise ValueError(f"there is no objective {sizes.objective!r}: choose "
                       f"{', '.join(OBJECTIVES)}.")
    objective, mesh = OBJECTIVES[sizes.objective], sharding.current_mesh()
    how = (sizes.shape, sizes.dtype, sizes.remat, sizes.attention)
    self.model, params = measure.model(*how)
    self.start = jax.device_get(params)
    hp = SimpleNamespace(**common.grpo(), **common.reverse_kl(), pi=0.5,
                         microbatches=sizes.microbatches, block=sizes.block)
    self.optimizer = optim.adamw(1e-4, models.axes(self.model.config), weight_decay=0.1)
    self.guided = objective.uses_guide(hp)
    guide, self.guide_params = measure.model(*how, seed=1) if self.guided else (None, None)
    place = sharding.weight_shardings(
        mesh, models.axes(self.model.config), models.shapes(self.model.config))
    self.state = training.init(self.optimizer, mesh, jax.device_put(params, place))
    if self.guided:
      self.guide_params = jax.device_put(self.guide_params, place)
    self.batch = random_batch(self.model.config.vocab_size, sizes.rows, sizes.tokens)
    self.placed = sharding.put_batch(self.batch, mesh)
    step = training.jit_update(self.model, guide, objective, self.optimizer, hp,
                       training.shardings(self.state))
    score = training.token_logps(self.model, objectives.logp, hp)
    self.program, self.compile_seconds = measure.stopwatch(
        lambda: step.lower(self.state, self.guide_params, self.placed).compile())
    self.scored = score.lower(self.state.params, self.placed).compile()

  def forward(self):
    """One forward pass: the mean negative log-likelihood."""
    return -float(np.mean(jax.device_get(self.scored(self.state.params, self.placed)[0])))

  def train(self):
    """One update: its loss."""
    self.state, metrics = self.program(self.state, self.guide_params, self.placed)
    return float(jax.block_until_ready((self.state, metrics))[1]["loss"])


def profile(ours, sizes):
  """Seconds of the parts of an update, each compiled by itself: where the time goes."""
  batch, params = ours.placed, ours.state.params
  def features(params):
    return ours.model.apply(params, batch.inputs_BT, batch.positions_BT, batch.segments_BT)[0]
  def head(head):
    return -jnp.sum(blockwise.logp(head, batch.targets_BT, sizes.block)[0])
  features_BTD = jax.jit(features)(params)
  unembedded = blockwise.Head(features_BTD, ours.model.unembed(params))
  parts = {
      "features": (features, params),
      "features_and_gradient": (jax.grad(lambda p: jnp.sum(features(p) ** 2)), params),
      "loss": (head, unembedded), "loss_and_gradient": (jax.grad(head), unembedded),
      "optimizer": (lambda s: ours.optimizer.update(s.params, s.opt_state, s.params), ours.state)}
  found = {}
  for name, (part, given) in parts.items():
    program = jax.jit(part).lower(given).compile()
    found[name] = measure.timed(lambda p=program, g=given: p(g), sizes.repeats)["seconds"]
  return found


def peers(ours, sizes, scratch):
  """{name: Peer} on our weights and tokens, or none where they have no part."""
  if importlib.util.find_spec("torch") is None or sizes.objective != "negative_log_likelihood":
    return {}
  folder, tokens = str(pathlib.Path(scratch) / "model"), f"{scratch}/tokens.npz"
  hf.save(folder, ours.model, ours.start)
  np.savez(tokens, inputs=ours.batch.inputs_BT, targets=ours.batch.targets_BT)
  module = [sys.executable, "-m", "benchmarks.peers.pytorch", folder, tokens, sizes.dtype]
  return {name: measure.Peer([*module, how]) for name, how in PEERS.items()}


def run(sizes):
  """{what a forward pass and an update need and take, ours and PyTorch's}."""
  ours = Ours(sizes)
  with tempfile.TemporaryDirectory() as scratch:
    others = peers(ours, sizes, scratch)
    seen = {what: {name: [] for name in ("ours", *others)} for what in ("forward", "train")}
    try:
      for what, found in seen.items():
        for _ in range(sizes.repeats + 1):
          loss, seconds = measure.stopwatch(getattr(ours, what))
          found["ours"].append({"seconds": seconds, "loss": loss})
          for name, other in others.items():
            found[name].append(other.ask(what))
    finally:
      for other in others.values():
        other.close()
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  forward = ledger.forward_flops(ours.model.config, np.full(sizes.rows, sizes.tokens))
  flops = {"forward": forward, "train": forward * (3 + ours.guided)}  # backward is two forwards
  def told(what, runs):
    seconds = statistics.median(run["seconds"] for run in runs[1:])
    return {"seconds": seconds, "repeats": [run["seconds"] for run in runs[1:]],
            "first": runs[0]["seconds"], "first_loss": runs[0]["loss"],
            "last_loss": runs[-1]["loss"],  # after as many updates
            "tokens_per_second": sizes.rows * sizes.tokens / seconds,
            "share_of_peak": flops[what] / seconds / peak["flops_per_second"],
            **({"peak_bytes": runs[-1]["peak_bytes"]} if "peak_bytes" in runs[-1] else {})}
  table = {what: {name: told(what, runs) for name, runs in found.items()}
           for what, found in seen.items()}
  for name in others:
    for what, when in (("forward", "first_loss"), ("train", "last_loss")):
      mine, yours = (table[what][who][when] for who in ("ours", name))
      if abs(mine - yours) > 1e-3 * abs(mine):
        raise ValueError(f"{name} has the {what} {when} {yours} and we {mine} on the same tokens: "
                         "do not time what is not the same.")
  return {**table, "flops": flops, "compile_seconds": ours.compile_seconds,
          "profile": profile(ours, sizes),
          "memory": measure.memory(ours.program), "forward_memory": measure.memory(ours.scored),
          "peers": {name: other.versions for name, other in others.items()}, "matmul_peak": peak}


def main(argv=None):
  """Measures, writes the JSON and returns its path."""
  asked = parse(argv)
  objective = asked.sizes.objective
  kind = "" if objective == FULL["objective"] else objective.replace("_", "-")
  with jax.set_mesh(sharding.make_mesh()):
    return measure.write("step", asked, run(asked.sizes), kind)


if __name__ == "__main__":
  main()
