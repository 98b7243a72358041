"""A signal in the middle of a stage: saved, exit status 75, and the same command goes on to 0."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from s2d_jax import metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 200


def start(folder, log):
  """The command, under way; what it prints, its progress bar too, goes to the file `log`."""
  command = [sys.executable, "-m", "s2d_jax.main", "--config=configs/arithmetic.py:tiny",
             "--config.arms=cold_grpo", f"--config.stages.student_grpo.steps={STEPS}",
             f"--config.stages.student_grpo.save_every={STEPS}",
             f"--config.data.dir={folder / 'data'}", f"--workdir={folder / 'work'}"]
  with open(log, "w") as out:
    return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_finishes(tmp_path):
  log = tmp_path / "compiling.txt"
  process = start(tmp_path, log)
  try:
    while process.poll() is None and "compiles its programs" not in log.read_text():
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # Ctrl-C: there is nothing to save
    assert process.wait(timeout=10) == 75, log.read_text()
  finally:
    process.kill()
  assert "nothing is unsaved" in log.read_text() and "Traceback" not in log.read_text()
  log = tmp_path / "first.txt"
  process = start(tmp_path, log)
  try:
    # No save is due before the last step, so a checkpoint found later was saved by the signal.
    while process.poll() is None and not re.search(rf"\b[1-9]\d*/{STEPS}\b", log.read_text()):
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, log.read_text()
  finally:
    process.kill()
  (folder,) = (tmp_path / "work").glob("student_grpo-*")  # a probe's folder stands beside it
  names = {path.name for path in folder.iterdir()}
  assert "checkpoints" in names and not {"manifest.json", "ledger.json", "writer.lock"} & names
  done = len(metrics.read(folder, "metrics"))
  assert 0 < done < STEPS
  log = tmp_path / "second.txt"
  process = start(tmp_path, log)
  try:
    assert process.wait(timeout=300) == 0, log.read_text()
  finally:
    process.kill()
  starts = [json.loads(path.read_text()) for path in sorted((folder / "starts").iterdir())]
  assert [s["step"] for s in starts] == [0, 0, done]
  # The first start was stopped at once, and left the lock with the seconds that it had worked.
  assert starts[1]["lost"] < 60 and [s["lost"] for s in starts[::2]] == [0.0, 0.0]
  assert [row["step"] for row in metrics.read(folder, "metrics")] == list(range(STEPS))
  assert json.loads((folder / "ledger.json").read_text())["label_uses"] == 4 * STEPS
  assert "| cold_grpo | 0 |" in (tmp_path / "work" / "report.md").read_text()
