"""A tiny job with every row of the recipe, run in processes of its own by the tests beside it.

  python -m tests.end_to_end.job WORKDIR BASES [--kill-in ROW:N [--signal KILL]]
    [--full-after SECONDS | --full-in ROW:N | --vanish-in ROW:N]
    [--process I --processes N --port P] [--mesh D,F,T]
    [--arm NAME] [--options] [--unprobed] [--redo FOLDER] [--counts FILE]

With --kill-in it sends itself a signal, KILL or TERM, at the N-th event inside the stage ROW,
inside a score where ROW is `evaluate`, or inside a probe: an event is a file or checkpoint about to
be written, just written, or in the middle of being written, or so of an optimizer update, a search
and a decision. ROW:FUNCTION:N counts those of one function, such as Checkpoints.save. With
--full-after no file takes a byte from that moment on, as on a full disk, and with --full-in from
that event on. With --vanish-in the folder of the stage ROW is removed at that event. With --counts
each process writes what it has read and written to FILE.I, JSON.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import threading

import jax
import numpy as np
from etils import epath
from jax._src import compiler, distributed  # of JAX 0.10: what stores programs has no public name

from configs import arithmetic, common
from s2d_jax import (
  checkpoint,
  checksums,
  command,
  files,
  foresee,
  loop,
  manifest,
  models,
  probing,
  recipe,
  rollouts,
  scoring,
  sharding,
  stage,
  stops,
  tasks,
)
from s2d_jax.assets import tokenizer
from s2d_jax.models import hf, shards
from s2d_jax.planning import Use

# Wall-clock, and what depends on it, apart from everything else for this reason; and folders that
# a run has made again.
NOT_COMPARED = ("timing", "starts", "tensorboard", "writer.lock", "checksums", "replaced")
LOST_SECONDS = 15.0  # a process that is silent for so long has died: the others end too
ARMS = recipe.ARMS | {
    "every_row": (Use("teacher_sft", "1h"), Use("teacher_grpo", "1h"), Use("forward_kl", "1h"),
                  Use("weighted_fkl", "1h"), Use("sft", "1h"), Use("reverse_kl", "1h"),
                  Use("self_distillation", "1h"), Use("student_grpo", "2h")),
    "two_rows": (Use("sft", "1h"), Use("reverse_kl", "1h")),
    "one_row": (Use("reverse_kl", "1h"),),
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
    # As docs/losses.md has it; no shipped config has this row.
    tiny.stages.self_distillation = tiny.stages.reverse_kl.to_dict() | {"hint_tokens": 32}
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


def act_at_event(event_name, action):
  """Makes this process act at an event: the N-th in the stage ROW, a score or a probe.

  Args:
    event_name: ROW:N, or ROW:FUNCTION:N, which counts the events of one function alone. Each call
      has three: beginning, middle and end.
  """
  row, *chosen, n = event_name.split(":")
  remaining = [int(n)]
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

  def counted(name):
    """Counts an event; whether it is the one to act at."""
    counts = inside[0] and name in (chosen or [name])
    remaining[0] -= counts
    return counts and remaining[0] == 0

  def event(name):
    if counted(name):
      action()

  def is_heartbeat(path):
    """Whether a file is the lock of a stage that has begun."""
    # How often it is written depends on the machine's load, and events should not.
    path = epath.Path(path)
    return path.name == files.LOCK and path.exists()

  def around(function):
    name = function.__qualname__
    def wrapped(*args, **kwargs):
      if function is write_json and is_heartbeat(args[0]):
        return function(*args, **kwargs)
      event(name)
      if counted(name):  # in the middle, or just after
        threading.Timer(0.01, action).start()
      result = function(*args, **kwargs)
      event(name)
      return result
    return wrapped

  write_json = files.write_json
  # A file is whole under its temporary name and not yet in place.
  local = type(epath.Path("/"))
  replace = local.replace
  local.replace = lambda self, target: (
      is_heartbeat(target) or event("replace"), replace(self, target))[1]
  for owner, name in ((files, "write_json"), (checkpoint, "save_final"), (hf, "save"),
                      (checkpoint, "drop_steps"), (checkpoint.Checkpoints, "save"),
                      (rollouts.Store, "add"), (loop, "_updates"), (foresee, "search"),
                      (probing.Allocation, "decide")):
    setattr(owner, name, around(getattr(owner, name)))


def facts(workdir):
  """{relative path: bytes} of everything in a work folder that must not depend on a kill."""
  found = {}
  for path in sorted(p for p in workdir.rglob("*") if p.is_file()):
    name = path.relative_to(workdir)
    # A hidden file is what a killed write left behind; nothing reads it.
    if {*name.parts} & {"checkpoints", *NOT_COMPARED} or path.name.startswith("."):
      continue
    data = path.read_bytes()
    if path.name == "ledger.json":
      data = {k: v for k, v in json.loads(data).items() if not k.startswith("device_seconds")}
    found[str(name)] = data
  return found


def join(process, processes, port):
  """Makes this process one of several on this machine."""
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize = functools.partial(
      jax.distributed.initialize, f"localhost:{port}", processes, process)
  stops.LOST_SECONDS = LOST_SECONDS
  stops.connect()
  write = compiler._cache_write
  lock = threading.Lock()

  # JAX lets process 0 alone store programs. On CPUs each process has keys of its own, so the
  # others would compile everything in every start.
  def stored(*args):
    with lock:
      distributed.global_state.process_id = 0
      try:
        write(*args)
      finally:
        distributed.global_state.process_id = process

  compiler._cache_write = stored


def fill_disk():
  """From now on no file of this process takes a byte, as on a full disk; pipes do."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def remove_folder(workdir, event_name):
  """Removes the folder of the stage that an event, ROW:N, is inside."""
  for folder in pathlib.Path(workdir).glob(f"{event_name.partition(':')[0]}-*"):
    shutil.rmtree(folder, ignore_errors=True)


def counting():
  """Counts of the reads and writes of this process from now on, a dict that grows.

  weight_bytes of the bases, rewards (rows that it scored), checked (files whose checksums it
  computed) and written (files of logs, results and stores).
  """
  found = {"weight_bytes": 0, "rewards": 0, "checked": 0, "written": 0}

  def counted(owner, name, key, size):
    function = getattr(owner, name)
    def wrapped(*args, **kwargs):
      result = function(*args, **kwargs)
      found[key] += size(result)
      return result
    setattr(owner, name, wrapped)

  counted(shards, "read", "weight_bytes", lambda part: part.nbytes)
  counted(checksums, "_measured", "checked", lambda _: 1)
  counted(files, "write", "written", lambda _: 1)
  return found


def parse(argv):
  """The command line's arguments."""
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("bases")
  parser.add_argument("--kill-in")
  parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
  parser.add_argument("--full-after", type=float)
  parser.add_argument("--full-in")
  parser.add_argument("--vanish-in")
  parser.add_argument("--process", type=int)
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--port", type=int)
  parser.add_argument("--arm", default="every_row")
  parser.add_argument("--mesh", default="1,1,1")
  parser.add_argument("--options", action="store_true")
  parser.add_argument("--unprobed", action="store_true")
  parser.add_argument("--redo", action="append", default=[])
  parser.add_argument("--counts")
  return parser.parse_args(argv)


def main(argv):
  """Runs the job."""
  args = parse(argv)
  jax.config.update("jax_platforms", "cpu")
  # Compiling takes nearly all of a job's time: XLA skips most optimizations.
  jax.config.update("jax_disable_most_optimizations", True)
  if args.process is not None:
    join(args.process, args.processes, args.port)
  jax.config.update("jax_transfer_guard", "disallow")
  run_config = config(args.bases, args.arm, f"{args.bases}/data")
  if args.options:
    set_options(run_config)
  if args.unprobed:
    run_config.probe.problems = 0
  if args.kill_in:
    # The undisturbed job has stored every program. A process that is killed while it stores one
    # would leave half a file for all other tests.
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 2**62)
    number = signal.Signals[f"SIG{args.signal}"]
    act_at_event(args.kill_in, lambda: os.kill(os.getpid(), number))
  if args.full_in:
    act_at_event(args.full_in, fill_disk)
  if args.vanish_in:
    act_at_event(args.vanish_in, lambda: remove_folder(args.workdir, args.vanish_in))
  if args.full_after is not None:
    timer = threading.Timer(args.full_after, fill_disk)
    timer.daemon = True
    timer.start()
  manifest.set_aside(args.workdir, args.redo)
  counts = counting() if args.counts else {"rewards": 0}

  # Random models never add right; an arbitrary reward gives their groups a gradient.
  def reward(problem, text):
    counts["rewards"] += 1
    return float(len(text) % 2)

  mesh = sharding.make_mesh(tuple(int(n) for n in args.mesh.split(",")))
  with stops.watch(command.outcome), jax.set_mesh(mesh):
    recipe.run(run_config, args.workdir, tasks.get(run_config)._replace(reward=reward), arms=ARMS)
    # Within, because one process of several ends where the watch does.
    if args.counts:
      pathlib.Path(f"{args.counts}.{args.process or 0}").write_text(json.dumps(counts))


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
