"""The YAML launchers: their values are those of launch/spec.sh, and their jobs run and restart."""

import re
import shlex
import string
from pathlib import Path

import pytest
import yaml

from tests.launch import stand_ins

LAUNCH = Path(__file__).parents[2] / "launch"
SPEC = (LAUNCH / "spec.sh").read_text()
RETRY_CODE = int(re.search(r"^RETRY_CODE=(\d+)$", SPEC, re.M)[1])
KILLED_CODE = int(re.search(r"^KILLED_CODE=(\d+)$", SPEC, re.M)[1])
MAX_RESTARTS = int(re.search(r"MAX_RESTARTS:-(\d+)", SPEC)[1])
DEFAULT_CONFIG = re.search(r"CONFIG:-([^}]+)}", SPEC)[1]
JOB = ["python", "-m", "s2d_jax.main", "--config=my.py", "--workdir=gs://bucket/run"]
MESH = "--config.mesh=(1, 16, 1)"

NAMES = {
  "NAME": "run1", "IMAGE": "my-image", "CONFIG": "my.py", "WORKDIR": "gs://bucket/run",
  "TPU_TYPE": "tpu-v6e-slice", "TPU_TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS_PER_HOST": "4",
  "MESH": "(1, 16, 1)",
}


def jobset():
  """The JobSet once its names are filled in, as envsubst does; an unknown name is a KeyError."""
  text = (LAUNCH / "gke_jobset.yaml").read_text()
  body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
  return yaml.safe_load(string.Template(body).substitute(NAMES))


def test_jobset_runs_the_one_job_on_every_host():
  (slice_,) = jobset()["spec"]["replicatedJobs"]
  job = slice_["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  assert container["command"] == [*JOB, MESH, "--distributed"]
  assert job["parallelism"] == job["completions"] == 4
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_jobset_restarts_on_the_codes_of_a_retry_alone():
  spec = jobset()["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  assert spec["failurePolicy"]["maxRestarts"] == MAX_RESTARTS
  # Any other code fails the job by its pods' policy, and that reason fails the set.
  assert spec["failurePolicy"]["rules"] == [
    {"name": "fault", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
  fault = job["podFailurePolicy"]["rules"][-1]
  assert fault["action"] == "FailJob"
  assert fault["onExitCodes"] == {
    "containerName": "main", "operator": "NotIn", "values": [RETRY_CODE, KILLED_CODE]}
  assert job["backoffLimit"] == 0
  assert job["template"]["spec"]["restartPolicy"] == "Never"  # a pod failure policy requires it


def test_jobset_lists_every_name_it_needs():
  text = (LAUNCH / "gke_jobset.yaml").read_text()
  comment = "".join(line for line in text.splitlines() if line.startswith("#"))
  assert set(re.findall(r"\${(\w+)}", text)) == set(NAMES)
  assert all(f"{name}=" in comment for name in NAMES)


def test_skypilot_runs_the_one_job():
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  words = shlex.split(string.Template(task["run"]).substitute(NAMES))
  assert words == [".venv/bin/python", *JOB[1:]]
  assert task["envs"] == {"CONFIG": DEFAULT_CONFIG, "WORKDIR": None}
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [RETRY_CODE]


def run_jobset(cloud, spec, disrupted=()):
  """The JobSet's end, its pods run here by the rules of its policies: "Completed" or "Failed".

  disrupted: the pods, as (restart, pod), that end because their node is taken away.
  """
  job = spec["replicatedJobs"][0]["template"]["spec"]
  pod_spec = job["template"]["spec"]
  (container,) = pod_spec["containers"]
  for restart in range(spec["failurePolicy"]["maxRestarts"] + 1):
    reasons = []
    for pod in range(job["completions"]):
      code = cloud.run(container["command"], WORKER=str(pod)).returncode
      if code == 0:
        continue
      conditions = [{"type": "DisruptionTarget", "status": "True"}] if (
        restart, pod) in disrupted else []
      # The first rule that fits decides; without one the failure counts.
      action = next((rule["action"] for rule in job["podFailurePolicy"]["rules"] if (
        any(condition in conditions for condition in rule.get("onPodConditions", []))
        or code not in rule.get("onExitCodes", {"values": [code]})["values"])), "Count")
      assert job["backoffLimit"] == 0
      reasons.append("PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded")
    if not reasons:
      return "Completed"
    actions = [rule["action"] for rule in spec["failurePolicy"]["rules"]
               if reasons[0] in rule["onJobFailureReasons"]]
    if "FailJobSet" in actions:
      return "Failed"
  return "Failed"


@pytest.mark.parametrize("ends, disrupted, end, starts", [
  ([[75, 0], [75, 0]], [], "Completed", 2),
  ([[0, 0], [75, 0]], [], "Completed", 2),
  ([[1, 0], [0, 0]], [], "Failed", 1),
  ([[143, 0], [75, 0]], [(0, 0)], "Completed", 2),  # a node was taken away
  ([[137, 0], [75, 0]], [], "Completed", 2),  # process 0 was killed, and named by the other
  ([[75, 0], [1, 0]], [], "Completed", 2),  # the first failure decides
  ([[75] * 30, [75] * 30], [], "Failed", 21),
])
def test_jobset_restarts_its_pods_on_75_on_137_and_on_a_lost_node(
    tmp_path, ends, disrupted, end, starts):
  cloud = stand_ins.Cloud(tmp_path, ends)
  spec = jobset()["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  job["parallelism"] = job["completions"] = stand_ins.WORKERS
  assert run_jobset(cloud, spec, disrupted) == end
  for worker in range(stand_ins.WORKERS):
    assert [start["words"] for start in cloud.starts(worker)] == [
      [*JOB[1:], MESH, "--distributed"]] * starts


@pytest.mark.parametrize("ends, code, starts", [([0], 0, 1), ([75, 75, 0], 0, 3), ([1], 1, 1)])
def test_skypilot_sets_up_and_runs_the_job_and_recovers_on_75_alone(tmp_path, ends, code, starts):
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  recovery = task["resources"]["job_recovery"]
  cloud = stand_ins.Cloud(tmp_path, [ends])
  last = recovery["recover_on_exit_codes"][0]
  machines = 0
  while last in recovery["recover_on_exit_codes"]:
    machine = tmp_path / f"machine{machines}"
    machine.mkdir()
    machines += 1
    for part in ("setup", "run"):
      done = cloud.run(["bash", "-c", task[part]], machine, CONFIG="my.py",
                       WORKDIR="s3://bucket/a 'run'")
      last = done.returncode
      assert part == "run" or last == 0
  assert last == code and recovery["max_restarts_on_errors"] == 0
  assert [start["words"] for start in cloud.starts()] == [
    ["-m", "s2d_jax.main", "--config=my.py", "--workdir=s3://bucket/a 'run'"]] * starts
