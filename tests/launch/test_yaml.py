"""The YAML launchers: they parse, and their values are those of launch/spec.sh."""

import re
import shlex
import string
from pathlib import Path

import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SPEC = (LAUNCH / "spec.sh").read_text()
RETRY_CODE = int(re.search(r"^RETRY_CODE=(\d+)$", SPEC, re.M)[1])
MAX_RESTARTS = int(re.search(r"MAX_RESTARTS:-(\d+)", SPEC)[1])
DEFAULT_CONFIG = re.search(r"CONFIG:-([^}]+)}", SPEC)[1]
JOB = ["python", "-m", "s2d_jax.main", "--config=my.py", "--workdir=gs://bucket/run"]

NAMES = {
  "NAME": "run1", "IMAGE": "my-image", "CONFIG": "my.py", "WORKDIR": "gs://bucket/run",
  "TPU_TYPE": "tpu-v6e-slice", "TPU_TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS_PER_HOST": "4",
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
  assert container["command"] == [*JOB, "--distributed"]
  assert job["parallelism"] == job["completions"] == 4
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_jobset_restarts_on_the_retry_code_alone():
  spec = jobset()["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  assert spec["failurePolicy"]["maxRestarts"] == MAX_RESTARTS
  # Any other code fails the job by its pods' policy, and that reason fails the set.
  assert spec["failurePolicy"]["rules"] == [
    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
  fault = job["podFailurePolicy"]["rules"][-1]
  assert fault["action"] == "FailJob"
  assert fault["onExitCodes"] == {
    "containerName": "main", "operator": "NotIn", "values": [RETRY_CODE]}
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
