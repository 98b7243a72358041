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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from s2d_jax import manifest
from tests.end_to_end import faults, job
from tests.end_to_end.world import World, differing, finish, launch, pool_of, reference

KILLS_IN_CHAIN = 8
SURVIVOR_SECONDS = 60  # of a process whose partner was killed, before it counts as a hang
BEGINNING = 0.8  # of the seconds before a run's first file: a kill before that finds nothing new


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
  for process in running:
    try:
      process.wait(SURVIVOR_SECONDS)
    except subprocess.TimeoutExpired:
      result = "hang"
  folder, step = unfinished(world, workdir, len(running))
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


def page(found):
  """The record as a page."""
  of_kills = found["kills"]
  good = sum(one["result"] == "equal" for one in of_kills)
  lost = [one["seconds_lost"] for one in of_kills]
  waits = [one["survivor_seconds"] for one in of_kills if one["survivor_seconds"] is not None]
  lines = [
      "# Kills and faults at random", "",
      f"{good} of {len(of_kills)} kills ended in the bytes of a run that nothing disturbed: "
      "weights, ledgers, samples, scores. Clocks and what depends on them are left out. Revision "
      f"{found['revision'][:7]}, seed {found['seed']}, two CPU cores, {found['seconds'] / 60:.0f} "
      "minutes:", "", "```sh", "make chaos", "```", "",
      "The run has every row of the recipe, three steps each, and a checkpoint at every step. A "
      "chain is one run that is killed up to eight times by SIGKILL. After each kill the same "
      "command starts it again. Of two processes, one or both are killed; the other must end by "
      f"itself within {SURVIVOR_SECONDS} s, where processes count as lost after "
      f"{found['lost_seconds']:.0f} s of silence. Every kill is in [chaos.json](chaos.json).", "",
      f"Seconds lost by a kill, from what was saved last to the kill: median "
      f"{statistics.median(lost):.1f}, at most {max(lost):.1f}. A run of one process takes "
      f"{found['run_seconds']['1']:.0f} s."]
  if waits:
    lines[-1] += (f" The process that was left ended after {statistics.median(waits):.1f} s "
                  f"(median), at most {max(waits):.1f} s.")
  lines += ["", "| killed in | kills | with two processes | equal |", "|---|---|---|---|"]
  for row in dict.fromkeys(one["folder"].rpartition("-")[0] or one["folder"] for one in of_kills):
    there = [one for one in of_kills if (one["folder"].rpartition("-")[0] or one["folder"]) == row]
    lines.append(f"| {row} | {len(there)} | {sum(one['processes'] == 2 for one in there)} | "
                 f"{sum(one['result'] == 'equal' for one in there)} |")
  lines += ["", "One fault of each kind. W is the work folder. Where the run refuses, the remedy "
            "of the sentence is followed, and the end compared as above.", "",
            "| fault | printed | end |", "|---|---|---|"]
  lines += [f"| {one['fault']}: `{one['file']}` | {'; then '.join(one['printed']) or 'nothing'} | "
            f"{one['result']} |" for one in found["faults"]]
  return "\n".join(lines) + "\n"


def records(folder, seed, count, faulty=True, processes=(1, 2)):
  """Yields the record, each time with one more chain of kills or with the faults."""
  started = time.time()
  job.bases(folder / "bases")
  world = World(folder, {})
  for number in processes:
    world.references[number] = reference(world, number)
  record = {"seed": seed, "revision": manifest.revision(), "seconds": 0,
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
