"""Kills a tiny run at random moments, damages its files and fills its disk; compares every end.

  python -m tests.end_to_end.chaos --kills=50 --seed=0 --out=results

A chain is one run that is killed several times (SIGKILL) and started again by the same command
until it ends, with one process or with two. Its end is compared with that of a run that nothing
disturbed, byte by byte: weights, ledgers, samples and scores, all but clocks. Faults of the disk
follow, each in a copy of an interrupted run (`tests.end_to_end.faults`).
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time

from s2d_jax import manifest
from tests.end_to_end import faults, job
from tests.end_to_end.world import World, differing, finish, launch, pool_of, reference

KILLS_IN_CHAIN = 8
SURVIVOR_SECONDS = 60  # of a process whose partner was killed, before it counts as a hang
BEGINNING = 0.8  # of the seconds before a run's first file: a kill before that finds nothing new
PAGE_WIDTH = 118  # of a line of results/chaos.md, in characters
WAYS = {"flip": "with one bit flipped", "cut": "cut short", "empty": "emptied",
        "remove": "deleted"}  # by the name of a function of `faults`


def unfinished(world, workdir, processes):
  """(folder, step): the first folder that is not finished, and its newest checkpoint or None."""
  for name in world.references[processes].seconds:
    if not (workdir / name / "manifest.json").exists():
      steps = [int(path.name) for path in workdir.glob(f"{name}/checkpoints/*")
               if path.name.isdigit()]
      return name, max(steps, default=None)
  return "arms", None


def kill(world, workdir, running, victims):
  """Kills some of a run's processes and waits for the others; returns the facts of the kill."""
  moment = time.time()
  for i in victims:
    running[i].process.kill()
  saved = [path.stat().st_mtime for pattern in ("*/manifest.json", "*/checksums/0*.json")
          for path in workdir.glob(pattern)]
  result = "killed"
  survived = False
  for i, process in enumerate(running):
    try:
      survived |= process.wait(SURVIVOR_SECONDS).returncode == 0 and i not in victims
    except subprocess.TimeoutExpired:
      result = "hang"
  folder, step = unfinished(world, workdir, len(running))
  # Where all folders were finished, there was nothing left to lose a partner for.
  if survived and folder != "arms":
    result = "a process whose partner was killed ended with exit code 0"
  return {"processes": len(running), "victims": list(victims), "folder": folder, "step": step,
          "starts": len(list(workdir.glob(f"{folder}/starts/*.json"))),
          "saved_before": max(saved, default=0.0), "at": moment, "result": result,
          "survivor_seconds": round(time.time() - moment, 2) if len(victims) < len(running)
          else None}


def chain(world, name, seed, kills, processes):
  """One run, killed up to `kills` times on its way to its end: a list of the kills."""
  rng = random.Random(seed)
  undisturbed = world.references[processes]
  workdir = world.folder / name
  found = []
  while True:
    remaining = kills - len(found)
    started = time.time()
    running = launch(world, workdir, processes)
    # Of random numbers, one for each kill to come, the least: the kills are uniform together.
    share = min((rng.random() for _ in range(remaining)), default=None)
    victims = rng.choice([(0,), (1,), (0, 1)]) if processes == 2 else (0,)
    if share is not None:
      to_do = sum(seconds for name, seconds in undisturbed.seconds.items()
                  if not (workdir / name / "manifest.json").exists())
      moment = BEGINNING * undisturbed.first_file + share * to_do
      running[0].process.join(moment)
      if all(process.process.exitcode is None for process in running):
        found.append({"seed": seed, "moment": round(time.time() - started, 2)}
                     | kill(world, workdir, running, victims))
        found[-1]["seconds_lost"] = round(
            found[-1]["at"] - max(started, found[-1].pop("saved_before")), 2)
        print(json.dumps(found[-1]), flush=True)
        continue
    status, printed = finish(running)
    break
  verdict = f"exit status {status}: {printed[-2000:]}" if status else "equal"
  differences = [] if status else differing(workdir, undisturbed.workdir)
  if differences:
    verdict = f"differs: {', '.join(differences)}"
  print(f"{name}: {verdict}", flush=True)
  counts = {}  # the last of several kills that came before the stage noted a start
  for one in found:
    counts[one["folder"], one["starts"]] = one
  for one in found:
    last = counts[one["folder"], one["starts"]] is one
    started = one.pop("starts")
    one["seconds_lost_by_ledger"] = counted(workdir / one["folder"], started) if last else None
    if one.pop("at") and one["result"] == "killed":
      one["result"] = verdict
  if verdict == "equal":
    shutil.rmtree(workdir)
  return found


def counted(folder, starts):
  """The seconds that a stage counts as lost by the kill after its first `starts` starts."""
  path = folder / "starts" / f"{starts:08d}.json"
  return round(json.loads(path.read_text())["lost"], 2) if starts and path.exists() else None


def chains(count, several):
  """[(processes, kills) of a chain] of `count` kills, with `several` one in three of two processes.
  """
  of_two = count // 3 if several else 0
  found = []
  for processes, number in ((1, count - of_two), (2, of_two)):
    found += [(processes, KILLS_IN_CHAIN)] * (number // KILLS_IN_CHAIN)
    found += [(processes, number % KILLS_IN_CHAIN)] if number % KILLS_IN_CHAIN else []
  return found


def kills(world, seed, count):
  """Yields the kills of one chain after the other, `count` in all."""
  done = number = 0
  # A chain may end before its last kill: then further ones follow.
  while done < count:
    planned = [(f"chain-{number + i}", f"{seed}-{number + i}", killed, processes)
               for i, (processes, killed) in enumerate(chains(count - done, 2 in world.references))]
    number += len(planned)
    # Those of one process two at a time, on two cores.
    for processes, workers in ((1, 2), (2, 1)):
      of_these = [one for one in planned if one[-1] == processes]
      if not of_these:
        continue
      with pool_of(workers) as pool:
        for found in pool.map(chain, [world] * len(of_these), *zip(*of_these, strict=True)):
          done += len(found)
          yield found


def short(text):
  """A text with short names: `sft-9a0a182935a1` is sft-9a0a…, and long paths lose their middle."""
  text = re.sub(r"(?<=[-/])([0-9a-f]{4})(?:[0-9a-f]{28}|[0-9a-f]{8})(?![0-9a-f])", r"\1…", text)
  return re.sub(r"(?<=/checkpoints/)(\w+)(?:/[\w.]+)+(/\S*…)", r"\1/…\2", text)


def wrapped(text, indent=""):
  """The text in lines of at most PAGE_WIDTH; all but the first begin with `indent`."""
  return textwrap.fill(text, PAGE_WIDTH, subsequent_indent=indent, break_long_words=False,
                       break_on_hyphens=False)


def in_words(fault):
  """A fault as a phrase: `a score: cut` is "a score, cut short"."""
  name, _, way = fault.partition(": ")
  return f"{name}, {WAYS[way]}" if way else name


def of_faults(found):
  """The lines on faults: each with its file, the sentences that were printed, and its end."""
  lines = [
      "## Damaged files, full disks and lost folders", "",
      wrapped("One fault of each kind, at a random place. A file of a stopped or finished run is "
              "damaged, or from some second on the disk takes no byte, or a stage's folder is "
              "removed while it runs. Then the command is started again. It either goes on without "
              "the file, or ends with one sentence that names file and remedy. The remedy is "
              "followed, the command started again, and the end compared as above. A stored "
              "sample that the remedy deletes stays absent where no "
              "later step reads it."), "",
      wrapped("W is the work folder. The hexadecimal names of folders and files are cut after four "
              "digits."), ""]
  for i, one in enumerate(found["faults"], 1):
    where = "" if one["file"] == "any" else f" (`{short(one['file'])}`)"
    lines.append(wrapped(f"{i}. **{in_words(one['fault'])}**{where}: {one['result']}", "   "))
    printed = [line.removeprefix("s2d_jax: ") for line in one["printed"]]
    lines += [wrapped(f"    - {short(line)}", "      ")
              for line in printed or ["Nothing was printed."]]
  return lines


def of_kills(found):
  """The lines on kills: how they were made, what they cost, and a table of where they came."""
  lost = [one["seconds_lost"] for one in found["kills"]]
  waits = [one["survivor_seconds"] for one in found["kills"]
           if one["survivor_seconds"] is not None]
  cost = (f"A kill loses the seconds since something was saved last: {statistics.median(lost):.1f} "
          f"in the median, {max(lost):.1f} at most. An undisturbed run of one process takes "
          f"{found['run_seconds']['1']:.0f} s.")
  if waits:
    cost += (f" A process whose partner was killed ended by itself after "
             f"{statistics.median(waits):.1f} s in the median, {max(waits):.1f} s at most. It may "
             f"take {SURVIVOR_SECONDS} s, and counts its partner as lost after "
             f"{found['lost_seconds']:.0f} s of silence.")
  lines = [
      "## Kills", "",
      wrapped(f"A run is killed by SIGKILL up to {KILLS_IN_CHAIN} times at random moments, and "
              "started again after each kill. It has one process or two; of two, one or both are "
              "killed."), "",
      wrapped(cost), "",
      "| killed in | kills | of these, runs of two processes | equal |", "|---|---|---|---|"]
  names = [one["folder"].rpartition("-")[0] or one["folder"] for one in found["kills"]]
  for row in dict.fromkeys(names):
    there = [one for one, name in zip(found["kills"], names, strict=True) if name == row]
    lines.append(f"| {row} | {len(there)} | {sum(one['processes'] == 2 for one in there)} | "
                 f"{sum(one['result'] == 'equal' for one in there)} |")
  return [*lines, "", wrapped("`probe` and `eval` are the probes and scores around the stages, and "
                              "`arms` is the list of an arm's folders.")]


def page(found):
  """The record as a page, all of results/chaos.md."""
  equal = {part: sum(one["result"] == "equal" for one in found[part])
           for part in ("kills", "faults")}
  lines = [
      "# Kills and faults at random", "",
      wrapped(f"**{equal['kills']} of {len(found['kills'])} kills and {equal['faults']} of "
              f"{len(found['faults'])} faults of the disk ended equal**: after the command was "
              "started again, weights, ledgers, samples and scores have the bytes of a run that "
              "nothing disturbed. Clocks, and what depends on them, are not compared."), "",
      "```sh", "make chaos", "```", "",
      wrapped(f"Revision {found['revision'][:7]}, seed {found['seed']}, {found['cores']} CPU cores "
              f"that other programs may have used too, {found['seconds'] / 60:.0f} minutes. The "
              f"run trains tiny models in the stages {', '.join(found['stages'])}: three steps "
              "each, with a checkpoint at every step. Every kill and fault is in "
              "[chaos.json](chaos.json)."), "",
      *of_kills(found), "", *of_faults(found)]
  return "\n".join(lines) + "\n"


def records(folder, seed, count, faulty=True, processes=(1, 2)):
  """Yields the record, each time with one more chain of kills or with the faults."""
  started = time.time()
  job.bases(folder / "bases")
  world = World(folder, {})
  for number in processes:
    world.references[number] = reference(world, number)
  record = {"seed": seed, "revision": manifest.revision(), "seconds": 0, "cores": os.cpu_count(),
            "stages": [use.stage for use in job.ARMS[world.arm]],
            "lost_seconds": job.LOST_SECONDS,
            "run_seconds": {str(number): round(one.first_file + sum(one.seconds.values()), 1)
                            for number, one in world.references.items()},
            "kills": [], "faults": []}
  for found in kills(world, seed, count):
    record["kills"] += found
    yield record | {"seconds": round(time.time() - started)}
  for one in faults.all_kinds(world, seed) if faulty else ():
    record["faults"].append(one)
    yield record | {"seconds": round(time.time() - started)}


def main():
  """Writes chaos.json and chaos.md; exits with 1 where an end differs."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs",
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for record in records(pathlib.Path(folder), args.seed, args.kills):
      (args.out / "chaos.json").write_text(json.dumps(record, indent=1) + "\n")
      (args.out / "chaos.md").write_text(page(record))
  results = [one["result"] for one in record["kills"] + record["faults"]]
  print(f"{results.count('equal')} of {len(results)} ends are equal")
  sys.exit(results.count("equal") < len(results))


if __name__ == "__main__":
  main()
