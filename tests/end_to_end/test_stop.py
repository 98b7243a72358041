"""A signal in the middle of a stage: saved, exit status 75, and the same command goes on to 0."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from s2d_jax import metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 200


FLAGS = ("--config=configs/arithmetic.py:tiny", "--config.arms=cold_grpo",
         f"--config.stages.student_grpo.steps={STEPS}",
         f"--config.stages.student_grpo.save_every={STEPS}")


def start(folder, log):
  """The command, under way; what it prints, its progress bar too, goes to the file `log`."""
  command = [sys.executable, "-m", "s2d_jax.main", *FLAGS,
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


def join(folder, process, port, program):
  """One process of two on a cluster of Slurm; what it prints goes to the file `log-PROCESS`."""
  words = [*FLAGS, "--distributed", "--config.mesh=(1,2,1)",
           f"--config.data.dir={folder / 'data'}", f"--workdir={folder / 'work'}"]
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      # As srun sets it.
      "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
      "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process), "SLURM_STEP_NUM_NODES": "1",
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
  with open(folder / f"log-{process}", "w") as out:
    return subprocess.Popen([sys.executable, *program, *words], cwd=ROOT, stdout=out, stderr=out,
                            env=environment)


def child_of(process):
  """The number of the only child of a process."""
  (number,) = pathlib.Path(f"/proc/{process}/task/{process}/children").read_text().split()
  return int(number)


@pytest.mark.slow
def test_a_killed_process_0_of_the_command_is_named_by_the_other(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  programs = [("-m", "s2d_jax.main"), ("-c", "from s2d_jax import cli; cli.main()", "run")]
  processes = [join(tmp_path, i, port, program) for i, program in enumerate(programs)]
  logs = [tmp_path / f"log-{i}" for i in range(2)]
  try:
    # A progress bar, which comes through the parent.
    while all(process.poll() is None for process in processes) and not re.search(
        rf"\b[1-9]\d*/{STEPS}\b", logs[0].read_text()):
      time.sleep(0.05)
    os.kill(child_of(processes[0].pid), signal.SIGKILL)
    codes = [process.wait(timeout=60) for process in processes]
  finally:
    for process in processes:
      process.kill()
  first, second = (log.read_text() for log in logs)
  assert codes == [137, 75], first + second
  host = socket.gethostname()
  assert f"process 0 on {host} was ended by SIGKILL" in first
  assert f"process 1 on {host} was aborted, because process 0 on {host} is gone" in second
  assert "Check failure" not in second and "Traceback" not in second
