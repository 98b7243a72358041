"""Checkers of mathematical answers: agreement with labels, hostile answers, rates, linear time.

  python -m benchmarks.checker

The labels are those of tests/rewards: `labelled_answers.jsonl`, which were used while the checkers
were developed, and `held_out_answers.jsonl`, `fresh_answers.jsonl` and `unread_answers.jsonl`,
which were not before their first try.

Hostile answers are towers of powers that sympy would evaluate without end. Seconds are by the
clock, so other programs lengthen them: a hostile answer is ended after its processor seconds, which
take longer where processors are shared. A text's time in the string match is the thread's processor
time.
"""

import argparse
import collections
import json
import math as numbers
import os
import pathlib
import string
import time
from collections.abc import Sequence
from concurrent.futures import Future

from benchmarks import measure
from benchmarks.measure import Json
from s2d_jax.rewards import math, pool

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "rewards"
SETS = ("labelled_answers", "held_out_answers", "fresh_answers", "unread_answers")
HOSTILE = {"answer": "1"}, "9^{9^{9^{9}}}"
FULL = {"answers": 1024, "hostile": 10, "processes": 2, "limit": 2.0, "characters": 1_000_000}
SMOKE = FULL | {"answers": 12, "hostile": 1, "processes": 1, "limit": 1.0, "characters": 20_000}
REPEATED = [*string.printable, "\\boxed{", "\\boxed", "\\{", "\\frac1", "\\text{ a}", "1,000", "x="]


def labelled(name: str, most: int) -> list[Json]:
  """The rows of a set of labels, spread over it where there are more than `most`."""
  lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines[:: max(len(lines) // most, 1)]]


def agreement(rows: Sequence[Json]) -> Json:
  """{category: rows, rows of each checker that agree, wrong answers that it accepts}."""
  begun = [math.submit(row, row["response"]) for row in rows]
  verified = [reward if isinstance(reward, float) else reward.result() for reward in begun]
  found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for row, verdict in zip(rows, verified, strict=True):
    counts = found[row["category"]]
    counts["rows"] += 1
    counts["algebra"] += row["algebra"]
    for name, value in (("string", math.reward(row, row["response"])), ("verify", verdict)):
      counts[f"{name}_agrees"] += (value == 1) == row["equal"]
      counts[f"{name}_false_positives"] += value == 1 and not row["equal"]
  return {category: dict(counts) for category, counts in found.items()}


def hostile(sizes: argparse.Namespace, rows: Sequence[Json]) -> Json:
  """Seconds of honest answers with and without hostile ones among them, and what is allowed."""
  # Only answers that the string match leaves to the pool.
  jobs = [({"answer": row["answer"]}, math.reading(row["response"])) for row in rows
          if math.last_boxed(row["response"]) and not math.reward(row, row["response"])]
  honest = [jobs[k % len(jobs)] for k in range(sizes.answers - sizes.hostile)]
  mixed: list[tuple[Json, str] | None] = list(honest)
  for k in range(sizes.hostile):
    mixed.insert(k * len(honest) // sizes.hostile, None)
  checkers = pool.Pool("s2d_jax.rewards.verify:check", 60.0, sizes.limit, 4 << 30, sizes.processes)
  try:
    checkers(*honest[0])
    before, expected = _seconds(checkers, honest)
    seconds, found = _seconds(checkers, [job or HOSTILE for job in mixed])
    stopped = checkers.timeouts + checkers.failures
  finally:
    checkers.close()
  unchanged = [value for value, job in zip(found, mixed, strict=True) if job]
  allowed = before + numbers.ceil(sizes.hostile / sizes.processes) * sizes.limit + 1
  return {"honest_seconds": before, "seconds": seconds, "allowed_seconds": allowed,
          "load": os.getloadavg()[0], "stopped": stopped,
          "honest_verdicts_unchanged": unchanged == expected,
          "answers_per_second": len(honest) / before}


def _seconds(checkers: pool.Pool, jobs: Sequence[tuple[Json, str]]) -> tuple[float, list[float]]:
  """(seconds by the clock, verdicts) of answers that begin at once."""
  start = time.monotonic()
  begun: list[Future[float]] = [checkers.submit(*job) for job in jobs]
  found = [future.result() for future in begun]
  return time.monotonic() - start, found


def linear(characters: int) -> Json:
  """Processor seconds of the string match on the longest text of each repeated text.

  `ratio` is to a quarter of the text: 4 where time is linear. It is given where the time is long
  enough to be measured.
  """
  found = {}
  for repeated in REPEATED:
    seconds = [min(_processor_seconds(repeated, n) for _ in range(2))
               for n in (characters // 4, characters)]
    found[repeated] = {"seconds": seconds[1],
                       "ratio": seconds[1] / seconds[0] if seconds[0] > 0.01 else None}
  return found


def _processor_seconds(repeated: str, characters: int) -> float:
  text = "\\boxed{" + repeated * (characters // len(repeated)) + "x}"
  start = time.thread_time()
  math.reward({"answer": "1"}, text)
  return time.thread_time() - start


def string_rate(rows: Sequence[Json]) -> float:
  """Answers a processor second of the string match, each normalised anew."""
  start = time.thread_time()
  for _ in range(5):
    for row in rows:
      math.reward(row, row["response"])
  return 5 * len(rows) / (time.thread_time() - start)


def _show(name: str, table: Json) -> None:
  """Prints the agreement of one set: a line for each category, and the sums."""
  print(f"\n{name}\n\n| category | rows | string | verify | wrong ones accepted |\n"
        "|---|---|---|---|---|")
  total: collections.Counter = collections.Counter()
  for category, n in table.items():
    total.update(n)
    _show_row(f"{category}{' *' * bool(n['algebra'])}", n)
  _show_row("all", total)


def _show_row(category: str, n: Json) -> None:
  accepted = n["string_false_positives"] + n["verify_false_positives"]
  print(f"| {category} | {n['rows']} | {n['string_agrees']} | {n['verify_agrees']} | {accepted} |",
        flush=True)


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Prints the tables of agreement and the other figures, writes the JSON and returns its path."""
  options = measure.parser(__doc__, FULL, SMOKE)(argv)
  sizes = options.sizes
  rows = {name: labelled(name, sizes.answers) for name in SETS}
  tables = {name: agreement(rows[name]) for name in SETS}
  for name, table in tables.items():
    _show(name, table)
  rows = rows[SETS[0]]
  attack = hostile(sizes, rows)
  print(json.dumps(attack), flush=True)
  times = linear(sizes.characters)
  ratios = [found["ratio"] for found in times.values() if found["ratio"]]
  slowest = max(times, key=lambda name: times[name]["seconds"])
  print(f"{sizes.characters:,} characters: at most {times[slowest]['seconds']:.2f} s "
        f"({slowest!r}), at most {max(ratios, default=4):.1f} times those of a quarter", flush=True)
  return measure.write("checker", options, {
      "agreement": tables[SETS[0]], "held_out_agreement": tables[SETS[1]],
      "fresh_agreement": tables[SETS[2]], "unread_agreement": tables[SETS[3]],
      "hostile": attack, "linear": times, "string_answers_per_second": string_rate(rows)})


if __name__ == "__main__":
  main()
