"""A short form of `make chaos`: a few kills at random moments, with one process and with two."""

import json
import random

import pytest

from s2d_jax import recipe
from tests import interpreter
from tests.end_to_end import chaos, faults, job, world

RECORD = {
    "seed": 3, "revision": "abc", "seconds": 1200, "lost_seconds": 15.0, "cores": 4,
    "stages": ["sft"],
    "run_seconds": {"1": 20.4, "2": 51.0},
    "kills": [
        {"processes": 1, "folder": "sft-12", "result": "equal", "seconds_lost": 1.0,
         "survivor_seconds": None},
        {"processes": 2, "folder": "sft-12", "result": "hang", "seconds_lost": 7.0,
         "survivor_seconds": 60.0},
        {"processes": 2, "folder": "arms", "result": "equal", "seconds_lost": 2.0,
         "survivor_seconds": 0.2}],
    "faults": [{"fault": "a score: cut", "file": "eval-1/result.json", "printed": [],
                "result": "equal"}]}


def test_the_page_counts_the_kills_and_their_cost():
  text = " ".join(chaos.page(RECORD).split())
  assert "**2 of 3 kills and 1 of 1 faults of the disk ended equal**" in text
  assert "2.0 in the median, 7.0 at most" in text and "after 30.1 s in the median, 60.0 s" in text
  assert "4 CPU cores" in text and "in the stages sft: three steps" in text
  assert "| sft | 2 | 1 | 1 |" in text and "| arms | 1 | 1 | 1 |" in text
  assert "1. **a score, cut short** (`eval-1/result.json`): equal - Nothing was printed." in text


def test_the_committed_page_is_of_the_committed_record():
  folder = interpreter.ROOT / "results"
  assert (folder / "chaos.md").read_text() == chaos.page(
      json.loads((folder / "chaos.json").read_text()))


def test_the_committed_record_has_all_stages_and_kinds_of_today():
  record = json.loads((interpreter.ROOT / "results" / "chaos.json").read_text())
  assert record["stages"] == [use.stage for use in job.ARMS["every_row"]]
  assert record["lost_seconds"] == job.LOST_SECONDS and len(record["kills"]) == 50
  names = [one["fault"].partition(": ")[0] for one in record["faults"]]
  assert names[: len(faults.KINDS)] == [kind[0] for kind in faults.KINDS]
  assert len(names) == len(faults.KINDS) + faults.FULL_DISKS + faults.LOST_FOLDERS


@pytest.mark.parametrize("text, want", [
    ("W/sft-9a0a182935a1/log is damaged", "W/sft-9a0a…/log is damaged"),
    ("with --redo=teacher_grpo-1efbd39516c6.", "with --redo=teacher_grpo-1efb…."),
    ("sft-9a0a182935a1/checkpoints/2/state/ocdbt.process_0/d/322e8cfd55869e0ec396be7625c58587",
     "sft-9a0a…/checkpoints/2/…/322e…"),
    ("arms/every_row-20e9e55edfea.json", "arms/every_row-20e9….json"),
    ("rollouts-b02ac25df3a1/sft-9a0a182935a1-00000000-0.npz",
     "rollouts-b02a…/sft-9a0a…-00000000-0.npz"),
    ("sft-9a0a182935a1/checkpoints/2/_CHECKPOINT_METADATA",
     "sft-9a0a…/checkpoints/2/_CHECKPOINT_METADATA")])
def test_names_on_the_page_are_short(text, want):
  assert chaos.short(text) == want


def test_the_job_has_every_row_of_the_recipe():
  rows = [use.stage for use in job.ARMS["every_row"]]
  assert len(rows) == 8 and sorted(rows) == sorted(stage.name for stage in recipe.STAGES)


def test_one_kill_in_three_is_of_two_processes():
  assert chaos.chains(50, True) == [(1, 8)] * 4 + [(1, 2)] + [(2, 8)] * 2
  assert chaos.chains(50, False) == [(1, 8)] * 6 + [(1, 2)]


@pytest.mark.parametrize("way", [*faults.ANY, faults.remove])
def test_damage_changes_a_file(tmp_path, way):
  path = tmp_path / "file"
  path.write_bytes(b"abcd")
  way(path, random.Random(0))
  data = path.read_bytes() if path.exists() else None
  assert data != b"abcd"
  assert way is not faults.flip or sum(
      (a ^ b).bit_count() for a, b in zip(data, b"abcd", strict=True)) == 1


@pytest.mark.parametrize("sentence, flags, files", [
    ("s2d_jax: W/x is damaged: make a-1 again with --redo=a-1.", ("--redo", "a-1"),
     ["a-1/checkpoints/2/x", "a-1/log"]),
    ("s2d_jax: W/x; put the file back, or delete {}/a-1/checkpoints/2, and go on.", (),
     ["a-1/log"]),
    ("s2d_jax: W/x is damaged: delete it, and its responses are sampled again.", (),
     ["a-1/checkpoints/2/x"]),
    ("s2d_jax: W/x is no manifest: delete the folder, or put it back.", (), [])])
def test_remedies_are_followed(tmp_path, sentence, flags, files):
  for name in ("a-1/checkpoints/2/x", "a-1/log"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
  assert faults.follow(sentence.format(tmp_path), tmp_path / "a-1" / "log", tmp_path) == flags
  assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == files


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
  """The world of two stages, with its undisturbed run of one process."""
  folder = tmp_path_factory.mktemp("chaos")
  job.bases(folder / "bases")
  one = world.World(folder, {}, "two_rows")
  # Its second run finds all programs stored, as the killed ones do: moments are parts of its time.
  one.references[1] = world.reference(one, 1)
  return one


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
  """The world of one stage, with its undisturbed run of two processes."""
  folder = tmp_path_factory.mktemp("chaos")
  job.bases(folder / "bases")
  two = world.World(folder, {}, "one_row")
  two.references[2] = world.reference(two, 2)
  return two


@pytest.mark.slow
@pytest.mark.parametrize("runs, processes, count", [("of_one", 1, 3), ("of_two", 2, 2)])
def test_a_killed_run_ends_with_equal_bytes(request, runs, processes, count):
  runs = request.getfixturevalue(runs)
  # With the first seed process 0 is killed, then both: a run that loses process 1 ends only after
  # `job.LOST_SECONDS`, which tests/test_stops.py waits for. A run may end before its kills, where
  # the machine was busier for the run that was not disturbed.
  found = []
  for seed in ("short 7", "short 8", "short 9"):
    found = found or chaos.chain(runs, f"chain-{seed[-1]}", seed, count, processes)
  assert found and {one["result"] for one in found} == {"equal"}


@pytest.mark.slow
def test_a_damaged_file_and_a_full_disk_end_with_equal_bytes(of_one):
  # Of the kinds whose files the two stages have: a part of a ledger.
  (number,) = (i for i, kind in enumerate(faults.KINDS) if kind[0] == "a part of a ledger")
  damaged = faults.fault(of_one, "short 8", faults.interrupted(of_one), number)
  full = faults.full_disk(of_one, "full", random.Random("short 8"), "reverse_kl")
  for record in (damaged, full):
    assert record["result"] == "equal" and record["printed"], record
