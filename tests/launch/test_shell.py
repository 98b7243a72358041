"""The shell launchers: shellcheck passes, all run one job line, restarts follow 75 and 137."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))

# The job that launch/README.md says every launcher runs, written by hand.
JOB = ["-m", "s2d_jax.main", "--config=configs/qwen3_math.py", "--workdir=gs://bucket/a run"]
FLAG = "--config.arms=['bridge']"
LAUNCHERS = {  # arguments before the flags of main
  "local": [],
  "tpu_vm": ["my-slice", "my-zone"],
  "slurm": [],
  "xpk": ["my-cluster", "my-run", "v6e-16"],
}

STAND_IN = """#!/usr/bin/env bash
# Logs its arguments, one line a call, and exits with the next code of the list.
printf '%q ' "$(basename "$0")" "$@" >> "$LOG"; echo >> "$LOG"
code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"; exit "${code:-0}"
"""


def launch(stand_in, name, *args, **env):
  """Runs one launcher with a PATH on which nothing reaches a cloud."""
  env = {"PATH": f"{stand_in}:/usr/bin:/bin", "CONFIG": JOB[2].partition("=")[2],
         "WORKDIR": JOB[3].partition("=")[2], "RESTART_DELAY": "0", **env}
  return subprocess.run(["bash", f"launch/{name}.sh", *args], cwd=ROOT, env=env, text=True,
                        capture_output=True, timeout=60)


@pytest.fixture
def stand_in(tmp_path):
  """A folder of stand-ins for gcloud, srun, scontrol and xpk that only log their calls."""
  for name in ("gcloud", "srun", "scontrol", "xpk"):
    (tmp_path / name).write_text(STAND_IN)
    (tmp_path / name).chmod(0o755)
  return tmp_path


def calls(stand_in, codes, name, *args, **env):
  """(a launcher's exit code, the calls it made), where the calls exit with these codes."""
  log = stand_in / "log"
  remaining = stand_in / "codes"
  log.write_text("")
  remaining.write_text("".join(f"{code}\n" for code in codes))
  done = launch(stand_in, name, *args, LOG=str(log), CODES=str(remaining), **env)
  return done.returncode, [shlex.split(line) for line in log.read_text().splitlines()]


def words_of_job(words):
  """The words of the job's command line inside a launcher's, through any number of quotings."""
  while "s2d_jax.main" not in words:
    words = shlex.split(next(word for word in words if "s2d_jax.main" in word))
  return words[words.index("-m"):]


@pytest.mark.parametrize("script", [*SCRIPTS, ".ci/run"])
def test_shellcheck_is_clean(script):
  shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
  done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR/..", script], cwd=ROOT, text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stdout + done.stderr


def test_every_launcher_is_tested():
  assert set(SCRIPTS) == {f"launch/{name}.sh" for name in [*LAUNCHERS, "spec"]}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dry_run_prints_the_one_job(name, stand_in):
  done = launch(stand_in, name, "--dry-run", *LAUNCHERS[name], FLAG, IMAGE="my-image")
  assert done.returncode == 0, done.stderr
  distributed = [] if name == "local" else ["--distributed"]
  assert words_of_job(shlex.split(done.stdout.splitlines()[-1])) == [*JOB, *distributed, FLAG]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dry_run_runs_nothing(name, stand_in):
  code, commands = calls(stand_in, [], name, "--dry-run", *LAUNCHERS[name], IMAGE="my-image",
                     PYTHON="/bin/false")
  assert code == 0 and commands == []


def test_dry_run_prints_the_command_of_a_real_run(stand_in):
  args = ["--setup", *LAUNCHERS["tpu_vm"], FLAG]
  printed = launch(stand_in, "tpu_vm", "--dry-run", *args).stdout.splitlines()
  # git is left out: this checkout may be one without a commit.
  git = stand_in / "git"
  git.write_text("#!/bin/sh\n")
  git.chmod(0o755)
  code, commands = calls(stand_in, [], "tpu_vm", *args)
  assert code == 0
  assert [shlex.split(line) for line in printed if line.startswith("gcloud ")] == commands
  assert len(commands) == 3 and all("--worker=all" in command for command in commands)


@pytest.mark.parametrize("codes, code, runs", [
  ([0], 0, 1),
  ([75, 75, 0], 0, 3),  # preempted twice
  ([75, 1], 1, 2),  # a fault after a preemption
  ([137, 75, 0], 0, 3),  # a process was killed, then the run stopped
  ([1], 1, 1),
  ([134], 134, 1),  # aborted by a library
  ([255], 255, 1),  # ssh: a host is gone, or the line; the job may go on elsewhere
  ([75, 75, 75, 75, 0], 75, 4),  # one more preemption than restarts
])
def test_tpu_vm_restarts_on_the_codes_of_a_retry_alone(stand_in, codes, code, runs):
  last, commands = calls(stand_in, codes, "tpu_vm", *LAUNCHERS["tpu_vm"], MAX_RESTARTS="3")
  assert (last, len(commands)) == (code, runs)
  assert all(command == commands[0] for command in commands)
  assert commands[0][:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-slice"]


@pytest.mark.parametrize("codes, restarts, requeued", [
  ([0], "0", []),
  ([1], "0", []),
  ([75], "0", [["scontrol", "requeue", "42"]]),
  ([137], "0", [["scontrol", "requeue", "42"]]),
  ([75], "3", []),  # the limit
  ([137], "3", []),
])
def test_slurm_asks_for_a_new_allocation_on_the_codes_of_a_retry_alone(
    stand_in, codes, restarts, requeued):
  last, commands = calls(stand_in, codes, "slurm", SLURM_JOB_ID="42", SLURM_RESTART_COUNT=restarts,
                     SLURM_SUBMIT_DIR=str(ROOT), MAX_RESTARTS="3")
  assert last == codes[0]
  assert commands[0][0] == "srun" and commands[1:] == requeued


def test_xpk_restarts_on_the_retry_code(stand_in):
  code, (call,) = calls(stand_in, [0], "xpk", *LAUNCHERS["xpk"], IMAGE="my-image")
  assert code == 0
  assert {"--restart-on-exit-codes=75", "--max-restarts=20", "--workload=my-run"} <= set(call)


def test_local_passes_on_its_flags_and_its_exit_code(stand_in):
  python = stand_in / "python"
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
  python.chmod(0o755)
  done = launch(stand_in, "local", FLAG, PYTHON=str(python))
  assert done.returncode == 7
  assert done.stdout.splitlines() == [*JOB, FLAG]


def test_local_needs_no_environment():
  done = subprocess.run(["bash", str(ROOT / "launch/local.sh"), "--dry-run"], cwd="/", text=True,
                        env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True)
  assert done.stdout == (
    "python -m s2d_jax.main --config=configs/arithmetic.py --workdir=runs/arithmetic\n")


@pytest.mark.parametrize("name", ["tpu_vm", "xpk"])
def test_several_hosts_refuse_a_work_folder_of_one(name, stand_in):
  log = stand_in / "log"
  done = launch(stand_in, name, *LAUNCHERS[name], IMAGE="my-image", WORKDIR="runs/x",
                LOG=str(log))
  assert done.returncode == 64
  assert done.stderr == (
    "All hosts must share the work folder, not runs/x: set WORKDIR=gs://bucket/run.\n")
  assert not log.exists()


@pytest.mark.parametrize("name, args", [("tpu_vm", ["my-slice"]), ("xpk", ["my-cluster"])])
def test_too_few_arguments_print_the_usage(name, args, stand_in):
  done = launch(stand_in, name, *args)
  assert done.returncode == 64
  assert done.stderr.startswith("usage: ")
