"""launch/README.md: its shell parses, its names exist, and its walk runs with stand-ins."""

import json
import re
import subprocess

import pytest

from tests.launch import stand_ins

LAUNCH = stand_ins.ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
LAUNCHERS = {path.name: path.read_text() for path in LAUNCH.iterdir() if path.name != "README.md"}
PACKAGE = "".join(path.read_text() for path in (stand_ins.ROOT / "s2d_jax").glob("*.py"))
SET = re.compile(r"(?:^|export |\s)([A-Z][A-Z_]+)=")


def blocks(text):
  """The blocks of shell of a page."""
  return re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)


SHELL = blocks(README)
WALK = README[README.index("## The first hour"):README.index("## GKE")]


def read_by_a_launcher(name):
  return any(re.search(rf"\$\{{?{name}\b", text) for text in LAUNCHERS.values())


@pytest.mark.parametrize("block", SHELL)
def test_shell_parses(block):
  done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
  assert (done.returncode, done.stderr) == (0, "")


def test_every_launcher_is_named_and_every_named_one_exists():
  named = set(re.findall(r"\blaunch/([\w.]+)", "".join(SHELL)))
  assert named <= set(LAUNCHERS) and set(re.findall(r"^\| `(.*?)` \|", README, re.M)) == (
    set(LAUNCHERS) - {"spec.sh"})


def test_every_variable_is_read():
  named = set(re.findall(r"`([A-Z][A-Z_]{3,})`", README))
  states = {"ACTIVE", "PREEMPTED"}
  assert {"CONFIG", "WORKDIR", "REMOTE_PYTHON"} <= named
  assert [name for name in named - states
          if not (read_by_a_launcher(name) or name in PACKAGE)] == []
  shell = "".join(SHELL)
  assert [name for name in SET.findall(shell)
          if not (read_by_a_launcher(name) or re.search(rf"\${name}\b", shell))] == []


def test_every_variable_that_commands_use_is_set_before():
  found = set()
  for block in SHELL:
    for line in block.splitlines():
      used = set(re.findall(r"\$([A-Z][A-Z_]+)", line))
      found |= set(SET.findall(line))
      assert used <= found, line


def test_launchers_are_one_page():
  assert {name: lines for name, text in LAUNCHERS.items()
          if (lines := len(text.splitlines())) > 60} == {}


def test_the_message_that_is_quoted_is_printed():
  message = re.search(r"`(Stopped with .*?)`", " ".join(WALK.split()))[1]
  assert message.replace("1", "$((restarts + 1))").replace("20", "$MAX_RESTARTS") in (
    LAUNCHERS["spec.sh"])


def test_the_first_hour_runs_from_its_first_command_to_its_last(tmp_path):
  # The job of step 6 is stopped once; step 8 is for a second terminal, and finds no job here.
  cloud = stand_ins.Cloud(tmp_path, [[75, 0], [75, 0]])
  checkout = tmp_path / "checkout"
  checkout.mkdir()
  subprocess.run(["cp", "-r", str(LAUNCH), str(checkout)], check=True)
  git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
  for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "A revision"]):
    subprocess.run([*git, *command], check=True)
  for name in ("ssh-agent", "ssh-add"):
    (tmp_path / "programs" / name).write_text("#!/bin/sh\n")
    (tmp_path / "programs" / name).chmod(0o755)
  # Python and uv of a worker.
  for worker in range(stand_ins.WORKERS):
    programs = tmp_path / "homes" / str(worker) / ".local" / "bin"
    programs.mkdir(parents=True)
    (programs / "uv").write_text("#!/bin/sh\n")
    (programs / "uv").chmod(0o755)
    (programs / "python3.12").symlink_to(tmp_path / "programs" / "python3")
  done = cloud.run(["bash", "-u", "-c", "".join(blocks(WALK))], checkout, HOME=str(tmp_path))
  assert done.returncode == 0, done.stderr
  assert done.stderr == "Stopped with its state saved; restart 1 of at most 20.\n"
  for worker in range(stand_ins.WORKERS):
    assert [start["words"] for start in cloud.starts(worker)] == [[
      "-m", "s2d_jax.main", "--config=configs/arithmetic.py", "--workdir=gs://my-project-s2d/first",
      "--distributed", "--config.mesh=(1, 16, 1)"]] * 2
  calls = cloud.calls("gcloud")
  assert "--member=serviceAccount:-compute@developer.gserviceaccount.com" in json.dumps(calls)
  assert calls[-2:] == [
    ["compute", "tpus", "queued-resources", "delete", "s2d", "--zone=us-east5-a", "--force"],
    ["storage", "rm", "--recursive", "gs://my-project-s2d"]]
