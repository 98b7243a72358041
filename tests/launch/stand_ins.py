"""Stand-ins for the programs that launchers call: they run what the cloud's program would run.

Workers are folders of this machine. The job is a program that stands for Python: it notes each of
its starts, and ends as the test says.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKERS = 2

# ENDS holds a list for each worker, with one item for each start: an exit code, [seconds, exit
# code], "killed" for SIGKILL, or "wait" for SIGTERM, after which the job exits with 75.
PYTHON = """
import json, os, pathlib, shutil, signal, sys, time
if "--version" in sys.argv:
  sys.exit()
if sys.argv[1:3] == ["-m", "venv"]:
  folder = pathlib.Path(sys.argv[3], "bin")
  folder.mkdir(parents=True)
  shutil.copy(__file__, folder / "python")
  sys.exit()
worker = os.environ.get("WORKER", "0")
noted = pathlib.Path(os.environ["STARTS"], worker)
noted.mkdir(parents=True, exist_ok=True)
if sys.argv[1:3] == ["-m", "pip"]:
  (noted / "pip.txt").write_text(json.dumps(sys.argv[3:]))
  sys.exit()
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
start = len(list(noted.glob("*.json")))
note = noted / f"{start}.json"
text = json.dumps({"pid": os.getpid(), "folder": os.getcwd(), "words": sys.argv[1:]})
note.with_suffix(".new").write_text(text)
note.with_suffix(".new").rename(note)
end = json.loads(os.environ["ENDS"])[int(worker)][start]
if end == "killed":
  os.kill(os.getpid(), signal.SIGKILL)
if end != "wait":
  seconds, code = end if isinstance(end, list) else (0, end)
  time.sleep(seconds)
  sys.exit(code)
for _ in range(5000):  # longer than a busy machine takes
  if signals:
    sys.exit(75)
  time.sleep(0.02)
sys.exit(9)
"""

# Sends a signal to the noted jobs whose command line matches, and to a shell around one of them.
PKILL = """
import json, os, pathlib, re, signal, sys
send, full, pattern = sys.argv[1:]
assert (send, full) == ("-TERM", "-f")
line = lambda pid: pathlib.Path(f"/proc/{pid}/cmdline").read_text().replace(chr(0), " ")
assert not re.search(pattern, line(os.getppid())), "pkill would stop the shell that runs it"
found = 1
for note in pathlib.Path(os.environ["STARTS"], os.environ["WORKER"]).glob("*.json"):
  pid = json.loads(note.read_text())["pid"]
  if not pathlib.Path(f"/proc/{pid}").exists() or not re.search(pattern, line(pid)):
    continue
  parent = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
  if line(parent).startswith("bash"):
    os.kill(int(parent), signal.SIGTERM)
  os.kill(pid, signal.SIGTERM)
  found = 0
sys.exit(found)
"""

# A line of shell on each worker at once, in a session of its own: no signal of this machine reaches
# it. Exits with the first code that is not 0, in the order of the workers, as gcloud does. The trap
# keeps bash from running the last command in its place, which not all versions do.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
words = sys.argv[1:]
with open(os.environ["LOG"], "a") as log:
  log.write(json.dumps(["gcloud", *words]) + chr(10))
if words[:3] != ["compute", "tpus", "tpu-vm"] or words[3] not in ("ssh", "scp"):
  sys.exit()
flags = dict(word.split("=", 1) for word in words if word.startswith("--"))
workers = ["0", "1"] if flags["--worker"] == "all" else [flags["--worker"]]
homes = {worker: pathlib.Path(os.environ["HOMES"], worker) for worker in workers}
if words[3] == "scp":
  for home in homes.values():
    shutil.copy(words[4], home / words[5].partition(":")[2])
  sys.exit()
processes = [
  subprocess.Popen(["bash", "-c", "trap : USR1; " + flags["--command"]], cwd=home,
                   env=os.environ | {"WORKER": worker, "HOME": str(home)}, start_new_session=True)
  for worker, home in homes.items()]
codes = [process.wait() for process in processes]
sys.exit(next((code % 256 if code > 0 else 128 - code for code in codes if code), 0))
"""

# Two tasks. The options decide what becomes of the others when one has ended. Its code is, as the
# manual of srun has it, the highest of all tasks, where one that signal N ended counts as 128 + N.
SRUN = """
import os, subprocess, sys, time
words = sys.argv[1:]
options = {}
while words[0].startswith("--"):
  name, _, value = words.pop(0).partition("=")
  options[name] = int(value)
tasks = [subprocess.Popen(words, env=os.environ | {"WORKER": str(n)}) for n in range(2)]
first_end = None
while any(task.poll() is None for task in tasks):
  ended = [task for task in tasks if task.poll() is not None]
  first_end = first_end or (time.time() if ended else None)
  bad = options.get("--kill-on-bad-exit") and any(task.returncode for task in ended)
  if bad or (first_end and time.time() > first_end + options.get("--wait", 10**6)):
    for task in tasks:
      task.kill()
  time.sleep(0.02)
sys.exit(max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks)))
"""

# The container's command, in the shell that xpk writes around it; a pod is started again on
# xpk's codes of its own and on those of the flag. With PREEMPT, the first pod gets SIGTERM.
XPK = """
import json, os, pathlib, subprocess, sys, time
words = sys.argv[1:]
with open(os.environ["LOG"], "a") as log:
  log.write(json.dumps(["xpk", *words]) + chr(10))
flags = dict(word.split("=", 1) for word in words if word.startswith("--"))
assert words[:2] == ["workload", "create"] and len(flags) == len(words) - 2
retried = {42, *range(127, 256), *map(int, flags["--restart-on-exit-codes"].split(","))}
shell = "stop() (kill -TERM $! 2>/dev/null); trap stop TERM; (trap : USR1; %s) & pid=$!;" \\
    "while kill -0 $pid 2>/dev/null; do sleep 0.1; done; wait $pid; exit $?"
codes = []
for start in range(1 + int(flags["--max-restarts"])):
  pod = subprocess.Popen(["bash", "-c", shell % flags["--command"]])
  if os.environ.get("PREEMPT") and start == 0:
    while not pathlib.Path(os.environ["STARTS"], "0", "0.json").exists():
      time.sleep(0.02)
    pod.terminate()
  codes.append(pod.wait())
  if codes[-1] not in retried:
    break
pathlib.Path(os.environ["LOG"]).with_name("workload").write_text(json.dumps(codes))
"""

SCONTROL = """
import json, os, sys
with open(os.environ["LOG"], "a") as log:
  log.write(json.dumps(["scontrol", *sys.argv[1:]]) + chr(10))
"""

PROGRAMS = {"python": PYTHON, "python3": PYTHON, "pkill": PKILL, "gcloud": GCLOUD, "srun": SRUN,
            "xpk": XPK, "scontrol": SCONTROL}


class Cloud:
  """A folder with the stand-ins, two workers' login folders, and notes of what was started."""

  def __init__(self, folder: Path, ends: list[list]):
    """Makes the folder; `ends` says for each worker how each start of the job ends."""
    self.folder = folder
    self.log = folder / "log"
    self.log.write_text("")
    programs = folder / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
      (programs / name).write_text(f"#!{sys.executable} -SE\n{text}")
      (programs / name).chmod(0o755)
    for worker in range(WORKERS):
      python = folder / "homes" / str(worker) / "s2d_jax" / ".venv" / "bin" / "python"
      python.parent.mkdir(parents=True)
      python.symlink_to(programs / "python")
    self.env = {"PATH": f"{programs}:/usr/bin:/bin", "HOMES": str(folder / "homes"),
                "STARTS": str(folder / "starts"), "LOG": str(self.log), "ENDS": json.dumps(ends),
                "RESTART_DELAY": "0", "WORKDIR": "gs://bucket/a run",
                "CONFIG": "configs/qwen3_math.py"}

  def start(self, command: list[str], cwd: Path = ROOT, **env: str) -> subprocess.Popen:
    """The command, under way, as a terminal starts it: in a process group of its own."""
    return subprocess.Popen(command, cwd=cwd, env=self.env | env, text=True, process_group=0,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def run(self, command: list[str], cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """The command at its end: its output and exit code."""
    process = self.start(command, cwd, **env)
    try:
      out, error = process.communicate(timeout=60)
    finally:
      process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, error)

  def starts(self, worker: int = 0) -> list[dict]:
    """The starts of the job on a worker: pid, folder and words of each."""
    notes = (self.folder / "starts" / str(worker)).glob("*.json")
    return [json.loads(path.read_text()) for path in sorted(notes)]

  def calls(self, program: str) -> list[list[str]]:
    """The words of each call of a program."""
    lines = [json.loads(line) for line in self.log.read_text().splitlines()]
    return [words for name, *words in lines if name == program]

  def wait_for_starts(self, count: int) -> None:
    """Returns when each worker has had `count` starts; raises AssertionError after 60 s."""
    until = time.monotonic() + 60
    while min(len(self.starts(worker)) for worker in range(WORKERS)) < count:
      assert time.monotonic() < until, "the job has not started"
      time.sleep(0.02)

  def signal_jobs(self, start: int) -> None:
    """Sends SIGTERM to one start of the job on every worker."""
    for worker in range(WORKERS):
      os.kill(self.starts(worker)[start]["pid"], signal.SIGTERM)
