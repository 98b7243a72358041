"""Damage on disk, full disks and lost folders: a run goes on to equal bits, or names the file.

Each fault is done to a copy of an interrupted run, or of a finished one. Then the command is
started. Where it refuses, the remedy of its sentence is followed, and the command started again.
"""

import functools
import random
import re
import shutil
import subprocess
import sys
import time

from tests import interpreter
from tests.end_to_end.world import differing, environment, finish, launch, pool_of

FULL_DISKS = 2
LOST_FOLDERS = 2
ROWS = ("teacher_grpo", "reverse_kl", "student_grpo")  # whose folders are lost
REFUSALS = 3  # of one damaged file, before the remedy counts as none
EVENTS = (1, 8)  # of tests.end_to_end.job: the first and the last that every stage has for certain


def flip(path, rng):
  """One bit of a byte becomes the other."""
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def cut(path, rng):
  """The file ends early."""
  data = path.read_bytes()
  path.write_bytes(data[: rng.randrange(1, len(data))])


def empty(path, rng):
  """The file has no bytes."""
  del rng
  path.write_bytes(b"")


def remove(path, rng):
  """The file is gone."""
  del rng
  path.unlink()


ANY = (flip, cut, empty)


# (what is damaged, whether the run has ended, workdir -> files to choose from, ways of damage).
# sft is the unfinished stage: it has checkpoints of steps 1 and 2, and reads the teacher's store.
KINDS = (
    ("numbers of the newest checkpoint", False,
     lambda w: list(w.glob("sft-*/checkpoints/2/**/d/*")), (flip,)),
    ("a file of the newest checkpoint", False,
     lambda w: [p for p in w.glob("sft-*/checkpoints/2/**/*") if p.is_file() and p.stat().st_size],
     (cut, empty, remove)),
    ("final weights that a later stage reads", False,
     lambda w: list(w.glob("teacher_grpo-*/checkpoints/final/**/d/*")), ANY),
    ("a part of a ledger", False, lambda w: list(w.glob("sft-*/ledger/*")), ANY),
    ("a part of the metrics", False, lambda w: list(w.glob("sft-*/metrics/*")), ANY),
    ("a part of the samples' log", False, lambda w: list(w.glob("sft-*/samples/*")),
     (remove,)),
    ("a record of a start", False, lambda w: list(w.glob("sft-*/starts/*")), ANY),
    ("the checksums of a checkpoint", False, lambda w: list(w.glob("sft-*/checksums/0*2.json")),
     (*ANY, remove)),
    ("a finished stage's ledger", True, lambda w: list(w.glob("*/ledger.json")), ANY),
    ("a finished stage's manifest", False, lambda w: list(w.glob("forward_kl-*/manifest.json")),
     ANY),
    ("a probe's result", False, lambda w: list(w.glob("probe-*/result.json")), ANY),
    ("a part of the rollouts", False, lambda w: list(w.glob("rollouts-*/*")), ANY),
    ("a score", True, lambda w: list(w.glob("eval-*/result.json")), ANY),
    ("an arm's entry", True, lambda w: list(w.glob("arms/*")), ANY),
)


def interrupted(world):
  """The work folder of a run that was killed in the stage sft, with two checkpoints."""
  workdir = world.folder / "interrupted"
  (running,) = launch(world, workdir, 1)
  while not list(workdir.glob("sft-*/checksums/00000002.json")):
    if running.process.exitcode is not None:
      raise RuntimeError(f"the run ended before its kill:\n{running.wait(1).stderr}")
    time.sleep(0.005)
  running.process.kill()
  running.wait(10)
  if list(workdir.glob("sft-*/manifest.json")):
    raise RuntimeError("the stage ended before its kill: start again")
  return workdir


def refusal(printed):
  """The sentence with which a command ended; None where it printed a traceback, or several."""
  lines = [line for line in printed.splitlines() if line.startswith("s2d_jax: ")]
  return lines[-1] if len(lines) == 1 and "Traceback" not in printed else None


def follow(sentence, path, workdir):
  """Does what a refusal says where the file cannot be put back; returns flags for the command."""
  named = re.search(r"--redo=([\w-]+)", sentence)
  if named:
    return ("--redo", named[1])
  checkpoint = re.search(r"or delete (\S+/checkpoints/\d+),", sentence)
  if checkpoint:
    shutil.rmtree(checkpoint[1])
  elif path is None:
    return ()
  elif "delete it" in sentence:
    path.unlink()
  elif "delete the folder" in sentence:
    shutil.rmtree(workdir / path.relative_to(workdir).parts[0])
  return ()


def run_again(world, workdir, path=None):
  """Starts the command again until it ends, as its sentences say: ([what it printed], result).

  Args:
    path: the damaged file, which each sentence must name; None: it is named by none.
  """
  said = []
  flags = ()
  for _ in range(REFUSALS):
    status, printed = finish(launch(world, workdir, 1, *flags))
    if status == 0:
      said += [line.replace(str(workdir), "W") for line in printed.splitlines()
               if "is not used" in line]
      break
    sentence = refusal(printed)
    if sentence is None or str(path.relative_to(workdir) if path else workdir) not in sentence:
      said.append(printed[-1500:].replace(str(workdir), "W"))
      return said, "no sentence that names the file"
    said.append(sentence.replace(str(workdir), "W"))
    flags = follow(sentence, path, workdir)
  if status:
    return said, f"refused {REFUSALS} times"
  differences = differing(workdir, world.references[1].workdir)
  # A part of a store that was deleted is sampled again where a later step reads its rows.
  if path is not None and path.suffix == ".npz" and not path.exists():
    differences.remove(str(path.relative_to(workdir)))
  return said, f"differs: {', '.join(differences)}" if differences else "equal"


def on_disk(world, copy, kind, start, rng):
  """One fault of a kind, in a copy of `start`: its record."""
  name, _, files_of, ways = kind
  workdir = world.folder / copy
  shutil.copytree(start, workdir)
  path = rng.choice(sorted(files_of(workdir)))
  way = rng.choice(ways)
  way(path, rng)
  said, result = run_again(world, workdir, path)
  record = {"fault": f"{name}: {way.__name__}", "file": str(path.relative_to(workdir)),
            "printed": said, "result": result}
  shutil.rmtree(workdir)
  return record


def full_disk(world, name, rng, row=None):
  """The record of a disk that is full from a random moment on, until the second start.

  With `row` from a random event of that stage on: no seconds, which depend on the machine's load.
  """
  if row is None:
    undisturbed = world.references[1]
    moment = rng.uniform(0, undisturbed.first_file + sum(undisturbed.seconds.values()))
    return stopped(world, name, f"--full-after={moment}",
                   f"a full disk from second {moment:.1f} on")
  event = rng.randint(*EVENTS)
  return stopped(world, name, f"--full-in={row}:{event}",
                 f"a full disk from event {event} of {row} on")


def vanished(world, name, rng, row):
  """The record of a stage whose folder is removed at a random event."""
  event = rng.randint(*EVENTS)
  return stopped(world, name, f"--vanish-in={row}:{event}",
                 f"the folder of {row}, removed at event {event}")


def stopped(world, name, flag, fault_name):
  """The record of a run that cannot write any longer, and is started again where it can."""
  workdir = world.folder / name
  # It prints to pipes, which take bytes while no file does.
  command = [sys.executable, "-m", "tests.end_to_end.job", str(workdir),
             str(world.folder / "bases"), "--arm", world.arm, flag]
  done = subprocess.run(command, cwd=interpreter.ROOT, env=environment(store=False), text=True,
                        capture_output=True, timeout=300, check=False)
  sentence = refusal(done.stdout + done.stderr)
  said = [(sentence or done.stderr[-6000:]).replace(str(workdir), "W")]
  if done.returncode != 1 or sentence is None or str(workdir) not in sentence:
    result = f"exit status {done.returncode}, and no sentence that names a file"
  else:
    further, result = run_again(world, workdir)
    said += further
  shutil.rmtree(workdir, ignore_errors=True)
  return {"fault": fault_name, "file": "any", "printed": said, "result": result}


def fault(world, seed, unfinished, number):
  """The record of the fault with this number, of the kinds on disk and then of full disks."""
  rng = random.Random(f"{seed} fault {number}")
  if number >= len(KINDS) + FULL_DISKS:
    return vanished(world, f"vanished-{number}", rng, rng.choice(ROWS))
  if number >= len(KINDS):
    return full_disk(world, f"full-{number}", rng)
  kind = KINDS[number]
  start = world.references[1].workdir if kind[1] else unfinished
  return on_disk(world, f"damaged-{number}", kind, start, rng)


def all_kinds(world, seed):
  """Yields the record of one fault of each kind on disk, then of full disks and lost folders."""
  one = functools.partial(fault, world, seed, interrupted(world))
  # Two at a time, on two cores.
  with pool_of(2) as pool:
    yield from pool.map(one, range(len(KINDS) + FULL_DISKS + LOST_FOLDERS))
