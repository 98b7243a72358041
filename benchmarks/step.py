"""Seconds and memory of a forward pass and of one optimizer update, beside PyTorch's, in turn.

  python -m benchmarks.step [--objective=reverse_kl] [--rows=8] [--tokens=512] [--microbatches=1]

The tokens are random and all have weight 1. With the default objective (negative log-likelihood)
and torch installed, transformers runs the same weights on the same tokens, eager and compiled.
On a CPU repeats alternate between us and them, so that a change of the machine's load affects all;
on an accelerator each side's run back to back. Their
loss must equal ours before the first update and after the last. `profile` has the parts of our
update, each compiled alone. Peak memory is the compiled program's account for us, and that of the
process or the device for them.
"""

import importlib.util
import pathlib
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from configs import common
from s2d_jax import ledger, models, objectives, optim, rollouts, sharding, training
from s2d_jax.losses import blockwise
from s2d_jax.models import hf
from s2d_jax.rollouts import Batch
from s2d_jax.sharding import Params

OBJECTIVES = {
    "negative_log_likelihood": objectives.NEGATIVE_LOG_LIKELIHOOD, "grpo": objectives.GRPO,
    "forward_kl": objectives.FORWARD_KL, "reverse_kl": objectives.REVERSE_KL,
    "jsd": objectives.JSD}
FULL = {"shape": "qwen3-29m", "objective": "negative_log_likelihood", "rows": 8, "tokens": 512,
        "microbatches": 1, "block": 512, "dtype": "float32", "remat": "none",
        "attention": "auto", "repeats": 7, "seconds": 3600.0, "peak": 4096,
        "tasks": "forward,train", "rivals": "pytorch_eager,pytorch_compiled"}
SMOKE = FULL | {"shape": "qwen3-smoke", "rows": 2, "tokens": 8, "block": 8, "repeats": 1,
                "peak": 16}
PEERS = {"pytorch_eager": "eager", "pytorch_compiled": "compile"}
parse = measure.parser(__doc__, FULL, SMOKE)


def random_batch(vocab_size: int, rows: int, tokens: int) -> Batch:
  """A Batch of random tokens without padding, each of weight 1."""
  rng = np.random.default_rng(0)
  def ids() -> np.ndarray:
    return rng.integers(0, vocab_size, (rows, tokens), dtype=np.int32)
  def normal(mean: float = 0.0) -> np.ndarray:
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
  """Our model, compiled: forward() and train() return the loss."""

  def __init__(self, sizes: Namespace) -> None:
    if sizes.objective not in OBJECTIVES:
      raise ValueError(f"there is no objective {sizes.objective!r}: choose "
                       f"{', '.join(OBJECTIVES)}.")
    objective = OBJECTIVES[sizes.objective]
    mesh = sharding.current_mesh()
    model_options = (sizes.shape, sizes.dtype, sizes.remat, sizes.attention)
    self.model, params = measure.model(*model_options)
    self.start = jax.device_get(params) if rivals(sizes) else None
    hp = SimpleNamespace(**common.grpo(), **common.reverse_kl(), pi=0.5,
                         microbatches=sizes.microbatches, block=sizes.block)
    self.optimizer = optim.adamw(1e-4, models.axes(self.model.config), weight_decay=0.1)
    self.guided = objective.uses_guide(hp)
    layout = sharding.weight_shardings(
        mesh, models.axes(self.model.config), models.shapes(self.model.config))
    self.state = training.init(self.optimizer, mesh, jax.device_put(params, layout))
    guide, self.guide_params = None, None
    if self.guided:
      guide, guide_params = measure.model(*model_options, seed=1)
      self.guide_params = jax.device_put(guide_params, layout)
    self.batch = random_batch(self.model.config.vocab_size, sizes.rows, sizes.tokens)
    self.placed = sharding.put_batch(self.batch, mesh)
    step = training.jit_update(self.model, guide, objective, self.optimizer, hp,
                       training.shardings(self.state))
    token_logps = training.token_logps(self.model, objectives.logp, hp)
    self.program, self.compile_seconds = measure.stopwatch(
        lambda: step.lower(self.state, self.guide_params, self.placed).compile())
    self.token_logps = token_logps.lower(self.state.params, self.placed).compile()

  def ask(self, task: str) -> measure.Json:
    """Runs a forward pass or an update: its seconds, and `value` on the device for `read`."""
    run = {"forward": self.forward, "train": self.train}[task]
    (value, _), seconds = measure.stopwatch(lambda: jax.block_until_ready((run(), self.state)))
    return {"seconds": seconds, "value": value}

  def read(self, answer: measure.Json) -> measure.Json:
    """The answer with its loss in place of `value`: fetched after all repeats, not between them."""
    value = jax.device_get(answer["value"])
    loss = float(value["loss"]) if isinstance(value, dict) else -float(np.mean(value))
    return {"seconds": answer["seconds"], "loss": loss}

  def forward(self) -> jax.Array:
    """Runs a forward pass; the log-probability of each token."""
    return self.token_logps(self.state.params, self.placed)[0]

  def train(self) -> dict[str, jax.Array]:
    """Makes an update; its metrics."""
    self.state, metrics = self.program(self.state, self.guide_params, self.placed)
    return metrics


def profile(ours: Ours, sizes: Namespace) -> dict[str, float]:
  """Seconds of the parts of an update, each compiled by itself."""
  batch, params = ours.placed, ours.state.params
  def features(params: Params) -> jax.Array:
    return ours.model.apply(params, batch.inputs_BT, batch.positions_BT, batch.segments_BT)[0]
  def loss(head: blockwise.Head) -> jax.Array:
    return -jnp.sum(blockwise.logp(head, batch.targets_BT, sizes.block)[0])
  features_BTD = jax.jit(features)(params)
  unembedded = blockwise.Head(features_BTD, ours.model.unembed(params))
  parts = {
      "features": (features, params),
      "features_and_gradient": (jax.grad(lambda p: jnp.sum(features(p) ** 2)), params),
      "loss": (loss, unembedded), "loss_and_gradient": (jax.grad(loss), unembedded),
      "optimizer": (lambda s: ours.optimizer.update(s.params, s.opt_state, s.params), ours.state)}
  found = {}
  for name, (part, argument) in parts.items():
    program = jax.jit(part).lower(argument).compile()
    found[name] = measure.timed(lambda p=program, x=argument: p(x), sizes.repeats)["seconds"]
  return found


def rivals(sizes: Namespace) -> list[str]:
  """The names of the rivals; none without torch and for other objectives."""
  if importlib.util.find_spec("torch") is None or sizes.objective != "negative_log_likelihood":
    return []
  return [name for name in sizes.rivals.split(",") if name]


def peers(ours: Ours, sizes: Namespace, scratch: str) -> dict[str, measure.Peer]:
  """{name: Peer} on our weights and tokens."""
  if not rivals(sizes):
    return {}
  folder, tokens = str(pathlib.Path(scratch) / "model"), f"{scratch}/tokens.npz"
  hf.save(folder, ours.model, ours.start)
  np.savez(tokens, inputs=ours.batch.inputs_BT, targets=ours.batch.targets_BT)
  module = [sys.executable, "-m", "benchmarks.peers.pytorch", folder, tokens, sizes.dtype]
  return {name: measure.Peer([*module, PEERS[name]], sizes.seconds) for name in rivals(sizes)}


def summary(runs: Sequence[measure.Json], tokens: int, flops: float,
            flops_per_second: float) -> measure.Json:
  """Medians of the runs after the first, and the losses of the first and the last run.

  `tokens` and `flops` are those of one run; `flops_per_second` is the machine's peak.
  """
  seconds = [run["seconds"] for run in runs[1:]]
  median = statistics.median(seconds)
  found = {"seconds": median, "repeats": seconds, "first": runs[0]["seconds"],
           "first_loss": runs[0]["loss"], "last_loss": runs[-1]["loss"],
           "tokens_per_second": tokens / median,
           "share_of_peak": flops / median / flops_per_second}
  if "peak_bytes" in runs[-1]:
    found["peak_bytes"] = runs[-1]["peak_bytes"]
  return found


def check_equal(task: str, runs: Mapping[str, Sequence[measure.Json]], dtype: str) -> None:
  """Raises ValueError if a rival's loss differs from ours at the first or the last run of both.

  In bfloat16 only the first is compared, which is before any update. Each side rounds its
  activations in another order, and updates carry the differences on: after six the losses of one
  model were 0.4 % apart. The result has both last losses.
  """
  for name, answers in runs.items():
    # The last loss is compared after equally many updates.
    last = min(len(answers), len(runs["ours"])) - 1
    for number in ((0, last) if dtype == "float32" else (0,)):
      mine = runs["ours"][number]["loss"]
      theirs = answers[number]["loss"]
      if abs(mine - theirs) > 1e-3 * abs(mine):
        raise ValueError(f"{name} has the {task} loss {theirs} in run {number} and we {mine} on "
                         "the same tokens: time only equal computations.")


def run(sizes: Namespace, save: Callable[[measure.Json], Any]) -> measure.Json:
  """Seconds and memory of a forward pass and of an update, ours and PyTorch's.

  `save` gets the result as far as it has come.
  """
  ours = Ours(sizes)
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  forward = ledger.forward_flops(ours.model.config, np.full(sizes.rows, sizes.tokens))
  flops = {"forward": forward, "train": forward * (3 + ours.guided)}  # backward is two forwards
  tokens = sizes.rows * sizes.tokens
  found = {"flops": flops, "compile_seconds": ours.compile_seconds,
           "memory": measure.memory(ours.program),
           "forward_memory": measure.memory(ours.token_logps), "matmul_peak": peak}
  with tempfile.TemporaryDirectory() as scratch:
    others = peers(ours, sizes, scratch)
    found["peers"] = {name: other.versions for name, other in others.items()}
    try:
      for task in sizes.tasks.split(","):
        def add(runs: dict[str, list[measure.Json]], task: str = task) -> None:
          read = runs | {"ours": [ours.read(answer) for answer in runs["ours"]]}
          found[task] = {name: summary(answers, tokens, flops[task], peak["flops_per_second"])
                         for name, answers in read.items()}
          # Saved first: on an accelerator minutes of measurement precede the comparison.
          save(found)
          check_equal(task, read, sizes.dtype)
        sides = {"ours": lambda _, task=task: ours.ask(task)} | {
            name: lambda _, other=other, task=task: other.ask(task)
            for name, other in others.items()}
        measure.alternate(sides, sizes.repeats, sizes.seconds, add)
    finally:
      for other in others.values():
        other.close()
  return found | {"profile": profile(ours, sizes)}


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Measures, writes the JSON and returns its path."""
  options = parse(argv)
  objective = options.sizes.objective
  kind = "" if objective == FULL["objective"] else objective.replace("_", "-")
  with jax.set_mesh(sharding.make_mesh()):
    found = run(options.sizes, lambda found: measure.save("step", options, found, kind))
    return measure.write("step", options, found, kind)


if __name__ == "__main__":
  main()
