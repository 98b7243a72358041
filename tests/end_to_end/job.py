"""A tiny job with every row of the recipe, run in processes of its own by the tests beside it.

  python -m tests.end_to_end.job WORKDIR BASES [--kill-in ROW:N] [--process I --port P] [--arm NAME]
    [--options]

With --kill-in it kills itself (SIGKILL) at the N-th event inside the stage ROW, inside a score
where ROW is `evaluate`, or inside a probe: an event is a file or checkpoint about to be written,
just written, or in the middle of being written, or an optimizer update.
"""

import argparse
import os
import pathlib
import signal
import threading

import jax
import numpy as np
from etils import epath

from configs import arithmetic, common
from s2d_jax import (
  checkpoint,
  files,
  loop,
  models,
  recipe,
  rollouts,
  scoring,
  sharding,
  stage,
  tasks,
)
from s2d_jax.assets import tokenizer
from s2d_jax.models import hf
from s2d_jax.planning import Use

ARMS = recipe.ARMS | {
    "every_row": (Use("teacher_sft", "1h"), Use("teacher_grpo", "1h"), Use("forward_kl", "1h"),
                  Use("weighted_fkl", "1h"), Use("sft", "1h"), Use("reverse_kl", "1h"),
                  Use("student_grpo", "2h")),
}


def bases(folder):
  """Random bases of the arithmetic world's shape, much smaller: {"teacher", "student"} folders."""
  shape = {"model_type": "qwen3", "vocab_size": len(tokenizer.VOCABULARY), "head_dim": 8,
           "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
           "rope_theta": 1e4, "tie_word_embeddings": True, "max_position_embeddings": 64}
  for role, width, layers in (("teacher", 16, 2), ("student", 8, 1)):
    model = models.get(shape | {"hidden_size": width, "intermediate_size": 2 * width,
                                "num_hidden_layers": layers})
    rng = np.random.default_rng(width)
    params = jax.tree.map(
        lambda x, rng=rng: np.asarray(rng.normal(size=x.shape) / 4, np.float32),
        models.shapes(model.config))
    hf.save(pathlib.Path(folder) / role, model, params)
    tokenizer.write(pathlib.Path(folder) / role, 64)


def config(bases, arm, data):
  """The tiny arithmetic config on those bases: two or three steps of every row."""
  tiny = arithmetic.get_config("tiny")
  with tiny.unlocked():
    tiny.arms = arm
    tiny.teacher = f"{bases}/teacher"
    tiny.student = f"{bases}/student"
    tiny.data.dir = str(data)
    for hp in tiny.stages.values():
      hp.steps = 3
      hp.save_every = 1
      hp.sampling.max_tokens = 8
      hp.log_samples = 16
    tiny.stages.teacher_sft.sampling.max_tokens = 32
    tiny.stages.student_grpo.update({"epochs": 2, "minibatches": 2, "kl": "k3", "kl_coef": 0.1})
    tiny.evals.validation = common.evaluation(
        split="validation", problems=4,
        sampling=common.sampling(samples_per_prompt=4, max_tokens=8),
        statistics="avg,response_length", when="every 2", stages="student_grpo")
    tiny.stages.sft.lora.rank = 2
    tiny.probe.sampling.max_tokens = 8
    tiny.evals.test.sampling.max_tokens = 8
  return tiny


def set_options(tiny):
  """Gives the stages of a bridge every option that decides something between steps, and guides."""
  with tiny.unlocked():
    tiny.stages.forward_kl.allocate = {
        "interval": 1, "rule": "ensemble", "weights": "", "requirement": "", "kappa": 1.0,
        "beta": 0.5, "explore": 1, "problems": 6}
    tiny.stages.reverse_kl.foresee = {
        "candidates": 2, "stride": 2.0, "problems": 4, "samples": 2, "accept": "at_least",
        "signal": "reward", "leaves": "blocks"}
    tiny.stages.reverse_kl.guides = {"by": "family", "folders": {"2": tiny.student}}
    tiny.stages.reverse_kl.hint_tokens = 40
    tiny.probe.prefixes = 2


def kill_at_event(row, n):
  """Makes this process kill itself at the n-th event inside the stage `row`, a score or a probe."""
  remaining = [n]
  inside = [False]

  def enter(function, entered):
    def wrapped(plan, node, *args):
      inside[0] = entered(node)
      try:
        return function(plan, node, *args)
      finally:
        inside[0] = False
    return wrapped

  stage.train_node = enter(stage.train_node, lambda node: node.stage.name == row)
  scoring.evaluate = enter(scoring.evaluate, lambda role: row == "evaluate")
  scoring.probe = enter(scoring.probe, lambda role: row == "probe")

  def event():
    remaining[0] -= inside[0]
    if inside[0] and remaining[0] == 0:
      os.kill(os.getpid(), signal.SIGKILL)

  def around(function):
    def wrapped(*args, **kwargs):
      event()
      remaining[0] -= inside[0]
      if inside[0] and remaining[0] == 0:  # in the middle, or just after
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGKILL)).start()
      result = function(*args, **kwargs)
      event()
      return result
    return wrapped

  # A file is whole under its temporary name and not yet in place.
  local = type(epath.Path("/"))
  replace = local.replace
  local.replace = lambda self, target: (event(), replace(self, target))[1]
  for owner, name in ((files, "write_json"), (checkpoint, "save_final"), (hf, "save"),
                      (checkpoint, "drop_steps"), (checkpoint.Checkpoints, "save"),
                      (rollouts.Store, "add"), (loop, "_updates")):
    setattr(owner, name, around(getattr(owner, name)))


def main():
  """Runs the job."""
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("bases")
  parser.add_argument("--kill-in")
  parser.add_argument("--process", type=int)
  parser.add_argument("--port", type=int)
  parser.add_argument("--arm", default="every_row")
  parser.add_argument("--mesh", default="1,1,1")
  parser.add_argument("--options", action="store_true")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  # Compiling takes nearly all of a job's time: XLA skips most optimizations.
  jax.config.update("jax_disable_most_optimizations", True)
  if args.process is not None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{args.port}", 2, args.process)
  jax.config.update("jax_transfer_guard", "disallow")
  run_config = config(args.bases, args.arm, f"{args.bases}/data")
  if args.options:
    set_options(run_config)
  if args.kill_in:
    # The undisturbed job has stored every program. A process that is killed while it stores one
    # would leave half a file for all other tests.
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 2**62)
    row, n = args.kill_in.split(":")
    kill_at_event(row, int(n))
  with jax.set_mesh(sharding.make_mesh(tuple(int(n) for n in args.mesh.split(",")))):
    # Random models never add right; an arbitrary reward gives their groups a gradient.
    task = tasks.get(run_config)._replace(reward=lambda problem, text: float(len(text) % 2))
    recipe.run(run_config, args.workdir, task, arms=ARMS)


if __name__ == "__main__":
  main()
