"""kill -9 at any moment in every stage row, then the same command: the same bytes in the end."""

import json
import random
import shutil
import signal

import pytest

from s2d_jax import metrics
from tests import interpreter
from tests.end_to_end import job

ROWS = ("teacher_sft", "teacher_grpo", "forward_kl", "weighted_fkl", "sft", "reverse_kl",
        "self_distillation", "student_grpo")


def start(workdir, bases, *flags):
  """Runs the job to its end, or its death; returns the exit status and what it printed."""
  done = interpreter.run("-m", "tests.end_to_end.job", workdir, bases, *flags)
  return done.returncode, done.stdout + done.stderr


@pytest.fixture
def undisturbed(run_alone):
  """(bases, workdir) of a job that was not killed."""
  workdir = run_alone("every_row")
  return workdir.with_name("bases"), workdir


def saved(workdir, row):
  """Steps of the checkpoints of a row from which the next start may go on."""
  return [int(path.stem) for path in sorted(workdir.glob(f"{row}-*/checksums/0*.json"))]


@pytest.mark.slow
def test_a_run_killed_repeatedly_ends_with_equal_bytes(undisturbed, tmp_path):
  bases, reference = undisturbed
  rng = random.Random(0)
  workdir = tmp_path / "work"
  # Of every second row up to the first checkpoint, of the others from there to the third update;
  # and again, gone on from there: every row has more events than these two together. Events 1 to
  # 8 are the lock and the note of the start, and a step has 15 or more. A score and a probe start
  # afresh and have twelve and eight; every second of four only sets a timer that the rest may
  # outrun, and the first is before there is a folder: left out. The first row, of given solutions,
  # has no probe.
  first = {row: range(1, 24) if i % 2 else range(24, 47) for i, row in enumerate(ROWS)}
  twice = {row: (events, range(3, 30)) for row, events in first.items()}
  moments = {ROWS[0]: twice[ROWS[0]], "probe": ((3,), (4, 5)), **twice, "evaluate":
             ((3, 4), (5, 7, 8))}
  saved_rows = []
  for row, ranges in moments.items():
    for events in ranges:
      saved_rows += [row] * bool(saved(workdir, row))
      status, printed = start(workdir, bases, "--kill-in", f"{row}:{rng.choice(events)}")
      assert status == -signal.SIGKILL, (row, printed)
      folders = list(workdir.glob(f"{'eval' if row == 'evaluate' else row}-*"))
      assert folders and not all((f / "manifest.json").exists() for f in folders), row
  # Rows of which the second kill was of a start from a checkpoint, and others.
  assert 2 < len(saved_rows) < len(ROWS), saved_rows
  status, printed = start(workdir, bases)
  assert status == 0, printed
  want = job.facts(reference)
  got = job.facts(workdir)
  assert sorted(want) == sorted(got)
  for name, value in want.items():
    assert got[name] == value, name


@pytest.mark.slow
def test_a_run_killed_in_decisions_and_searches_ends_with_equal_bytes(run_alone, tmp_path):
  """Shares of families are decided in forward_kl; reverse_kl searches, with hints and guides."""
  options = ("--arm", "bridge", "--options")
  whole = run_alone("bridge", "--options")
  bases, workdir = whole.with_name("bases"), tmp_path / "work"
  # In the middle of the third decision, and of the next one after the first checkpoint or a later
  # one. When the checkpoint counts that is behind the first search, then in the middle of the
  # second search, and at its end.
  for moment in ("forward_kl:Allocation.decide:8", "forward_kl:Allocation.decide:2",
                 "reverse_kl:write_json:9", "reverse_kl:search:2", "reverse_kl:search:3"):
    row = moment.partition(":")[0]
    status, printed = start(workdir, bases, *options, "--kill-in", moment)
    assert status == -signal.SIGKILL, (moment, printed)
    found = saved(workdir, row)
    assert found and (row == "forward_kl" or found == [1]), (moment, found)
  status, printed = start(workdir, bases, *options)
  assert status == 0, printed
  (searched,) = workdir.glob("reverse_kl-*")
  starts = [json.loads(path.read_text())["step"]
            for path in sorted((searched / "starts").iterdir())]
  assert starts == [0, 1, 1, 1]
  moves = [row.get("foresee_multiple", 0) for row in metrics.read(searched, "metrics")]
  assert moves[0] > 0 and moves[1] > 0
  (decided,) = workdir.glob("forward_kl-*")
  assert [row["step"] for row in metrics.read(decided, "allocate")] == [0, 1, 2]
  want = job.facts(whole)
  got = job.facts(workdir)
  assert sorted(want) == sorted(got) and any("/allocate/" in name for name in want)
  for name, value in want.items():
    assert got[name] == value, name


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_finished_stage_has_its_files_and_ledger(undisturbed, row):
  (folder,) = undisturbed[1].glob(f"{row}-*")
  names = {p.name for p in folder.iterdir()}
  assert {"manifest.json", "ledger.json", "metrics", "ledger", "timing", "samples", "tensorboard",
          "checkpoints", "hf"} <= names
  assert "writer.lock" not in names
  assert [p.name for p in (folder / "checkpoints").iterdir()] == ["final"]
  spent = json.loads((folder / "ledger.json").read_text())
  assert spent["prompt_uses"] == 12 and spent["device_seconds_used"] > 0
  labelled = row in ("teacher_sft", "teacher_grpo", "weighted_fkl", "student_grpo",
                     "self_distillation")  # a hint has the answer
  assert bool(spent["labels_distinct"]) == labelled
  rows = [json.loads(line) for part in sorted((folder / "metrics").iterdir())
          for line in part.read_text().splitlines()]
  assert [r["step"] for r in rows] == [0, 1, 2]
  assert all("logp_gap_max" in r for r in rows) == (row != "teacher_sft")
  assert all(r.get("logp_gap_max", 0) < 1e-5 for r in rows)


@pytest.mark.slow
def test_a_finished_run_started_again_changes_nothing(undisturbed, tmp_path):
  bases, reference = undisturbed
  workdir = tmp_path / "work"
  shutil.copytree(reference, workdir)
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name == "manifest.json"}
  status, printed = start(workdir, bases)
  assert status == 0, printed
  assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.slow
def test_a_damaged_entry_of_an_arm_is_named(undisturbed, tmp_path):
  bases, reference = undisturbed
  workdir = tmp_path / "work"
  shutil.copytree(reference, workdir)
  (path,) = (workdir / "arms").iterdir()
  path.write_bytes(path.read_bytes()[:100])
  status, printed = start(workdir, bases)
  (sentence,) = [line for line in printed.splitlines() if line.startswith("s2d_jax: ")]
  assert status == 2 and str(path) in sentence and "Traceback" not in printed
  assert sentence.endswith(": delete it, and the same command writes it again.")
  path.unlink()
  status, printed = start(workdir, bases)
  assert status == 0, printed
  assert job.facts(workdir) == job.facts(reference)
