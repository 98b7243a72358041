"""Launchers from start to end, with stand-ins that run the job on workers of this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch import stand_ins

ROOT = stand_ins.ROOT
# Spaces, quotes, and characters that a shell would replace.
FLAGS = ["--config.arms=['bridge', \"cold\"]", "--config.template={\"a\": \"b  c\"}",
         "--x=$HOME `id`", "--y=a\\b*?~#;&|", "--empty="]
JOB = ["-m", "s2d_jax.main", "--config=configs/qwen3_math.py", "--workdir=gs://bucket/a run"]
SLICE = ["bash", "launch/tpu_vm.sh", "my-slice", "my-zone"]
GAVE_UP = "raise MAX_RESTARTS or run the same command again.\n"


def words(cloud, worker=0):
  return [start["words"] for start in cloud.starts(worker)]


@pytest.mark.parametrize("ends, code, starts", [
  ([[0], [0]], 0, 1),
  ([[75, 75, 0], [75, 75, 0]], 0, 3),  # stopped twice
  ([[0, 0], [75, 0]], 0, 2),
  ([[75, 1], [75, 75]], 1, 2),
  ([[3], [0]], 3, 1),
  ([[137, 0], [75, 0]], 0, 2),  # process 0 was killed; gcloud returns the code of worker 0
  ([[75, 0], [137, 0]], 0, 2),
  ([[75, 75, 75, 0], [75, 75, 75, 0]], 75, 3),  # a start more than MAX_RESTARTS allows
])
def test_tpu_vm_runs_the_job_on_every_worker_until_its_code_is_no_retry(
    tmp_path, ends, code, starts):
  cloud = stand_ins.Cloud(tmp_path, ends)
  done = cloud.run([*SLICE, *FLAGS], MAX_RESTARTS="2")
  assert done.returncode == code
  for worker in range(stand_ins.WORKERS):
    assert words(cloud, worker) == [[*JOB, "--distributed", *FLAGS]] * starts
    assert {start["folder"] for start in cloud.starts(worker)} == {
      str(tmp_path / "homes" / str(worker) / "s2d_jax")}
  assert done.stderr.endswith(GAVE_UP) == (code == 75)


@pytest.mark.parametrize("number, whole_group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_to_tpu_vm_stops_every_worker_and_no_restart_follows(
    tmp_path, number, whole_group):
  cloud = stand_ins.Cloud(tmp_path, [["wait", 0], ["wait", 0]])
  process = cloud.start(SLICE)
  cloud.wait_for_starts(1)
  # A terminal sends Ctrl-C to the whole process group.
  (os.killpg if whole_group else os.kill)(process.pid, number)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 75, error
  assert error == ("Stopping: every worker saves its state. "
                   "Run the same command again to resume.\n")
  assert [len(cloud.starts(worker)) for worker in range(stand_ins.WORKERS)] == [1, 1]
  assert cloud.run(SLICE).returncode == 0
  assert [len(cloud.starts(worker)) for worker in range(stand_ins.WORKERS)] == [2, 2]


def test_a_signal_on_one_worker_restarts_them_all(tmp_path):
  cloud = stand_ins.Cloud(tmp_path, [["wait", 0], [[1, 75], 0]])
  process = cloud.start(SLICE)
  cloud.wait_for_starts(1)
  stop = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-slice", "--zone=my-zone", "--worker=0",
          "--command=pkill -TERM -f '[s]2d_jax.main'"]
  assert cloud.run(stop).returncode == 0
  _, error = process.communicate(timeout=120)
  assert process.returncode == 0
  assert error == "Stopped with its state saved; restart 1 of at most 20.\n"
  assert [len(cloud.starts(worker)) for worker in range(stand_ins.WORKERS)] == [2, 2]


def test_setup_installs_the_committed_revision_on_every_worker(tmp_path):
  cloud = stand_ins.Cloud(tmp_path, [[75, 0], [75, 0]])
  checkout = tmp_path / "checkout"
  shutil.copytree(ROOT / "launch", checkout / "launch")
  git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
  for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "A revision"]):
    subprocess.run([*git, *command], check=True)
  revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True).stdout
  (checkout / "launch/local.sh").write_text("not committed")
  done = cloud.run(["bash", "launch/tpu_vm.sh", "--setup", "my-slice", "my-zone", *FLAGS], checkout,
                   HOME=str(tmp_path))
  assert done.returncode == 0, done.stderr
  for worker in range(stand_ins.WORKERS):
    installed = tmp_path / "homes" / str(worker) / "s2d_jax"
    assert subprocess.run(["git", "-C", str(installed), "rev-parse", "HEAD"], check=True,
                          capture_output=True).stdout == revision
    assert (installed / "launch/local.sh").read_text() == (ROOT / "launch/local.sh").read_text()
    assert (tmp_path / "starts" / str(worker) / "pip.txt").read_text() == (
      '["install", "-q", "-e", ".[tpu,gcs]", "-c", "constraints.txt"]')
    assert words(cloud, worker) == [[*JOB, "--distributed", *FLAGS]] * 2


def slurm(cloud, restarts="0", **env):
  """slurm.sh as Slurm runs it: a copy elsewhere, submitted from the checkout."""
  script = cloud.folder / "slurm_script"
  shutil.copy(ROOT / "launch/slurm.sh", script)
  return cloud.start(["bash", str(script), *FLAGS], cloud.folder, SLURM_SUBMIT_DIR=str(ROOT),
                     SLURM_JOB_ID="42", SLURM_RESTART_COUNT=restarts, **env)


@pytest.mark.parametrize("ends, code, requeued", [
  ([0, 0], 0, []),
  ([1, 1], 1, []),
  ([75, 75], 75, [["requeue", "42"]]),
  ([137, 75], 137, [["requeue", "42"]]),  # process 0 was killed, and named by the other
  (["killed", 75], 137, [["requeue", "42"]]),  # its parent was killed too
  ([137, 253], 253, []),  # Slurm's code where memory is short
])
def test_slurm_runs_the_job_on_every_node_and_requeues_on_75_and_137_alone(
    tmp_path, ends, code, requeued):
  cloud = stand_ins.Cloud(tmp_path, [[end] for end in ends])
  process = slurm(cloud)
  process.communicate(timeout=120)
  assert process.returncode == code and cloud.calls("scontrol") == requeued
  for worker in range(stand_ins.WORKERS):
    assert words(cloud, worker) == [[*JOB, "--distributed", *FLAGS]]
    assert cloud.starts(worker)[0]["folder"] == str(ROOT)


def test_slurm_stops_requeuing_at_the_limit(tmp_path):
  cloud = stand_ins.Cloud(tmp_path, [[75], [75]])
  process = slurm(cloud, restarts="3", MAX_RESTARTS="3")
  process.communicate(timeout=120)
  assert process.returncode == 75 and cloud.calls("scontrol") == []


def test_slurm_leaves_a_node_time_to_save_after_another_stops(tmp_path):
  cloud = stand_ins.Cloud(tmp_path, [[75], [[1, 75]]])
  process = slurm(cloud)
  process.communicate(timeout=120)
  assert process.returncode == 75 and cloud.calls("scontrol") == [["requeue", "42"]]


def test_slurm_waits_for_the_code_where_the_shell_gets_the_signal_too(tmp_path):
  cloud = stand_ins.Cloud(tmp_path, [["wait"], ["wait"]])
  process = slurm(cloud)
  cloud.wait_for_starts(1)
  process.terminate()
  time.sleep(0.3)
  assert process.poll() is None
  cloud.signal_jobs(0)
  process.communicate(timeout=120)
  assert process.returncode == 75 and cloud.calls("scontrol") == [["requeue", "42"]]


@pytest.mark.parametrize("ends, codes", [
  ([0], [0]),
  ([75, 75, 0], [75, 75, 0]),
  ([1, 0], [1]),
  ([75, 75, 75, 0], [75, 75, 75]),
])
def test_xpk_restarts_the_job_on_75(tmp_path, ends, codes):
  cloud = stand_ins.Cloud(tmp_path, [ends])
  done = cloud.run(["bash", "launch/xpk.sh", "my-cluster", "my-run", "v6e-16", *FLAGS],
                   IMAGE="my-image", MAX_RESTARTS="2")
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "workload").read_text()) == codes
  assert words(cloud) == [[*JOB, "--distributed", *FLAGS]] * len(codes)


def test_a_signal_to_a_pod_of_xpk_reaches_the_job(tmp_path):
  cloud = stand_ins.Cloud(tmp_path, [["wait", 0]])
  done = cloud.run(["bash", "launch/xpk.sh", "my-cluster", "my-run", "v6e-16"], IMAGE="my-image",
                   PREEMPT="1")
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "workload").read_text()) == [75, 0]
  (call,) = cloud.calls("xpk")
  assert "--termination-grace-period-seconds=300" in call  # xpk's default is 30


def test_a_signal_to_local_reaches_the_job_and_the_next_start_resumes(tmp_path):
  cloud = stand_ins.Cloud(tmp_path, [["wait", 0], ["wait", 0]])
  processes = [cloud.start(["bash", "launch/local.sh", *FLAGS], WORKER=str(worker))
               for worker in range(stand_ins.WORKERS)]
  cloud.wait_for_starts(1)
  for process in processes:
    process.terminate()
  for process in processes:
    process.communicate(timeout=120)
    assert process.returncode == 75
  assert cloud.run(["bash", "launch/local.sh", *FLAGS]).returncode == 0
  assert words(cloud) == [[*JOB, *FLAGS]] * 2


@pytest.mark.slow
def test_local_stops_and_resumes_the_real_job(tmp_path):
  steps = 12
  command = ["bash", str(ROOT / "launch/local.sh"), "--config.arms=cold_grpo",
             f"--config.stages.student_grpo.steps={steps}",
             f"--config.stages.student_grpo.save_every={steps}",
             f"--config.data.dir={tmp_path / 'data'}"]
  env = os.environ | {"CONFIG": "configs/arithmetic.py:tiny", "WORKDIR": str(tmp_path / "work"),
                      "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu",
                      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  printed = tmp_path / "printed.txt"
  with printed.open("w") as out:
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=out, stderr=out)
  try:
    while process.poll() is None and not re.search(rf"\b[1-9]\d*/{steps}\b", printed.read_text()):
      time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 75, printed.read_text()
  finally:
    process.kill()
  assert not (tmp_path / "work" / "report.md").exists()
  done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert "| cold_grpo | 0 |" in (tmp_path / "work" / "report.md").read_text()
